"""The process that starts the processes of a rehearsal, as `launch` asks it to in a file.

It imports torch (and what else the model needs) once and forks, so that a process of a rehearsal starts in
milliseconds where torchrun takes seconds, and every launch is fresh. To an emitted script it looks like torchrun on
one node. It writes one line of JSON on stdout for each launch, and ends at the first that fails or when stdin closes.

[Note: fork, then serve]
The store in which the processes of a launch meet lives in this process, on a port that the system chose, so no port is
ever guessed. It has a thread of its own; forking beside a running thread is unsafe, so the processes are forked first
and wait for the port's number.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import sys
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not exported to type checkers

from shardwright.rehearse.collectives import count_collectives
from shardwright.rehearse.observe import Observer

_FORK = multiprocessing.get_context("fork")
_HOST = "127.0.0.1"
_SLOW_IMPORTS = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor")
"""What torch itself would import in every process: the first when an optimizer is made."""


def main(spec: str) -> None:
    """Run the launches of a file one after the other."""
    todo = json.loads(Path(spec).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    for module in (*_SLOW_IMPORTS, *todo["modules"]):
        with suppress(ImportError):  # the script that needs it will say so
            importlib.import_module(module)
    for launch in todo["launches"]:
        started = time.perf_counter()
        failure = _run(launch)
        print(json.dumps(failure | {"seconds": time.perf_counter() - started}), flush=True)
        if failure:
            return


def _run(launch: dict[str, Any]) -> dict[str, Any]:
    """Start the processes of a launch and wait for them; what went wrong, or nothing."""
    ports = _FORK.SimpleQueue()
    ranks = [
        _FORK.Process(target=_process, args=(launch, rank, ports), daemon=True) for rank in range(launch["processes"])
    ]
    for process in ranks:
        process.start()
    try:
        store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        for _ in ranks:
            ports.put(store.port)
        return _wait(ranks, launch["timeout_s"])
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _wait(ranks: list[Any], timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        ready = wait([*running, sys.stdin.fileno()], deadline - time.monotonic())
        if sys.stdin.fileno() in ready:
            raise SystemExit("the rehearsal that asked for this has gone")
        if not ready:
            return {"rank": min(running.values()), "timed_out": True}
        for sentinel in ready:
            rank = running.pop(sentinel)
            ranks[rank].join()
            if ranks[rank].exitcode:
                return {"rank": rank, "exit_code": ranks[rank].exitcode}
    return {}


def _process(launch: dict[str, Any], rank: int, ports: Any) -> None:
    """One process of a launch: the emitted script, as `python train.py` under torchrun would run it."""
    folder = Path(launch["folder"])
    _write_output_to(folder / f"rank-{rank}.log")
    processes = launch["processes"]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR=_HOST,
        MASTER_PORT=str(ports.get()),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RUN_ID="rehearsal",
    )
    script = folder / "train.py"
    sys.argv = [str(script), "--out", str(folder / "out"), *launch["arguments"]]
    sys.path[0] = str(folder)
    Observer(count_collectives(), launch["steps"], rank, folder)
    runpy.run_path(str(script), run_name="__main__")


def _write_output_to(log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
