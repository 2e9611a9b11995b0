"""Flat buckets over nested levels: what the runtime's `ShardedStates` holds and sends, exactly.

[Note: flat buckets]
The trainable parameters of a group (a block, or all outside the blocks) lie side by side in one buffer, its frozen ones
in another, each padded so that the alignment times the optimizer's degree divides it. Level j of the buffer is
divided over the first j axes of the mesh, fastest first. Parameters rest at level p, gradients accumulate at level g in
fp32, the optimizer works on fp32 values at level o. In fp32 these are a part of the parameters at rest; otherwise they
are a copy, which frozen parameters have too, for checkpoints. (AMSP, arXiv 2311.00257, section 3: shard factors of
parameters, gradients and optimizer states, independent of each other but for s_os >= s_g, s_p.)

[Note: chains over levels]
Parameters come from level p to the whole by one all-gather an axis, the slowest axis first; gradients go from the whole
to level g by one reduce-scatter an axis, the fastest first, in every micro-batch; on the last one on to level o, and
then through one all-reduce for each further axis. After the optimizer's step the new values go from level o to p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import Literal, NamedTuple

from shardwright.planner.precisions import MASTER_BYTES
from shardwright.planner.quantized import message_bytes
from shardwright.planner.recipe import kind_of
from shardwright.schemas.job import OptimizerSpec
from shardwright.schemas.profile import Parameter

ALIGNMENT = 8
"""Elements: `_ALIGNMENT` of the runtime, for where nothing travels in fewer bits."""
PLAIN = OptimizerSpec()
"""Two kinds of parameters: with weight decay, and without."""


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
    alignment: int = ALIGNMENT
    """Every slice is a multiple of so many elements."""

    @classmethod
    def of(
        cls,
        sizes: tuple[int, ...],
        parameters: int,
        gradients: int,
        optimizer_states: int,
        secondary: int | None = None,
        *,
        alignment: int = ALIGNMENT,
    ) -> Chain:
        """The levels of these degrees on given axes. Raises ValueError for a degree that is no product of the first
        axes, or parameters or gradients wider than the optimizer states."""
        second = parameters if secondary is None else secondary
        if max(parameters, gradients) > optimizer_states or second > parameters:
            raise ValueError("optimizer states must be sharded at least as wide as parameters and gradients")
        level = {degree: index for index, degree in enumerate(accumulate(sizes, mul, initial=1))}
        degrees = (parameters, gradients, optimizer_states, second)
        if any(degree not in level for degree in degrees):
            raise ValueError(f"one of the shard degrees {degrees} is no product of the first of the axes {sizes}")
        p, g, o, again = (level[degree] for degree in degrees)
        return cls(sizes, p, g, o, again, alignment)

    def degree(self, level: int) -> int:
        """Devices that a buffer at a level is divided over."""
        return prod(self.sizes[:level])


def chain(world: int, parameters: int, gradients: int, optimizer_states: int, secondary: int | None = None) -> Chain:
    """On the fewest axes: those between the degrees, and between the widest and the world. Raises ValueError for
    degrees that do not divide each other, or parameters or gradients wider than the optimizer states."""
    ends = sorted({1, parameters, gradients, optimizer_states, secondary or 1, world})
    if any(wide % narrow for narrow, wide in pairwise(ends)):
        raise ValueError(f"the shard degrees {ends} do not divide each other")
    sizes = tuple(wide // narrow for narrow, wide in pairwise(ends))
    return Chain.of(sizes, parameters, gradients, optimizer_states, secondary)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of one bucket in elements."""

    numel: int
    padded: int
    kinds: tuple[int, ...]
    """Of the parameters of each kind (planner/recipe.py), which lie side by side; kinds without any are left out."""
    trainable: bool

    def own(self, layout: Chain, rank: int) -> tuple[int, ...]:
        """Elements of each kind that the optimizer of a rank works on; zeros where it has none of a kind."""
        size, begin = self.padded, 0
        for parts in layout.sizes[: layout.optimizer_states]:
            rank, place = divmod(rank, parts)
            size //= parts
            begin += place * size
        ends = (0, *accumulate(self.kinds))
        return tuple(max(0, min(last, begin + size) - max(first, begin)) for first, last in pairwise(ends))


