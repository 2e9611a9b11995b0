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

STAGING = ".shardwright-"
"""Beginning of the name of a folder that `write` works in; one that an interruption left may be deleted."""


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


def write(emission: Emission, out: Path) -> tuple[str, ...]:
    """Put the files into `out`; whatever else lies there (checkpoints, metrics, notes) stays, but for modules of an
    earlier emission in the emission's own packages.

    All files are first written aside. A new folder then appears whole; in one that was compiled into before, files are
    renamed into place once every one of them is on the disk, so that a full disk cannot truncate a file. A script or
    source that changes is kept under its name with `.old`: returns their names. Raises InputError when the folder
    cannot be written, when a file would be replaced in a folder that was not written from here (it has no plan.json).
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
    new, again = not out.exists(), (out / "plan.json").is_file()
    (out.parent if new else out).mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=out.parent if new else out))
    try:
        for name, text in emission.files.items():
            staged = staging / name
            staged.parent.mkdir(parents=True, exist_ok=True)
            with staged.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            staged.chmod(0o755 if name in emission.executable else 0o644)
        if new:
            staging.chmod(0o755)
            os.replace(staging, out)
            return ()
        kept = _replace(emission, staging, out)
        if again:
            _remove_leftovers(emission, out)
        return kept
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(emission: Emission, staging: Path, out: Path) -> tuple[str, ...]:
    """Rename the files into place. plan.json and the emission's own packages are not for editing, and not kept."""
    kept = []
    # What marks the folder as compiled comes first, so that an interrupted write can be repeated.
    for name in sorted(emission.files, key=lambda name: (name not in ("plan.json", "train.py"), name)):
        place, text = out / name, emission.files[name]
        place.parent.mkdir(parents=True, exist_ok=True)
        theirs = name != "plan.json" and name.split("/")[0] not in emission.packages
        if theirs and place.exists() and place.read_bytes() != text.encode():
            os.replace(place, place.with_name(f"{place.name}.old"))
            kept.append(name)
        os.replace(staging / name, place)
    return tuple(kept)


def _remove_leftovers(emission: Emission, out: Path) -> None:
    for package in emission.packages:
        for path in (out / package).glob("*.py"):
            if f"{package}/{path.name}" not in emission.files and path.is_file():
                path.unlink()
