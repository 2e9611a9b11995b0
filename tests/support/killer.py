"""One of several processes that run emitted scripts one after another, each in a fork of its own that may be killed.

Started with the usual variables (RANK, WORLD_SIZE, ...) and the path of a JSON list of runs: `folder` of the script,
`argv`, the `port` to meet at, and optionally `kill`: [rank, function of the runtime's checkpoint module, which of its
calls, "before" or "after"], the moment at which that process kills itself. The exit code of each fork, negative for a
signal, goes to `codes-RANK.json` beside the list; one that hangs ends with SIGALRM. Forks spare the time that every
import of torch takes.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer imports it when it is made
import torch.distributed.fsdp

LONGEST_RUN_S = 45
"""After so many seconds SIGALRM ends a fork."""


def main() -> None:
    torch.set_num_threads(1)
    listed = Path(sys.argv[1])
    codes = []
    for run in json.loads(listed.read_text()):
        child = os.fork()
        if child == 0:
            signal.alarm(LONGEST_RUN_S)
            run_script(run)
            return
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    listed.with_name(f"codes-{os.environ['RANK']}.json").write_text(json.dumps(codes))


def run_script(run: dict[str, Any]) -> None:
    """Run train.py as the main program, as a launcher would; it ends as the script ends."""
    os.environ["MASTER_PORT"] = str(run["port"])
    sys.path.insert(0, run["folder"])
    if "kill" in run:
        rank, function, call, when = run["kill"]
        if rank == int(os.environ["RANK"]):
            checkpoint = importlib.import_module("shardwright_runtime.checkpoint")
            setattr(checkpoint, function, dying(getattr(checkpoint, function), call, when))
    sys.argv = ["train.py", *run["argv"]]
    runpy.run_path(str(Path(run["folder"], "train.py")), run_name="__main__")


def dying(function: Callable[..., Any], call: int, when: str) -> Callable[..., Any]:
    """The function, the n-th call of which ends the process before it begins or after it is done."""
    left = call

    def call_or_die(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call_or_die


if __name__ == "__main__":
    main()
