"""What a backend makes: a folder of text files, and the way to put it in place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from shardwright.schemas.diagnostics import Diagnostic, InputError


@dataclass(frozen=True, slots=True)
class Emission:
    """Files by their path below the output folder, in POSIX form. Paths that lead out of it raise ValueError."""

    files: Mapping[str, str]
    executable: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()
    """Folders that are the emission's alone: `*.py` files there that an earlier emission left are removed."""

    def __post_init__(self) -> None:
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name:
                raise ValueError(f"{name!r} is not a path below the output folder")
        object.__setattr__(self, "files", MappingProxyType(dict(sorted(self.files.items()))))


def write(emission: Emission, out: Path) -> None:
    """Put the files into `out`; whatever else lies there (checkpoints, metrics, notes) stays, but for modules of an
    earlier emission in the emission's own packages.

    All files are first written beside their places; only when every one of them is on the disk are they renamed into
    place. An interruption before that leaves the folder as it was, and a full disk cannot truncate a file. Raises
    InputError when `out`, or a place in it, is taken by something that is not a folder or a file, and when a file would
    be replaced in a folder that was not written from here (it has no plan.json).
    """
    places = {name: out / name for name in emission.files}
    for folder in (out, *(place.parent for place in places.values())):
        if folder.exists() and not folder.is_dir():
            raise InputError(Diagnostic(message=f"{folder} is not a folder", suggestion="choose another output folder"))
    for name, place in places.items():
        if place.is_dir():
            raise InputError(Diagnostic(message=f"{place} is a folder, a file belongs there"))
        if not (out / "plan.json").exists() and place.exists() and place.read_bytes() != emission.files[name].encode():
            message = f"{place} would be replaced, and {out} holds no plan.json: it is not a folder of compiled files"
            raise InputError(Diagnostic(message=message, suggestion="choose another output folder"))
    again = (out / "plan.json").is_file()
    out.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".shardwright-", dir=out))
    try:
        for name, text in emission.files.items():
            staged = staging / name
            staged.parent.mkdir(parents=True, exist_ok=True)
            with staged.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            staged.chmod(0o755 if name in emission.executable else 0o644)
        for name, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, place)
        if again:
            _remove_leftovers(emission, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_leftovers(emission: Emission, out: Path) -> None:
    for package in emission.packages:
        for path in (out / package).glob("*.py"):
            if f"{package}/{path.name}" not in emission.files and path.is_file():
                path.unlink()
