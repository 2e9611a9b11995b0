"""The published families of pipeline schedules, each as a function that writes its timetable."""
