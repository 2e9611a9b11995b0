"""One of several processes that save, load and go on with a small model under many layouts, one after another.

Started with the usual variables and the path of a JSON list of jobs. A job is a `layout` and a `task`: `save` trains it
from the start, with a checkpoint on the way and one at the end; `load` gives it every checkpoint of `from`, checks all
that it then holds, and trains some of them (`goes_on`) to the end; `weights` loads a folder of safetensors. What was
found goes to `found-WORLD-RANK.json` beside the list, a line a job.
"""

from __future__ import annotations

import json
import re
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import read_checkpoint
from safetensors.torch import load_file
from states_checkpoint_model import (
    BLOCKS,
    CPU,
    END,
    OPTIONS,
    ROWS,
    SAVED_AT,
    SEED,
    Model,
    groups_of,
    initial_model,
    make_optimizer,
    row_loss,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardwright.backends.pytorch.runtime import weights
from shardwright.backends.pytorch.runtime.checkpoint import Checkpoints, TrainState, model_tensors, state_tensors
from shardwright.backends.pytorch.runtime.held import STOCK, Held, Holder
from shardwright.backends.pytorch.runtime.held_flat import FlatHolder
from shardwright.backends.pytorch.runtime.initialize import allocate, initialize, parameters_on_meta
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates
from shardwright.backends.pytorch.runtime.tensorfile import TensorFile


class Trainee:
    """A model under a layout, with its optimizer. `initialized`: with values, else only with memory for them."""

    def __init__(self, layout: dict[str, Any], *, initialized: bool) -> None:
        self.bf16 = layout["dtype"] == "bfloat16"
        self.holder: Holder = STOCK
        self.states: ShardedStates | None = None
        with parameters_on_meta():
            self.model = Model()
        self.called: nn.Module = self.model
        # FSDP2 and DDP average over the processes.
        self.scale = 1 if layout["engine"] == "amsp" else dist.get_world_size()
        getattr(self, f"_{layout['engine']}")(layout, initialized)
        groups = groups_of(self.model) if self.states is None else self.states.parameter_groups(OPTIONS)
        self.optimizer = make_optimizer(layout["optimizer"], groups)

    def _fill(self, path: str, initialized: bool) -> nn.Module:
        if initialized:
            initialize(self.model, path, seed=SEED, device=CPU)
        else:
            allocate(self.model.get_submodule(path), CPU)
        return self.model.get_submodule(path)

    def _amsp(self, layout: dict[str, Any], initialized: bool) -> None:
        p, g, o, second = layout["degrees"]
        levels = Levels(
            mesh_of(tuple(layout["sizes"])), parameters=p, gradients=g, optimizer_states=o, secondary=second
        )
        self.states = ShardedStates(levels, getattr(torch, layout["dtype"]))
        for index in range(BLOCKS):
            self.states.shard(self._fill(f"blocks.{index}", initialized))
        self.states.shard(self._fill("", initialized), root=True)
        self.holder = FlatHolder(self.states)

    def _fsdp2(self, layout: dict[str, Any], initialized: bool) -> None:
        mesh = mesh_of(tuple(layout["sizes"]))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.bf16 else MixedPrecisionPolicy()
        for index in range(BLOCKS):
            block = self._fill(f"blocks.{index}", True) if initialized else self.model.blocks[index]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        if initialized:
            self._fill("", True)
        fully_shard(self.model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        if not initialized:
            allocate(self.model, CPU)

    def _ddp(self, layout: dict[str, Any], initialized: bool) -> None:
        for path in (*(f"blocks.{index}" for index in range(BLOCKS)), ""):
            self._fill(path, initialized)
        self.called = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def train(self, first: int) -> None:
        """From a step to the end, or to where a checkpoint is saved."""
        for step in range(first, END if first else SAVED_AT):
            own = range(dist.get_rank(), ROWS, dist.get_world_size())
            for row in own:
                loss = row_loss(self.called, step, row) * self.scale
                if self.states is None:
                    torch.autograd.backward(loss)
                else:
                    self.states.backward(loss, last=row == own[-1])
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.states is not None:
                self.states.publish()
            self.model.get_buffer("seen").fill_(step + 1)

    def tensors(self) -> dict[str, Held]:
        """All that a checkpoint holds, as far as it is here."""
        states = state_tensors(self.model, self.holder.states(self.optimizer))
        return model_tensors(self.model, self.holder) | states

    def off(self, expected: dict[str, Tensor]) -> float:
        """The largest difference of what is here from whole tensors; infinite where NaNs are."""
        worst = 0.0
        for name, held in self.tensors().items():
            for box, values in held.parts:
                wanted = expected[name][tuple(map(slice, box.start, box.stop))]
                difference = float((values - wanted).abs().max()) if values.numel() else 0.0
                worst = max(worst, difference if difference == difference else float("inf"))
        return worst

    def computes_with(self, expected: dict[str, Tensor]) -> bool:
        """Whether the parameters that forward sees are the expected ones, rounded if they are here."""
        if self.states is None:
            return True
        with self.states.gathered():
            return all(
                torch.equal(parameter, expected[f"model.{name}"].to(parameter.dtype))
                for name, parameter in self.model.named_parameters()
            )


@cache
def mesh_of(sizes: tuple[int, ...]) -> Any:
    """Of axes given the fastest first."""
    names = tuple(f"dp_{index}" for index in range(len(sizes), 0, -1))
    return init_device_mesh("cpu", tuple(reversed(sizes)), mesh_dim_names=names)


@cache
def stored(folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(folder)


def save(job: dict[str, Any], root: Path) -> dict[str, Any]:
    trainee = Trainee(job["layout"], initialized=True)
    start = {f"model.{name}": value.detach() for name, value in initial_model().named_parameters()}
    off = trainee.off({**start, "buffer.seen": torch.zeros(3)})
    trainee.train(0)
    folder = root / job["layout"]["name"]
    Checkpoints(folder / "at", 1, trainee.holder).save(TrainState(SAVED_AT, 1, SEED), trainee.model, trainee.optimizer)
    trainee.train(SAVED_AT)
    Checkpoints(folder / "end", 1, trainee.holder).save(TrainState(END, 2, SEED), trainee.model, trainee.optimizer)
    return {"start": off}


def load(job: dict[str, Any], root: Path) -> dict[str, Any]:
    trainee, found = Trainee(job["layout"], initialized=False), {}
    for name in job["from"]:
        checkpoints = Checkpoints(root / name / "at", 1, trainee.holder)
        state = checkpoints.load(trainee.model, trainee.optimizer, seed=SEED)
        assert state == TrainState(SAVED_AT, 1, SEED)
        expected = stored(root / name / "at")
        result: dict[str, Any] = {"loaded": trainee.off(expected), "computes": trainee.computes_with(expected)}
        if name in job["goes_on"]:
            trainee.train(SAVED_AT)
            result["end"] = trainee.off(stored(root / name / "end"))
        found[name] = result
    again = Checkpoints(root / job["again"] / "at", 1, trainee.holder)
    again.load(trainee.model, trainee.optimizer, seed=SEED)
    copy = Checkpoints(root / f"{job['layout']['name']}, copied", 1, trainee.holder)
    copy.save(TrainState(SAVED_AT, 1, SEED), trainee.model, trainee.optimizer)
    return found


def load_weights(job: dict[str, Any], root: Path) -> dict[str, Any]:
    trainee, read = Trainee(job["layout"], initialized=False), 0
    rows, most = TensorFile.rows, weights.READ_BYTES

    def counting(*arguments: Any) -> Tensor:
        nonlocal read
        values = rows(*arguments)
        assert values.nbytes <= 100
        read += values.nbytes
        return values

    TensorFile.rows, weights.READ_BYTES = counting, 100  # type: ignore[method-assign]
    weights.load_weights(trainee.model, root / "weights", holder=trainee.holder)
    TensorFile.rows, weights.READ_BYTES = rows, most  # type: ignore[method-assign]
    whole = load_file(root / "weights" / "model.safetensors")
    expected = {f"{'buffer' if name == 'seen' else 'model'}.{name}": value for name, value in whole.items()}
    own = sum(values.numel() for held in trainee.tensors().values() for _, values in held.parts)
    return {
        "loaded": trainee.off(expected),
        "computes": trainee.computes_with(expected),
        "read": read,
        "own": 4 * own,
    }


TASKS = {"save": save, "load": load, "weights": load_weights}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    spec = Path(sys.argv[1])
    found = []
    for job in json.loads(spec.read_text()):
        began = time.perf_counter()
        found.append({"name": job["layout"]["name"], **job, "found": TASKS[job["task"]](job, spec.parent)})
        found[-1]["seconds"] = time.perf_counter() - began
    place = re.sub("runs", "found", spec.stem)
    spec.with_name(f"{place}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
