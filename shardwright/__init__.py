"""A declarative training-config compiler: describe in YAML, generate the script, inspect the plan."""

__version__ = "0.1.0"
