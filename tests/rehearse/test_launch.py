"""Processes are started, watched, counted and ended: with small scripts in the place of an emitted one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardwright.rehearse.compare import Outcome
from shardwright.rehearse.launch import Failure, Launch, run

pytestmark = [pytest.mark.processes, pytest.mark.slow]

HEAD = """
import argparse, os, sys, time
import torch, torch.distributed as dist
from torch import nn
parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.parse_args()
RANK = int(os.environ["RANK"])
"""

MODEL = """
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))
def train(model, extra):
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(3):
        torch.manual_seed(step)
        extra()
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
"""

SHARDED = (
    HEAD
    + MODEL
    + """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import torch.distributed._functional_collectives as functional
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
for layer in model:
    fully_shard(layer, mesh=mesh)
def extra():
    dist.all_reduce(torch.zeros(3, dtype=torch.float64))
    functional.all_reduce(torch.zeros(5), "sum", mesh["dp_shard"].get_group()).sum()
    dist.broadcast(torch.zeros(7, dtype=torch.uint8), src=0)
    torch.rand(1)
train(model, extra)
dist.destroy_process_group()
"""
)

REPLICATED = (
    HEAD
    + MODEL
    + """
dist.init_process_group("gloo")
model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
def extra():
    # Past the group, to what lies below it.
    dist.group.WORLD._get_backend(torch.device("cpu")).allreduce([torch.ones(2)]).wait()
