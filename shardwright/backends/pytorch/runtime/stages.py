"""Stretches of a user's model, whose forward stays as it is, as stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .absent import Part
from .follow import Route, follow
from .messages import Wire
from .record import Record


class Stage:
    """Segments `first` to `last` of a model.

    Called with a micro-batch and, for each stage that it receives from, in their order, a tuple of tensors; returns a
    tuple of them for each stage that it sends to, in their order; the stage with the head returns the model's output.
    `part` says for the record of a forward which values these are. Between calls it keeps nothing of them.
    """

    def __init__(self, route: Route, part: Callable[[Record], Part]) -> None:
        self.route, self._part_of = route, part
        self._parts: dict[int, Part] = {}

    def __call__(self, batch: Any, *received: Sequence[Tensor]) -> Any:
        """Runs the stage's forward."""
        record = self.route.record()
        part = self._parts.get(id(record))
        if part is None:
            part = self._parts[id(record)] = self._part_of(record)
        return part.run(batch, received)


class Stages:
    """All stages of a model, those of this process ready to run."""

    def __init__(self, route: Route, cuts: Sequence[int], own: Iterable[int]) -> None:
        self.route = route
        self.spans = [
            (first + 1 if stage else 0, last)
            for stage, (first, last) in enumerate(pairwise((0, *cuts, route.segments - 1)))
        ]
        """First and last segment of each stage."""
        self.record = record = route.record()
        for first, _ in self.spans[1:]:
            why = record.refusal(first)
            if why:
                raise RuntimeError(f"the model cannot be cut after {self._name(first - 1)}: {why}")
        self.wires = _wires(record, self._edges(record))
        """By the two stages between which the values go."""
        self.stages = {stage: Stage(route, partial(self._part, stage)) for stage in own}
        users: dict[str, list[int]] = {}
        for stage in range(len(self.spans)):
            for name in self.parameters(stage):
                users.setdefault(name, []).append(stage)
        self.users = {name: tuple(stages) for name, stages in users.items()}
        """The stages that use each parameter; what none uses is missing."""

    def parameters(self, stage: int) -> tuple[str, ...]:
        """Names of the parameters that a stage uses, tied ones under all their names."""
        return self.route.parameters(self.record, *self.spans[stage])

    def _name(self, segment: int) -> str:
        return self.route.blocks[segment - 1] if segment else "the embedding"

    def _edges(self, record: Record) -> dict[tuple[int, int], tuple[int, ...]]:
        """Numbers of the values that go from one stage to another: each comes from where it was last changed."""
        found: dict[tuple[int, int], list[int]] = {}
        for target, (first, last) in enumerate(self.spans):
            for number in record.needed(first, last):
                written = max(segment for segment in record.values[number].writes if segment < first)
                source = next(stage for stage, (_, end) in enumerate(self.spans) if written <= end)
                found.setdefault((source, target), []).append(number)
        return {edge: tuple(found[edge]) for edge in sorted(found)}

    def _part(self, stage: int, record: Record) -> Part:
        edges, (first, last) = self._edges(record), self.spans[stage]
        if _wires(record, edges) != self.wires:
            raise RuntimeError("between the stages other tensors go in evaluation than in training")
        received = {source: numbers for (source, target), numbers in edges.items() if target == stage}
        sent = {target: numbers for (source, target), numbers in edges.items() if source == stage}
        own = range(first, last + 1)
        changed = [number for n in received.values() for number in n if {*own} & {*record.values[number].writes}]
        return Part(
            route=self.route, record=record, first=first, last=last, received=received, sent=sent, changed=changed
        )


def _wires(record: Record, edges: Mapping[tuple[int, int], Sequence[int]]) -> dict[tuple[int, int], tuple[Wire, ...]]:
    return {
        edge: tuple(Wire(record.values[number].shape, record.values[number].dtype) for number in numbers)
        for edge, numbers in edges.items()
    }


def stages_of(
    model: nn.Module,
    blocks: Sequence[str],
    cuts: Sequence[int],
    own: Iterable[int],
    forward: Callable[[nn.Module, Any], Any],
    batch: Any,
    dtype: torch.dtype | None = None,
) -> Stages:
    """Cuts a model into stages; `own` are those of this process.

    `blocks`: paths of the blocks, in the order in which they run. `cuts`: for every stage but the last, the number of
    blocks before its end. `forward` calls the model with a micro-batch, of which `batch` is one, on the device.
    `dtype`: of the parameters in forward; the floating inputs of the model and of its blocks are cast to it, as hooks
    of `ShardedStates` do. Raises RuntimeError where the model cannot be cut.
    """
    if dtype not in (None, torch.float32):
        for module in (model, *(model.get_submodule(path) for path in blocks)):
            module.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True)
    return Stages(follow(model, blocks, forward, batch, dtype), cuts, own)


def _cast_inputs(dtype: torch.dtype, _: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, (args, kwargs))
