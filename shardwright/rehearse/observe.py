"""What is measured inside each process of a rehearsal, around an emitted script that knows nothing of it.

torch's public global hooks give the moments: `register_module_forward_pre_hook` the first module called, which is the
whole model, and `register_optimizer_step_pre_hook` and `..._post_hook` the optimizer before and after each step. What
lies between the ends of two neighbouring steps is one whole step, wherever the script starts its own count. Of a script
with `ShardedStates` the object itself is looked for: parameters are views that are empty between their uses. Of one
with a pipeline the `Pipeline` is, which tells each step of its program, and the `StageStates`, for the first module
called there is a copy without values.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from shardwright.rehearse.collectives import CollectiveLog
from shardwright.rehearse.draws import Draws

ACTIONS = ("F", "I", "W", "B")
"""Steps of a pipeline's program that compute; see `Pipeline`."""


class Observer:
    """Watches one process; `save` writes what it saw in the last step, `weights` before the first and after it.

    The last step is a steady one: DistributedDataParallel regroups its buckets, and broadcasts them, in the second.
    """

    def __init__(self, collectives: CollectiveLog, steps: int, rank: int, folder: Path) -> None:
        self._collectives = collectives
        self._steps = steps
        self._rank = rank
        self._folder = folder
        self._step = 0
        self._model: nn.Module | None = None
        self._sharded: Any = None
        """Its `ShardedStates`, if it has such."""
        self._actions: list[tuple[str, int, int]] = []
        """Of a pipeline's stages, since the last step: kind, stage, micro-batch."""
        self._initial: dict[str, Tensor] = {}
        self._moved: list[float] = []
        """How far from the initial ones the weights were after each step; of one process alone."""
        self._draws = Draws()
        self._handle = register_module_forward_pre_hook(self._first_forward)
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)

    def _first_forward(self, module: nn.Module, inputs: Any) -> None:
        self._model = module.module if isinstance(module, DistributedDataParallel) else module
        self._handle.remove()
        self._draws.watch()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._step == 0:
            self._sharded = found("states", "ShardedStates")
            self._follow_pipeline()
            self._save_weights("initial")
        self._draws.check()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._step += 1
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self._moved.append(distance(self._initial, self._whole()))
        if self._step == self._steps:
            self._save_findings(optimizer)
            self._save_weights("final")
        self._draws.accept()
        self._collectives.clear()
        self._actions.clear()

    def _follow_pipeline(self) -> None:
        placed, pipeline = found("stage_states", "StageStates"), found("pipeline", "Pipeline")
        if pipeline is not None:
            self._model, pipeline.observe = placed.model, self._after_action

    def _after_action(self, step: tuple[str, int, int, int]) -> None:
        kind, stage, micro_batch, _ = step
        if kind.startswith("SEND"):
            self._collectives.join_sends()
        elif kind in ACTIONS:
            self._actions.append((kind, stage, micro_batch))
        # The next forward seeds the generator again.
        self._draws.check()

    def _save_findings(self, optimizer: Optimizer) -> None:
        findings = {
            "at_rest": at_rest([value for _, value in self._named_parameters()], optimizer, self._sharded),
            "collectives": [[*call, count] for call, count in sorted(self._collectives.calls.items())],
            "unseen_collectives": self._collectives.unseen,
            "random_numbers_drawn": self._draws.drawn,
            "actions": self._actions,
            "moved": self._moved,
        }
        (self._folder / f"rank-{self._rank}.json").write_text(json.dumps(findings), encoding="utf-8")

    def _save_weights(self, when: str) -> None:
        """Whole tensors by name; every process takes part, because sharded ones are gathered."""
        whole = self._whole()
        if when == "initial":
            self._initial = whole
        if self._rank == 0:
            torch.save(whole, self._folder / f"{when}.pt")

    def _whole(self) -> dict[str, Tensor]:
        return whole_values(dict(self._named_parameters()), self._sharded, found("divided_holder", "DividedHolder"))

    def _named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        assert self._model is not None, "the optimizer stepped before any module was called"
        return self._model.named_parameters()


def found(module: str, name: str) -> Any:
    """The object of this class of the runtime that this process has, or None."""
    loaded = sys.modules.get(f"shardwright_runtime.{module}")
    made = () if loaded is None else (each for each in gc.get_objects() if type(each) is getattr(loaded, name))
    return next(iter(made), None)


def whole_values(parameters: Mapping[str, Tensor], sharded: Any, divided: Any = None) -> dict[str, Tensor]:
    """Whole tensors by name; of `ShardedStates` the fp32 values, which are what a checkpoint holds. `divided`: the
    `DividedHolder`, which knows where the parts of divided layers and stacks of experts are, if there is one."""
    if sharded is None and divided is None:
        return {name: _whole(parameter) for name, parameter in parameters.items()}
    holder, whole = divided or sys.modules["shardwright_runtime.held_flat"].FlatHolder(sharded), {}
    for name, parameter in parameters.items():
        held = holder.held(parameter)
        whole[name] = torch.zeros(held.shape, dtype=held.dtype)
        for box, values in held.parts if held.replica[0] == 0 and held.written else ():
            whole[name][tuple(map(slice, box.start, box.stop))] = values.detach()
        dist.all_reduce(whole[name])  # each element is in one process
    return whole


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Between two sets of weights, as one vector each (L2)."""
    return math.hypot(*(float((other[name] - value).double().norm()) for name, value in one.items()))


def at_rest(parameters: Sequence[Tensor], optimizer: Optimizer, sharded: Any) -> dict[str, int]:
    """Bytes of the distinct storages of this process by model state, while the optimizer's step ends.

    The fp32 values of `ShardedStates` count as optimizer states where parameters rest in fewer bits.
    """
    parameters = [parameter for parameter in parameters if not parameter.is_meta]  # those of other stages
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    resting = [*parameters, *own]
    if sharded is not None:
        buckets = [bucket for unit in sharded.units for bucket in unit]
        kept = [(bucket.whole, bucket.shard, bucket.secondary) for bucket in buckets]
        resting = [each for tensors in kept for each in tensors if each is not None]
        states += [bucket.master for bucket in buckets]
    parts = {
        "parameters": _storages(resting),
        "gradients": _storages(p.grad for p in [*parameters, *own] if p.grad is not None),
        "optimizer_states": _storages(states),
    }
    for pointer in parts["parameters"]:
        parts["optimizer_states"].pop(pointer, None)
    return {state: sum(storages.values()) for state, storages in parts.items()}


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage."""
    storages = [_local(tensor).untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
