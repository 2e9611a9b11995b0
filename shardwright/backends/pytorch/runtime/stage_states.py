"""The model states of the stages of one process: which parameters it has, and what it shares with other processes.

[Note: units of a stage]
The model is built with its parameters on the meta device. Of every own stage, the parameters of each block are a unit
of `ShardedStates`, and what it uses outside its blocks (embedding, head) is one more, its root. A parameter that
several stages of one process use is in the first of these units, and counts as a unit of all of them. What stages of
several processes use (a tied embedding and head) is a unit by itself, cut up alike on each of them: every one has a
copy, their gradients are summed, the first one counts it in the norm and writes it into checkpoints. What nobody uses
belongs to the stage of its block, or to the first one: a checkpoint holds it, too. All else stays on meta. Buffers are
everywhere; what is written of those in a block, or beside parameters, are the values that a stage with these has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from .deferred import WeightQueue, defer_weight_gradients
from .pipeline import Tie
from .stages import Stages
from .states import ShardedStates


class StageStates:
    """The states of the stages of one process; see [Note: units of a stage].

    `ranks`: of every stage, its rank in the pipeline, of which `rank` is this process's.
    """

    def __init__(
        self, model: nn.Module, states: ShardedStates, stages: Stages, ranks: Sequence[int], rank: int
    ) -> None:
        self.model, self.states, self.stages, self.rank, self._ranks = model, states, stages, rank, ranks
        self.queue = WeightQueue()
        """Of all layers whose weight gradients come late."""
        self.blocks = {stage: _blocks(stages, stage) for stage in stages.stages}
        """Paths of the blocks of each own stage."""
        self.units: dict[int, list[int]] = {stage: [] for stage in stages.stages}
        """The units that each own stage uses."""
        names = [name for name, _ in model.named_parameters()]
        self._users = {name: stages.users.get(name) or (_holding(stages, name) or 0,) for name in names}
        self._taken: set[str] = set()
        self._copies: dict[tuple[int, ...], int] = {}
        """By the ranks that have a copy each, the unit here."""

    def take_block(self, path: str) -> None:
        """Takes over the parameters of a block of an own stage, which have memory by now."""
        inside = {id(parameter) for parameter in self.model.get_submodule(path).parameters()}
        self._take(name for name, each in self.model.named_parameters() if id(each) in inside and self._alone(name))

    def take_rest(self, device: torch.device) -> None:
        """Takes over what own stages use outside their blocks, on the device; of all others the memory goes."""
        for name, parameter in list(self.model.named_parameters()):
            if name not in self._taken:
                self._move(name, parameter, device)
        for stage in self.units:
            self._take(name for name, users in self._users.items() if stage in users and self._alone(name))
        for name, buffer in self.model.named_buffers():
            if (owners := self._owners(name)) is not None:
                self.states.buffers[buffer] = self.rank == owners[0]
        for ranks in self._together():
            if self.rank in ranks:
                shared = [name for name in self._users if self._on(name) == ranks]
                self._copies[ranks] = self._take(shared, copy=self.rank != ranks[0])

    def defer_weight_gradients(self) -> None:
        """Makes the linear layers whose weights own stages use put their weight gradients into the queue."""
        for module in list(self.model.modules()):
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and not weight.is_meta and not list(module.children()):
                defer_weight_gradients(module, self.queue)

    def ties(self, copies: int) -> list[Tie]:
        """Whose gradients to sum. All processes must call it; `copies` train the same stages, next to each other."""
        made = []
        for ranks in self._together():
            for copy in range(copies):
                group = dist.new_group([rank * copies + copy for rank in ranks])
                if self.rank in ranks and dist.get_rank() % copies == copy:
                    made.append(Tie(self.states.parameters(self._copies[ranks]), group))
        return made

    def _take(self, names: Iterable[str], *, copy: bool = False) -> int:
        own = [name for name in names if name not in self._taken]
        self._taken.update(own)
        unit = self.states.take([self.model.get_parameter(name) for name in own], copy=copy)
        for stage, units in self.units.items():
            if any(stage in self._users[name] for name in own):
                units.append(unit)
        return unit

    def _move(self, name: str, parameter: nn.Parameter, device: torch.device) -> None:
        """A parameter that is not taken yet: to the device if an own stage uses it, else to meta."""
        if self.rank not in self._on(name):
            # In the dtype of forward, which a stage may ask for without reading values.
            dtype = self.states.dtype if parameter.is_floating_point() else parameter.dtype
            absent = nn.Parameter(parameter.detach().to("meta", dtype), requires_grad=parameter.requires_grad)
            _replace(self.model, parameter, absent)
        elif parameter.is_meta:
            raise RuntimeError(f"a stage here uses {name}, which belongs to a block of another stage")
        else:
            parameter.data = parameter.data.to(device)

    def _owners(self, buffer: str) -> tuple[int, ...] | None:
        """The ranks that may change a buffer; None where nothing tells one from another."""
        stage, path = _holding(self.stages, buffer), buffer.rpartition(".")[0]
        if stage is not None:
            return (self._ranks[stage],)
        beside = (f"{path}.{name}" for name, _ in self.model.get_submodule(path).named_parameters(recurse=False))
        return next((self._on(name) for name in beside if name in self._users), None)

    def _on(self, name: str) -> tuple[int, ...]:
        """The ranks that have a parameter."""
        return tuple(sorted({self._ranks[stage] for stage in self._users[name]}))

    def _alone(self, name: str) -> bool:
        return self._on(name) == (self.rank,)

    def _together(self) -> list[tuple[int, ...]]:
        """The sets of several ranks that have parameters in common, in an order that is the same on all."""
        return sorted({ranks for name in self._users if len(ranks := self._on(name)) > 1})


def _blocks(stages: Stages, stage: int) -> tuple[str, ...]:
    """Paths of a stage's blocks: segment 0 is the embedding, segment k the k-th block."""
    first, last = stages.spans[stage]
    return stages.route.blocks[max(first, 1) - 1 : last]


def _holding(stages: Stages, name: str) -> int | None:
    """The stage with the block in which a parameter or buffer of this name lies; None outside the blocks."""
    numbers = range(len(stages.spans))
    return next((at for at in numbers if any(name.startswith(f"{path}.") for path in _blocks(stages, at))), None)


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(module, name, new)
