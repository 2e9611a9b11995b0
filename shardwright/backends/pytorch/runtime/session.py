"""Starting and stopping: the process group, seeds, the stop signal and the log of metrics."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from what it is for, the same in every process and on every machine (BLAKE2b of the parts)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def local_device(kind: str) -> torch.device:
    """The device of this process, made current: one of this node's GPUs by LOCAL_RANK, or the CPU.

    Raises SystemExit when the plan is for GPUs and there is none.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("this plan is for CUDA devices and none is visible; `shardwright rehearse` tries it on a CPU")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def only_device(kind: str) -> torch.device:
    """The device of a plan for one process. Raises SystemExit when a launcher started several."""
    check_world_size(int(os.environ.get("WORLD_SIZE", "1")), 1)
    return local_device(kind)


@contextmanager
def process_group(kind: str, world_size: int) -> Iterator[tuple[int, torch.device]]:
    """Join the processes that the launcher started; gives this one's rank and device, and leaves at the end.

    A caller that has already started a process group keeps it. After an exception the group is left standing: the
    other processes may wait in a collective, and the launcher ends them.
    """
    device = local_device(kind)
    joined = not dist.is_initialized()
    if joined:
        if "RANK" not in os.environ:
            raise SystemExit(f"start {world_size} processes with torchrun or Slurm: see launch.sh")
        dist.init_process_group(BACKENDS[kind], device_id=device if kind == "cuda" else None)
    check_world_size(dist.get_world_size(), world_size)
    yield dist.get_rank(), device
    if joined:
        dist.destroy_process_group()
        if kind == "cpu":
            # A thread of gloo frees its last tensor with the interpreter's lock. If the interpreter ends meanwhile, the
            # process aborts ("terminate called without an active exception"; seen on torch 2.13): leave it the lock.
            time.sleep(0.2)


def check_world_size(found: int, planned: int) -> None:
    """Raises SystemExit unless exactly as many processes run as the plan is for."""
    if found != planned:
        message = f"this plan is for {planned} processes and {found} were started; compile the job again for {found}"
        raise SystemExit(message if int(os.environ.get("RANK", "0")) == 0 else 1)


class Signals:
    """What this process was asked to do from outside: SIGTERM to save and stop, SIGUSR1 to save and go on.

    Schedulers send SIGTERM some time before they end a job.
    """

    def __init__(self) -> None:
        self.stop = False
        self._save = False
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGUSR1, self._receive)

    def save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.stop = True
        else:
            self._save = True


class Timer:
    """Whether `seconds` have passed since the start or since it was last `due`, on this process's clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = time.monotonic()

    def due(self) -> bool:
        """True once per interval."""
        if time.monotonic() - self._start < self.seconds:
            return False
        self._start = time.monotonic()
        return True


class MetricsLog:
    """One JSON object per step in a file of lines, written by one process.

    `step` is the step that training starts from: lines of later steps, left by a run that died after its last
    checkpoint, are removed first, and so is whatever is no line of this log: a broken log keeps nobody from resuming.
    """

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **fields: float | int | None) -> None:
        """Append one line; numbers keep their full precision, what is not finite becomes null."""
        finite = {key: None if value is None or not math.isfinite(value) else value for key, value in fields.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line, infinity for one that has none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return math.inf
