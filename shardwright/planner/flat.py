"""Flat buckets over nested levels: what the runtime's `ShardedStates` holds and sends, exactly.

[Note: flat buckets]
The trainable parameters of a group (a block, or all outside the blocks) lie side by side in one buffer, its frozen ones
in another, each padded so that ALIGNMENT elements times the optimizer's degree (for frozen ones the parameters') divide
it. Level j of the buffer is divided over the first j axes of the mesh, fastest first. Parameters rest at level p,
gradients accumulate at level g in fp32, the optimizer works on fp32 values at level o. In fp32 these are a part of the
parameters at rest; otherwise they are a copy. (AMSP, arXiv 2311.00257, section 3: shard factors of parameters,
gradients and optimizer states, independent of each other but for s_os >= s_g, s_p.)

[Note: chains over levels]
Parameters come from level p to the whole by one all-gather an axis, the slowest axis first; gradients go from the whole
to level g by one reduce-scatter an axis, the fastest first, in every micro-batch; on the last one on to level o, and
then through one all-reduce for each further axis. After the optimizer's step the new values go from level o to p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple

from shardwright.planner.precisions import MASTER_BYTES
from shardwright.schemas.profile import Parameter

ALIGNMENT = 8
"""Elements: `_ALIGNMENT` of the runtime."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Axes of the mesh, and the level that each state lies at."""

    sizes: tuple[int, ...]
    """Of the axes, fastest first; each above 1."""
    parameters: int
    gradients: int
    optimizer_states: int
    secondary: int
    """Level of the second copy of the parameters for backward; `parameters` where there is none."""

    def degree(self, level: int) -> int:
        """Devices that a buffer at a level is divided over."""
        return prod(self.sizes[:level])


def chain(world: int, parameters: int, gradients: int, optimizer_states: int, secondary: int | None = None) -> Chain:
    """The axes between the degrees, and between the widest and the world. Raises ValueError for degrees that do not
    divide each other, or parameters or gradients wider than the optimizer states."""
    second = parameters if secondary is None else secondary
    if max(parameters, gradients) > optimizer_states or second > parameters:
        raise ValueError("optimizer states must be sharded at least as wide as parameters and gradients")
    ends = sorted({1, parameters, gradients, optimizer_states, second, world})
    if any(wide % narrow for narrow, wide in pairwise(ends)):
        raise ValueError(f"the shard degrees {ends} do not divide each other")
    level = {degree: index for index, degree in enumerate(ends)}
    sizes = tuple(wide // narrow for narrow, wide in pairwise(ends))
    return Chain(sizes, level[parameters], level[gradients], level[optimizer_states], level[second])


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of one bucket in elements."""

    numel: int
    padded: int
    decaying: int
    """Of the parameters with weight decay, which lie first."""
    trainable: bool

    def own(self, layout: Chain, rank: int) -> tuple[int, int]:
        """Elements with weight decay and without that the optimizer of a rank works on."""
        size, begin = self.padded, 0
        for parts in layout.sizes[: layout.optimizer_states]:
            rank, place = divmod(rank, parts)
            size //= parts
            begin += place * size
        boundary, end = self.decaying, begin + size

        def part(first: int, last: int) -> int:
            return max(0, min(last, end) - max(first, begin))

        return part(0, boundary), part(boundary, self.numel)


def buckets(group: Sequence[Parameter], layout: Chain) -> tuple[Bucket, ...]:
    """The buckets of one group: of its trainable parameters, then of its frozen ones, as far as there are any."""
    made = []
    for trainable in (True, False):
        members = [parameter for parameter in group if parameter.trainable is trainable]
        if members:
            numel = sum(parameter.numel for parameter in members)
            level = layout.optimizer_states if trainable else layout.parameters
            quantum = ALIGNMENT * layout.degree(level)
            decaying = sum(parameter.numel for parameter in members if len(parameter.shape) >= 2)
            made.append(Bucket(numel, -(-numel // quantum) * quantum, decaying, trainable))
    return tuple(made)


class Send(NamedTuple):
    """A collective over one axis of the mesh."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce"]
    axis: int
    """Fastest first."""
    bytes: int
    """Of the whole tensor: what is gathered, what enters a reduction."""


def step_sends(
    layout: Chain, groups: Sequence[Sequence[Bucket]], *, element: int, accumulation: int, kept: bool
) -> Counter[Send]:
    """Every collective of parameters, gradients and the gradient norm in one optimizer step of one rank.

    `groups` are the buckets of each block, the root's last; `element` is the bytes of a gathered element; `kept` says
    whether parameters stay gathered from the first forward to the last backward ([Note: chains over levels]).
    """
    sends: Counter[Send] = Counter()

    def gather(bucket: Bucket, level: int, to: int, times: int) -> None:
        for axis in range(level - 1, to - 1, -1):
            sends[Send("all_gather", axis, element * bucket.padded // layout.degree(axis))] += times

    def reduce(bucket: Bucket, level: int, to: int, times: int) -> None:
        for axis in range(level, to):
            sends[Send("reduce_scatter", axis, MASTER_BYTES * bucket.padded // layout.degree(axis))] += times

    for index, group in enumerate(groups):
        is_root = index == len(groups) - 1
        for bucket in group:
            gather(bucket, layout.parameters, 0, 1 if kept else accumulation)
            if not kept and not is_root:
                gather(bucket, layout.secondary, 0, accumulation)
            if bucket.trainable:
                reduce(bucket, 0, layout.gradients, accumulation)
                reduce(bucket, layout.gradients, layout.optimizer_states, 1)
                for axis in range(layout.optimizer_states, len(layout.sizes)):
                    rest = MASTER_BYTES * bucket.padded // layout.degree(layout.optimizer_states)
                    sends[Send("all_reduce", axis, rest)] += 1
                gather(bucket, layout.optimizer_states, layout.parameters, 1)
    for axis in range(layout.optimizer_states):
        sends[Send("all_reduce", axis, MASTER_BYTES)] += 1
    return sends
