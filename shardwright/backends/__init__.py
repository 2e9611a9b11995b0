"""From a plan to files: one folder per backend, and the folder of files that each of them makes."""