train(model, extra)
dist.destroy_process_group()
"""
)


ALONE = HEAD + MODEL + "train(model, lambda: None)"


def launch(folder: Path, script: str, processes: int, **changes: float) -> Launch:
    folder.mkdir()
    (folder / "train.py").write_text(script)
    return Launch(folder=str(folder), processes=processes, steps=3, **changes)


def test_bytes_and_collectives_are_counted_where_they_are_known(tmp_path: Path) -> None:
    sharded = launch(tmp_path / "sharded", SHARDED, 4)
    replicated = launch(tmp_path / "replicated", REPLICATED, 2)
    outcomes = list(run([sharded, replicated], ("torch",), tmp_path))
    assert all(isinstance(outcome, float) for outcome in outcomes), outcomes

    findings = Outcome(tmp_path / "sharded", 4).findings()
    # Linear(8, 8) has 72 elements, Linear(8, 5) 45 and, padded to six rows, 54; a shard is half, in bytes of four.
    gathers = [["all_gather", [2, 3], 6 * 9 * 4, 1], ["all_gather", [2, 3], 72 * 4, 1]]
    scatters = [["reduce_scatter", [2, 3], 6 * 9 * 4, 1], ["reduce_scatter", [2, 3], 72 * 4, 1]]
    reduces = [["all_reduce", [1, 3], 3 * 9 * 4, 1], ["all_reduce", [1, 3], 36 * 4, 1]]
    planted = [["all_reduce", [0, 1, 2, 3], 24, 1], ["all_reduce", [2, 3], 20, 1], ["broadcast", [0, 1, 2, 3], 7, 1]]
    assert sorted(findings[3]["collectives"]) == sorted([*gathers, *scatters, *reduces, *planted])
    assert [rank["unseen_collectives"] for rank in findings] == [0] * 4
    assert [rank["random_numbers_drawn"] for rank in findings] == [True] * 4
    padded = (36 + 27) * 4
    own = [(36 + rows * 9) * 4 for rows in (3, 2, 3, 2)]
    assert [rank["at_rest"] for rank in findings] == [
        {"parameters": padded, "gradients": padded, "optimizer_states": 2 * moment + 4 * 4} for moment in own
    ]

    findings = Outcome(tmp_path / "replicated", 2).findings()
    assert findings[0]["collectives"] == [["all_reduce", [0, 1], (72 + 45) * 4, 1]]
    assert [rank["unseen_collectives"] for rank in findings] == [1, 1]
    assert [rank["random_numbers_drawn"] for rank in findings] == [False] * 2
    assert findings[0]["at_rest"] == {
        "parameters": 117 * 4,
        "gradients": 117 * 4,
        "optimizer_states": 2 * 117 * 4 + 4 * 4,
    }
    for name in ("sharded", "replicated"):
        outcome = Outcome(tmp_path / name, 2)
        assert {k: tuple(v.shape) for k, v in outcome.weights("final").items()} == {
            "0.weight": (8, 8),
            "0.bias": (8,),
            "1.weight": (5, 8),
            "1.bias": (5,),
        }
        assert not outcome.weights("initial")["0.weight"].equal(outcome.weights("final")["0.weight"])


def test_a_failing_process_is_named_with_its_log(tmp_path: Path) -> None:
    script = HEAD + "print('before')\nif RANK == 1: raise ValueError('the reason')\ntime.sleep(60)"
    started = time.monotonic()
    (outcome,) = run([launch(tmp_path / "a", script, 2)], (), tmp_path)
    assert isinstance(outcome, Failure)
    assert outcome.message == "process 1 of 2 failed with exit code 1"
    assert outcome.log[0] == "before"
    assert outcome.log[-1] == "ValueError: the reason"
    assert time.monotonic() - started < 30


def test_a_killed_process_is_told(tmp_path: Path) -> None:
    (outcome,) = run([launch(tmp_path / "a", HEAD + "os.kill(os.getpid(), 9)", 1)], ("no_such_module",), tmp_path)
    assert isinstance(outcome, Failure)
    assert outcome.message == "process 0 of 1 was killed by SIGKILL"


def alive(folder: Path) -> list[int]:
    """Processes of a launch that still run; their scripts wrote their ids."""
    found = []
    for file in folder.glob("pid-*"):
        try:
            os.kill(int(file.read_text()), 0)
            found.append(int(file.read_text()))
        except ProcessLookupError:
            pass
    return found


WAITING = HEAD + (
    "open(f'{os.path.dirname(__file__)}/pid-{RANK}.new', 'w').write(str(os.getpid()))\n"
    "os.rename(f'{os.path.dirname(__file__)}/pid-{RANK}.new', f'{os.path.dirname(__file__)}/pid-{RANK}')\n"
    "time.sleep(600)"
)


def test_processes_that_do_not_end_are_ended(tmp_path: Path) -> None:
    (outcome,) = run([launch(tmp_path / "a", WAITING, 2, timeout_s=3)], (), tmp_path)
    assert isinstance(outcome, Failure)
    assert "had not ended after 3 s" in outcome.message
    assert len(list((tmp_path / "a").glob("pid-*"))) == 2
    assert alive(tmp_path / "a") == []


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while alive(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(folder) == []


def test_an_interrupted_rehearsal_leaves_no_process(tmp_path: Path) -> None:
    """Whatever ends the loop over the outcomes ends the processes."""
    done, waiting = launch(tmp_path / "a", ALONE, 1), launch(tmp_path / "b", WAITING, 2)
    outcomes = run([done, waiting], (), tmp_path)
    assert isinstance(next(outcomes), float)
    while len(list((tmp_path / "b").glob("pid-*"))) < 2:
        time.sleep(0.05)
    outcomes.close()
    wait_until_gone(tmp_path / "b")


def test_a_killed_rehearsal_leaves_no_process(tmp_path: Path) -> None:
    """Nothing can clean up after SIGKILL, but the processes see that nobody waits for them any more."""
    waiting = launch(tmp_path / "a", WAITING, 2)
    program = f"""
from pathlib import Path
from shardwright.rehearse.launch import Launch, run
list(run([Launch(folder={waiting.folder!r}, processes=2, steps=3)], (), Path({str(tmp_path)!r})))
"""
    rehearsal = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    while len(list((tmp_path / "a").glob("pid-*"))) < 2:
        time.sleep(0.05)
    rehearsal.kill()
    rehearsal.wait()
    wait_until_gone(tmp_path / "a")


def test_a_script_that_stops_early_is_a_failure(tmp_path: Path) -> None:
    (outcome,) = run([launch(tmp_path / "a", HEAD + "print('nothing to do')", 1)], (), tmp_path)
    assert outcome == Failure("process 0 of 1 ended before step 3", ("nothing to do",), process=0)
