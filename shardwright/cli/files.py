"""Writing without harm: a file is whole or not there, and nothing of the user's is ever overwritten."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardwright.backends.emission import STAGING
from shardwright.report.svg import MARK
from shardwright.schemas.diagnostics import Diagnostic, InputError

PLAN_FILE = "plan.json"
_SCRIPT_FILE = "train.py"
_MARKED_WITHIN = 512
"""Characters at the beginning of a drawing that hold its mark."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says a failed write (no permission, no space, no folder) as what it is: not a bug of ours."""
    try:
        yield
    except OSError as error:
        message = f"cannot be written: {error.strerror or error}"
        raise InputError(Diagnostic(file=str(path), message=message)) from error


def write_atomically(path: Path, text: str) -> None:
    """Writes beside the file, then puts it in place: an interrupted write leaves the old file whole.

    Raises InputError if the place cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def looks_like_plan(path: Path) -> bool:
    """Whether a file is a plan of ours, judged by its name and its outermost keys; it need not be valid."""
    return path.suffix == ".json" and {"decision", "schema_version"} <= _outer_keys(path)


def _outer_keys(path: Path) -> set[str]:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return set(value) if isinstance(value, dict) else set()


def check_plan_target(path: Path) -> None:
    """Refuses to replace a file that is no plan of ours. Raises InputError."""
    if path.is_dir():
        raise InputError(Diagnostic(file=str(path), message="is a folder; name the file of the plan", key="-o"))
    if path.exists() and not looks_like_plan(path):
        raise InputError(
            Diagnostic(
                file=str(path),
                message="holds something that is not a plan, so it is not overwritten",
                suggestion="name another file, or move this one away",
            )
        )


def check_drawing_target(path: Path, endings: Collection[str], option: str = "--graph") -> None:
    """Refuses a file of a kind that we do not draw, and to replace one that we did not. Raises InputError."""
    if path.suffix not in endings:
        message = f"{path.name!r} ends in none of {', '.join(endings)}"
        raise InputError(Diagnostic(key=option, message=message, suggestion="the ending says what is drawn"))
    if path.is_dir():
        raise InputError(Diagnostic(file=str(path), message="is a folder; name the file of the drawing"))
    if path.exists() and MARK not in _beginning(path):
        raise InputError(
            Diagnostic(
                file=str(path),
                message="holds something that is not a drawing of ours, so it is not overwritten",
                suggestion="name another file, or move this one away",
            )
        )


def _beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_MARKED_WITHIN)
    except (OSError, ValueError):
        return ""


def check_emission_target(folder: Path) -> None:
    """Refuses to write into a folder that is neither empty nor an earlier emission of ours. Raises InputError."""
    if folder.exists() and not folder.is_dir():
        raise InputError(Diagnostic(file=str(folder), message="is a file; name the folder to write"))
    if not folder.exists() or all(entry.name.startswith(STAGING) for entry in folder.iterdir()):
        return
    if not ((folder / _SCRIPT_FILE).is_file() and looks_like_plan(folder / PLAN_FILE)):
        raise InputError(
            Diagnostic(
                file=str(folder),
                message=f"is not empty and was not written by `compile` (it lacks {_SCRIPT_FILE} or {PLAN_FILE}),"
                " so it is left alone",
                suggestion="name a new or an empty folder",
            )
        )


def check_empty(folder: Path) -> None:
    """Refuses a folder that holds something. Raises InputError."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        message = "is not an empty folder, so it is left alone"
        raise InputError(Diagnostic(file=str(folder), message=message, suggestion="name a new or an empty folder"))


def create(path: Path, text: str) -> None:
    """Writes a new file; one that exists is left alone. Raises InputError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except FileExistsError:
            message = "exists already and is never overwritten"
            raise InputError(Diagnostic(file=str(path), message=message, suggestion="name another folder")) from None