def buckets(group: Sequence[Parameter], layout: Chain, optimizer: OptimizerSpec = PLAIN) -> tuple[Bucket, ...]:
    """The buckets of one group: of its trainable parameters, then of its frozen ones, as far as there are any.

    `optimizer` says which parameters are of one kind, nothing else.
    """
    quantum = layout.alignment * layout.degree(layout.optimizer_states)
    made = []
    for trainable in (True, False):
        kinds: Counter[int] = Counter()
        for parameter in group:
            if parameter.trainable is trainable:
                kinds[kind_of(optimizer, parameter)] += parameter.numel
        if kinds:
            sizes = tuple(kinds[kind] for kind in sorted(kinds))
            made.append(Bucket(sum(sizes), -(-sum(sizes) // quantum) * quantum, sizes, trainable))
    return tuple(made)


def trained_elements(unit: Iterable[Bucket]) -> int:
    """Of the buckets of a unit that are trained, padding included."""
    return sum(bucket.padded for bucket in unit if bucket.trainable)


@dataclass(frozen=True, slots=True)
class FlatAtRest:
    """Bytes that one rank holds after the optimizer's step, before gradients are dropped."""

    parameters: int
    """At level p, in the compute dtype."""
    master: int
    """float32 values at level o; none where the parameters are float32 themselves."""
    gradients: int
    """float32, at level o; a rank whose part of a bucket is padding alone drops it."""
    own: int
    """Elements that the optimizer works on, without padding."""
    tensors: int
    """In which they are: one for each kind of each bucket."""


def at_rest(layout: Chain, groups: Iterable[Sequence[Bucket]], element: int, rank: int) -> FlatAtRest:
    """What a rank holds of these buckets with parameters of `element` bytes ([Note: flat buckets])."""
    every = Counter(bucket for group in groups for bucket in group)
    widest = layout.degree(layout.optimizer_states)
    padded = sum(count * bucket.padded for bucket, count in every.items())
    owned = [(bucket, count, bucket.own(layout, rank)) for bucket, count in every.items() if bucket.trainable]
    return FlatAtRest(
        parameters=element * padded // layout.degree(layout.parameters),
        master=0 if element == MASTER_BYTES else MASTER_BYTES * padded // widest,
        gradients=sum(count * MASTER_BYTES * bucket.padded // widest for bucket, count, own in owned if any(own)),
        own=sum(count * sum(own) for _, count, own in owned),
        tensors=sum(count * sum(size > 0 for size in own) for _, count, own in owned),
    )


class Send(NamedTuple):
    """A collective over one axis of the mesh."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
    axis: int
    """Fastest first."""
    bytes: int
    """Of the whole tensor: what is gathered, what enters a reduction or an exchange."""
    purpose: Literal["parameters", "gradients", "grad_norm"]


def gather_sends(
    bucket: Bucket, layout: Chain, start: int, to: int, element: int, int8: Collection[int] = ()
) -> Iterator[Send]:
    """From level `start` to level `to`: the slowest axis first."""
    for axis in range(start - 1, to - 1, -1):
        elements = bucket.padded // layout.degree(axis)
        yield Send("all_gather", axis, message_bytes(elements, 8) if axis in int8 else element * elements, "parameters")


def reduce_sends(bucket: Bucket, layout: Chain, start: int, to: int, int4: Collection[int] = ()) -> Iterator[Send]:
    """From level `start` to level `to`: the fastest axis first."""
    for axis in range(start, to):
        elements = bucket.padded // layout.degree(axis)
        if axis in int4:
            yield Send("all_to_all", axis, message_bytes(elements, 4), "gradients")
        else:
            yield Send("reduce_scatter", axis, MASTER_BYTES * elements, "gradients")


def copy_sends(bucket: Bucket, layout: Chain) -> Iterator[Send]:
    """Over all copies of the optimizer states."""
    rest = MASTER_BYTES * bucket.padded // layout.degree(layout.optimizer_states)
    for axis in range(layout.optimizer_states, len(layout.sizes)):
        yield Send("all_reduce", axis, rest, "gradients")


def step_sends(
    layout: Chain,
    groups: Sequence[Sequence[Bucket]],
    *,
    element: int,
    accumulation: int,
    kept: bool,
    int8_gathers: Collection[int] = (),
    int4_reductions: Collection[int] = (),
    norm: bool = True,
) -> Counter[Send]:
    """Every collective of parameters, gradients and the gradient norm in one optimizer step of one rank.

    `groups` are the buckets of each block, the root's last; `element` is the bytes of a gathered element; `kept` says
    whether parameters stay gathered from the first forward to the last backward ([Note: chains over levels]). Over
    the axes of `int8_gathers` and `int4_reductions` fewer bits travel (planner/quantized.py). `norm`: whether the
    gradient norm is summed over the axes that the optimizer states are spread over.
    """
    sends: Counter[Send] = Counter()

    def count(chain: Iterable[Send], times: int) -> None:
        for send in chain:
            sends[send] += times

    for index, group in enumerate(groups):
        is_root = index == len(groups) - 1
        for bucket in group:
            once = 1 if kept else accumulation
            count(gather_sends(bucket, layout, layout.parameters, 0, element, int8_gathers), once)
            if not kept and not is_root:
                count(gather_sends(bucket, layout, layout.secondary, 0, element, int8_gathers), accumulation)
            if bucket.trainable:
                count(reduce_sends(bucket, layout, 0, layout.gradients, int4_reductions), accumulation)
                count(reduce_sends(bucket, layout, layout.gradients, layout.optimizer_states, int4_reductions), 1)
                count(copy_sends(bucket, layout), 1)
                # What the parameters rest as is exact.
                count(gather_sends(bucket, layout, layout.optimizer_states, layout.parameters, element), 1)
    for axis in range(layout.optimizer_states if norm else 0):
        sends[Send("all_reduce", axis, MASTER_BYTES, "grad_norm")] += 1
    return sends
