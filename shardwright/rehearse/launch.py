"""Starts emitted scripts on this machine's CPU, and ends them whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import shardwright

_LOG_LINES = 20
_START = """
import sys
sys.path.append(sys.argv.pop())
from shardwright.rehearse.stage import main
main(sys.argv[1])
"""
"""Starts the stage with this very shardwright, installed or not; last on the path, it hides no module of the user's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One script to be run by some processes."""

    folder: str
    """Holds `train.py`; logs, findings and the script's `out` go there."""
    processes: int
    steps: int
    """The last of which is observed."""
    arguments: tuple[str, ...] = ()
    timeout_s: float = 300.0

    def log(self, rank: int) -> Path:
        """What a process has printed."""
        return Path(self.folder) / f"rank-{rank}.log"

    def findings(self, rank: int) -> Path:
        """What was observed of it; written in the last step."""
        return Path(self.folder) / f"rank-{rank}.json"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a launch ended early, and the end of the log of the process that failed first."""

    message: str
    log: tuple[str, ...]
    process: int | None = None
    """Which failed first, where one did."""


def run(launches: Sequence[Launch], modules: Sequence[str], folder: Path) -> Generator[float | Failure, None, None]:
    """Run launches one after the other; for each that ended well its seconds, for the first that did not a Failure.

    `modules`: imported once for all. Leaving the iteration early ends every process.
    """
    spec = folder / "launches.json"
    spec.write_text(json.dumps({"modules": modules, "launches": [asdict(launch) for launch in launches]}))
    command = [sys.executable, "-c", _START, str(spec.resolve()), str(Path(shardwright.__file__).parent.parent)]
    errors = folder / "stage.log"
    with errors.open("w") as log:
        stage = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        assert stage.stdout is not None
        for launch in launches:
            line = stage.stdout.readline()
            if not line:
                yield Failure(f"the processes could not be started (exit code {stage.wait()})", _tail(errors))
                return
            outcome = json.loads(line)
            if "rank" in outcome:
                yield _failure(launch, outcome)
                return
            early = [rank for rank in range(launch.processes) if not launch.findings(rank).exists()]
            if early:
                message = f"process {early[0]} of {launch.processes} ended before step {launch.steps}"
                yield Failure(message, _tail(launch.log(early[0])), early[0])
                return
            yield outcome["seconds"]
    finally:
        _end(stage)


def _end(stage: subprocess.Popen[str]) -> None:
    """The process group, so that what the stage has forked goes too."""
    with suppress(ProcessLookupError):
        os.killpg(stage.pid, signal.SIGKILL)
    stage.wait()
    for pipe in (stage.stdin, stage.stdout):
        assert pipe is not None
        pipe.close()


def _failure(launch: Launch, outcome: dict[str, int]) -> Failure:
    rank = outcome["rank"]
    if "timed_out" in outcome:
        how = f"had not ended after {launch.timeout_s:.0f} s: perhaps the processes wait for each other"
    elif outcome["exit_code"] < 0:
        how = f"was killed by {signal.Signals(-outcome['exit_code']).name}"
    else:
        how = f"failed with exit code {outcome['exit_code']}"
    return Failure(f"process {rank} of {launch.processes} {how}", _tail(launch.log(rank)), rank)


def _tail(log: Path) -> tuple[str, ...]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return tuple(lines[-_LOG_LINES:])


def _environment() -> dict[str, str]:
    """One thread a process, and loopback for gloo where nothing else was asked for."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment
