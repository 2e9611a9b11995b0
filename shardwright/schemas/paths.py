"""Looking for what a person named: a name that the file system cannot even look up (too long) names nothing."""

from __future__ import annotations

from pathlib import Path


def is_file(path: Path) -> bool:
    """`Path.is_file`, False for an impossible name as well."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """`Path.is_dir`, False for an impossible name as well."""
    try:
        return path.is_dir()
    except OSError:
        return False
