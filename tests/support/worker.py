"""One of several processes that run emitted scripts one after another in a single process group.

Started with the usual variables (RANK, WORLD_SIZE, ...) and the path of a JSON list of runs: `folder` of the script,
`argv`, and optionally `signal`: [number, rank or -1 for all, step after which the process sends it to itself], or
`full_disk`: the rank whose disk is full; `keeps`: whether each process's own parameters go to `kept-RANK.pt` after each
step; `ends`: `done`, or the exception that it shall end with. How each run ended goes to `outcome-RANK.txt` beside its
script.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

REPLACED = ("cross_entropy", "scaled_dot_product_attention")
"""What a script may replace in torch.nn.functional for as long as its process lives."""


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for run in json.loads(Path(sys.argv[1]).read_text()):
        steps = SignalAfter(*run["signal"]) if "signal" in run else None
        handle = register_optimizer_step_post_hook(steps) if steps else None
        keeps = register_optimizer_step_post_hook(Keep(Path(run["folder"]))) if run.get("keeps") else None
        flush = os.fsync
        if run.get("full_disk") == dist.get_rank():
            os.fsync = no_space
        outcome = run_script(Path(run["folder"]), run["argv"], run["ends"])
        os.fsync = flush
        for hook in (handle, keeps):
            if hook:
                hook.remove()
        Path(run["folder"], f"outcome-{dist.get_rank()}.txt").write_text(outcome)
        dist.barrier()
    dist.destroy_process_group()
    # gloo's threads free their last tensors with the interpreter's lock, and abort if the interpreter ends meanwhile.
    time.sleep(0.2)


def no_space(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


class SignalAfter:
    """An optimizer hook that sends this process a signal when its n-th step is done."""

    def __init__(self, number: int, rank: int, step: int) -> None:
        self.number = number
        self.left = step if rank in (-1, dist.get_rank()) else 0

    def __call__(self, *arguments: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


class Keep:
    """An optimizer hook that writes what this process trains, in the optimizer's order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        values = [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]
        torch.save(values, self.folder / f"kept-{dist.get_rank()}.pt")


def run_script(folder: Path, argv: list[str], ends: str) -> str:
    """Import a fresh train.py with the modules beside it and call its main; returns how that ended.

    Raises what the script raises, unless its name is the expected end: the other processes may wait for this one.
    """
    for name in list(sys.modules):
        if name.split(".")[0] in ("tiny", "custom", "bytes_gpt", "shardwright_runtime"):
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    functions = {name: getattr(F, name) for name in REPLACED}
    try:
        spec = importlib.util.spec_from_file_location("train", folder / "train.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(argv)
    except (Exception, SystemExit) as error:
        if type(error).__name__ != ends:
            raise
        return f"{type(error).__name__}: {error}"
    finally:
        sys.path.remove(str(folder))
        for name, function in functions.items():
            setattr(F, name, function)
    return "done"


if __name__ == "__main__":
    main()
