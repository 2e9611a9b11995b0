"""Bytes that each engine holds for parameters and gradients beside the shards, at every moment of a step.

[Note: micro-batches]
Of several micro-batches of a step, the first finds no gradients and nothing gathered; in the last, kept parameters are
freed block by block and everything is reduced; in those between, all that accumulates and all that is kept is alive.

[Note: what DistributedDataParallel holds]
The buckets, from construction on. A gradient is made beside its bucket and becomes a view of it when its reduction is
due; so while micro-batches accumulate under `no_sync`, a whole second set of gradients is alive.
"""

from __future__ import annotations

from typing import Protocol

from shardwright.planner.activations import Moment, MomentName
from shardwright.planner.engines import ENGINES
from shardwright.planner.flat_holdings import FlatHoldings
from shardwright.planner.fsdp2_holdings import Fsdp2Holdings, prefix
from shardwright.planner.groups import Groups, Sizes
from shardwright.planner.parts import parts_of
from shardwright.planner.precisions import MASTER_BYTES
from shardwright.planner.space import Point


class Holdings(Protocol):
    """What an engine holds at a point in one micro-batch."""

    def at(self, moment: Moment) -> dict[str, int] | None:
        """Bytes of `gathered_parameters`, `gradients` and `communication_buffers`; None where the engine has no such
        moment."""


def holdings(point: Point, groups: Groups) -> tuple[Holdings, ...]:
    """The holdings of the point's engine in each kind of micro-batch. The micro-batch's size and checkpointing make no
    difference to them, nor do more than three micro-batches."""
    numbers = sorted({0, min(1, point.accumulation - 1), point.accumulation - 1})
    if not ENGINES[point.engine].shards:
        return (_in_micro_batch(point, groups, 0),)
    return tuple(_in_micro_batch(point, groups, number) for number in numbers)


def last_holdings(point: Point, groups: Groups) -> Holdings:
    """The holdings in the last micro-batch of a step."""
    return _in_micro_batch(point, groups, point.accumulation - 1)


def _in_micro_batch(point: Point, groups: Groups, number: int) -> Holdings:
    if point.parallel.ep > 1:
        return _WithExperts(point, groups, number)
    if ENGINES[point.engine].flat:
        return FlatHoldings(point, groups, number)
    sizes = groups.sizes(point.shard)
    return Fsdp2Holdings(point, sizes, number) if ENGINES[point.engine].shards else _Replicated(point, sizes, groups)


class _WithExperts:
    """Experts beside the other parameters ([Note: states of experts] in parts.py), each as if the others had none.

    What is worst for the one need not come at the same time as what is worst for the other: where things move this is
    not exact, but meant never to be too little.
    """

    def __init__(self, point: Point, groups: Groups, number: int) -> None:
        dense, experts = parts_of(point)
        of_dense, of_experts = dense.groups(groups), experts.groups(groups)
        sizes = [part.groups(groups).sizes(part.point.shard) for part in (dense, experts)]
        if ENGINES[point.engine].flat:
            largest, layout = groups.sizes(1).block_largest, dense.point.chain
            self._dense: Holdings = FlatHoldings(dense.point, of_dense, number, largest=largest)
            self._experts: FlatHoldings | Fsdp2Holdings = FlatHoldings(
                experts.point, of_experts, number, largest=(0,) * len(largest), ahead_of=layout
            )
        else:
            self._dense = Fsdp2Holdings(dense.point, sizes[0], number, followed=sizes[1].blocks)
            self._experts = Fsdp2Holdings(experts.point, sizes[1], number, nested=True)

    def at(self, moment: Moment) -> dict[str, int] | None:
        """Moments of the experts alone come within those of their blocks."""
        held = self._dense.at(moment)
        if held is None:
            return None
        beside = self._experts.beside(moment)
        return {name: size + beside[name] for name, size in held.items()}


class _Replicated:
    """`single`, and `ddp` ([Note: what DistributedDataParallel holds])."""

    def __init__(self, point: Point, sizes: Sizes, groups: Groups) -> None:
        self._sizes = sizes
        self._blocks = prefix(MASTER_BYTES * size for size in sizes.block_numels)
        self._head = MASTER_BYTES * sizes.head_numel
        self._everything = self._blocks[-1] + MASTER_BYTES * sizes.root_numel
        self._buckets = self._everything if point.world > 1 else 0
        self._carried = self._everything if point.accumulation > 1 else 0
        self._newest = MASTER_BYTES * groups.largest_parameter if self._buckets or self._carried else None

    def at(self, moment: Moment) -> dict[str, int] | None:
        if moment.name in _SHARDED_ONLY:
            return None
        return {"gradients": self._carried + self._new(moment), "communication_buffers": self._buckets}

    def _new(self, moment: Moment) -> int:
        """Gradients made in this micro-batch: one at a time where an older one takes it in, else all so far."""
        if "backward" not in moment.name:
            return 0
        before, every = self._made(moment)
        own = every if moment.gradients is None else moment.gradients
        if self._newest is not None:
            return self._newest if own else 0
        return min(before + MASTER_BYTES * own, self._everything)

    def _made(self, moment: Moment) -> tuple[int, int]:
        """Bytes of gradients before the unit's backward, and how many elements its own are."""
        if moment.name == "block backward":
            after = self._blocks[-1] - self._blocks[moment.block + 1]
            return self._head + after, self._sizes.block_numels[moment.block]
        if moment.name == "embedding backward":
            return self._head + self._blocks[-1], self._sizes.embedding_numel
        return 0, self._sizes.head_numel


_SHARDED_ONLY: frozenset[MomentName] = frozenset(
    (
        "root gather",
        "block gather",
        "second copy",
        "backward gather",
        "gradient reduction",
        "root gradient reduction",
    )
)
