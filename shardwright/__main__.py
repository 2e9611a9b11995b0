"""`python -m shardwright`."""

from shardwright.cli import main

if __name__ == "__main__":
    main()
