"""What a profile was made from, seen while it is made: the files that were opened, and the names that were imported.

[Note: evidence]
A profile follows from the job, from the installed packages, and from files: the user's modules, those that they import
from outside of installed packages (a package in editable mode, a folder on PYTHONPATH), and whatever they read while
they are imported, built and run. The files are seen by an audit hook (PEP 578: every `open` of Python raises an event;
https://docs.python.org/3/library/audit_events.html), so that a factory that reads its sizes from a file is seen to do
so. Not seen are environment variables and the listing of folders.

A file that was not there may change what is imported once it is there: beside the job it hides an installed package of
its name, and a package hides a module. So the evidence also names what was not there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_INSTALLED = frozenset(("site-packages", "dist-packages"))
_STANDARD = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
_PREFIXES = (
    *("/proc/", "/sys/", "/dev/"),  # what these hold is of this moment
    *(f"{root}{os.sep}" for path in _STANDARD for root in (path, os.path.realpath(path))),
    f"{Path(__file__).resolve().parent.parent}{os.sep}",
)
MOST_BYTES = 32 * 2**20
"""Of all files together: above that, reading them again takes as long as it is worth."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """[Note: evidence]. It holds as long as `still_holds` says so."""

    files: dict[str, str]
    """Path (relative to the job's folder where the file lies in it) to the sha256 of the content; empty for a file that
    was not there."""
    imported: list[str]
    """Top-level names of the modules that were loaded or asked for."""
    beside: list[str]
    """Those of them that name a module or a package beside the job."""

    def still_holds(self, folder: Path) -> bool:
        """Whether everything is as it was."""
        if self.beside != _beside(folder, self.imported):
            return False
        return all(_sha256(folder / path) == content for path, content in self.files.items())


@dataclass(slots=True)
class Witness:
    """Collects what `testify` turns into evidence."""

    opened: set[str] = field(default_factory=set)
    began: float = field(default_factory=time.time)

    def testify(self, folder: Path, sources: Sequence[str], imported: Iterable[str]) -> Evidence | None:
        """The evidence for a profile that was made meanwhile. `sources` are the user's files, relative to `folder`, and
        `imported` the modules that they ask for. None if there is more of it than `MOST_BYTES`, or
        if a file was written meanwhile: then nobody knows which content was read."""
        folder = folder.resolve()
        names = {*imported}
        paths = {*_resolved(map(_source, self.opened)), *_resolved(_loaded()), *(folder / source for source in sources)}
        paths |= {hiding for source in sources for hiding in _hiding(folder, Path(source))}
        paths |= {folder / path for name in names for path in _files(name) if (folder / path.parts[0]).is_dir()}
        mine = sorted(path for path in paths if not path.is_dir() and not _is_installed(str(path)))
        found = [path.stat() for path in mine if path.exists()]
        if sum(status.st_size for status in found) > MOST_BYTES or any(at.st_mtime >= self.began for at in found):
            return None
        tops = {name.split(".")[0] for name in (*sys.modules, *names)}
        files = {_shown(path, folder): _sha256(path) for path in mine}
        return Evidence(files, sorted(tops), _beside(folder, tops))


def _source(opened: str) -> str:
    """The file that was meant: for cached bytecode its source (https://peps.python.org/pep-3147)."""
    folder, file = os.path.split(opened)
    around, cached = os.path.split(folder)
    return os.path.join(around, f"{file.split('.')[0]}.py") if cached == "__pycache__" else opened


def _loaded() -> Iterator[str]:
    """Files of the modules that are loaded; they may have been before anybody watched."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and os.path.isabs(file):
            yield file


def _resolved(files: Iterable[str]) -> Iterator[Path]:
    """Without links; but nothing that is installed, for resolving thousands of files takes long."""
    return (Path(os.path.realpath(file)) for file in files if not _is_installed(file))


def _is_installed(file: str) -> bool:
    """Whether a file is an installed package's, Python's or ours: versions tell when these change."""
    return file.startswith(_PREFIXES) or not _INSTALLED.isdisjoint(file.split(os.sep))


def _files(module: str) -> tuple[Path, ...]:
    """Where a module may lie below a folder, the first one to be found first."""
    path = Path(*module.split("."))
    return path / "__init__.py", path.with_name(f"{path.name}.py")


def _hiding(folder: Path, source: Path) -> Iterator[Path]:
    """Files that would hide a source from those that import it: the package of its name, and for each package around
    it the file that makes it one."""
    if source.name != "__init__.py":
        yield folder / source.with_suffix("") / "__init__.py"
    yield from (folder / around / "__init__.py" for around in source.parents if around.parts)


def _beside(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that a file or a package beside the job has."""
    there = {path.name.split(".")[0] for path in folder.glob("*.*") if path.suffix in (".py", ".so", ".pyd")}
    there |= {path.parent.name for path in folder.glob("*/__init__.py")}
    return sorted(there.intersection(names))


def _shown(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


_watching: list[Witness] = []
_hooks: list[bool] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open":
        path, mode, flags = arguments
        reads = "r" in mode if isinstance(mode, str) else not (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        if reads and isinstance(path, str | bytes | os.PathLike):
            for witness in _watching:
                witness.opened.add(os.path.abspath(os.fsdecode(path)))


@contextmanager
def watching() -> Iterator[Witness]:
    """Watches which files are read. The hook stays for as long as the process lives, as audit hooks do, and hears
    nothing once nobody watches."""
    if not _hooks:
        sys.addaudithook(_hear)
        _hooks.append(True)
    witness = Witness()
    _watching.append(witness)
    try:
        yield witness
    finally:
        _watching.remove(witness)
