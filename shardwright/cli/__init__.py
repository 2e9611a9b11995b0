"""The command line: it reads, asks the library, draws the answer and says with its exit code what became of it."""

from shardwright.cli.app import app, main

__all__ = ["app", "main"]
