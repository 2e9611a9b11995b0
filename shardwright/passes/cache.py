"""Profiles kept on the disk, so that a model that has not changed is not profiled again.

[Note: a kept profile]
Its file is named by a sha256 over what is known before anything is profiled: the parts of the job that the passes read,
the folder it lies in, the sources of the passes themselves, Python, the installed packages with their versions, and the
environment variables by which torch and transformers are configured. What is known only afterwards, which files the
user's code is made of and reads, stands in the file with their sha256 and is compared before the profile is used
([Note: evidence]). A file that does not fit, whatever the reason, is as good as none; it is written anew.

Not kept are profiles of jobs with a dataset of their own: what its first sample depends on cannot be known (a listing
of a folder, a data base). Not seen are environment variables that the user's own code reads.

No torch is needed to find a profile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import shardwright
from shardwright.passes.serialise import digest_of, profile_from_json, profile_to_json
from shardwright.passes.witness import Evidence, watching
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile

VARIABLE = "SHARDWRIGHT_CACHE"
"""Environment variable: the folder of the cache, or `off`."""
MOST_FILES = 200
MOST_BYTES = 64 * 2**20
_FORMAT = 1
_SETTINGS = ("TORCH", "PYTORCH", "TRANSFORMERS", "HF_", "USE_")
"""How the variables begin that torch and transformers read."""
_PLACES = ("_CACHE_DIR", "_CACHE", "_HOME")
"""How those end that say where something lies. torch sets one itself when it is imported."""
_METADATA = (".dist-info", ".egg-info", ".egg-link", ".pth")
_ABANDONED_S = 3600
"""Age of a temporary file that nobody will finish."""


class Kept(NamedTuple):
    """A profile out of the cache."""

    profile: ModelProfile
    made: float
    """When it was made, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class ProfileCache:
    """A folder of profiles. Many processes may use it at once: files are put in place whole. A folder that cannot be
    read or written is an empty one."""

    folder: Path

    def find(
        self, job: JobSpec, folder: Path, dtypes: Sequence[ComputeDtypeName], *, compiled: bool = False
    ) -> Kept | None:
        """The profile that `profile_model` would make of the same arguments, if it is kept."""
        path = self._path(job, folder, dtypes, compiled)
        try:
            entry = json.loads(path.read_bytes())
            values = entry["profile"]
            if digest_of(values) != values["digest"] or not Evidence(**entry["evidence"]).still_holds(folder):
                return None
            found = Kept(profile_from_json(values), float(entry["made"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the oldest are removed first
        return found

    def make(
        self, job: JobSpec, folder: Path, dtypes: Sequence[ComputeDtypeName], *, compiled: bool = False
    ) -> ModelProfile:
        """Makes the profile, and keeps it. Raises what `profile_model` raises."""
        from shardwright import passes

        path = self._path(job, folder, dtypes, compiled)
        with watching() as witness:
            profile = passes.profile_model(job, folder, dtypes, compiled=compiled)
        if job.data.dataset is None:
            from shardwright.passes.sources import asked_for

            evidence = witness.testify(folder, profile.local_sources, asked_for(job, profile.local_sources, folder))
            if evidence is not None:
                entry = {"made": time.time(), "evidence": asdict(evidence), "profile": profile_to_json(profile)}
                with contextlib.suppress(OSError):
                    self._write(path, json.dumps(entry, separators=(",", ":")))
                    self._make_room()
        return profile

    def _path(self, job: JobSpec, folder: Path, dtypes: Sequence[ComputeDtypeName], compiled: bool) -> Path:
        known = {
            "format": _FORMAT,
            "shardwright": (shardwright.__version__, own_sources()),
            "machine": (sys.version, sys.platform, platform.machine()),
            "packages": installed(),
            "settings": sorted(item for item in os.environ.items() if _is_setting(item[0])),
            "folder": str(folder.resolve()),
            "model": job.model.model_dump(mode="json"),
            "data": job.data.model_dump(mode="json"),
            "sequence_length": job.train.sequence_length,
            "device": job.cluster.device.kind,
            "tensor_parallel": (
                job.strategy.tp,
                job.strategy.tensor_parallel.model_dump(mode="json"),
                job.cluster.levels[0].size,
                job.cluster.world_size,
            ),
            "dtypes": list(dtypes),
            "compiled": compiled,
        }
        return self.folder / f"{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()}.json"

    def _write(self, path: Path, text: str) -> None:
        """Puts a file in place whole. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(suffix=".tmp", dir=self.folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _make_room(self) -> None:
        """Removes the profiles that were not used for longest, down to `MOST_FILES` and `MOST_BYTES`."""
        room, files = MOST_BYTES, 0
        for path, status in sorted(self._statuses("*.json"), key=lambda found: -found[1].st_mtime):
            room, files = room - status.st_size, files + 1
            if room < 0 or files > MOST_FILES:
                path.unlink(missing_ok=True)
        for path, status in self._statuses("*.tmp"):
            if time.time() - status.st_mtime > _ABANDONED_S:
                path.unlink(missing_ok=True)

    def _statuses(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        for path in list(self.folder.glob(pattern)):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                yield path, path.stat()


def users_cache() -> ProfileCache | None:
    """The cache of the person at the command line: the folder that SHARDWRIGHT_CACHE names, else `shardwright` in the
    user's folder for caches (https://specifications.freedesktop.org/basedir-spec/latest/). None where it is off, or
    the user has no home."""
    named = os.environ.get(VARIABLE)
    if named:
        return None if named == "off" else ProfileCache(Path(named) / "profiles")
    caches = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(caches) if os.path.isabs(caches) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return ProfileCache(root / "shardwright" / "profiles")


@cache
def own_sources() -> str:
    """sha256 over the sources of the passes and of the schemas: a changed pass makes another profile."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for part in ("passes", "schemas") for path in (root / part).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _is_setting(name: str) -> bool:
    return name.startswith(_SETTINGS) and not name.endswith(_PLACES)


def installed() -> list[Any]:
    """What is installed: the folders of metadata, whose names hold a package's name and version, with the time of their
    last change."""
    found = []
    for folder in dict.fromkeys(sys.path):
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            found += [(entry.name, entry.stat().st_mtime_ns) for entry in entries if entry.name.endswith(_METADATA)]
    return sorted(found)
