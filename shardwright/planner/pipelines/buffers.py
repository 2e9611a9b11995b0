"""Bytes of gradients and gathered parameters that one rank of a pipeline holds as it goes through its program.

[Note: gradients of a stage]
Read from the runtime (buckets.py, states.py). The first backward of a stage makes a whole float32 buffer of each of its
units, which all its micro-batches add to. REDUCE sends them off one unit after the other: each time the ones under way
go one hop on, a hop holding what it reads and what it writes, so that the last few wait for the next REDUCE or the end
of the step. What they become stays: at level g until the last one of the step, then at level o. A unit of several
stages is reduced to the end with the last of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from shardwright.planner.flat import Bucket, Chain, trained_elements
from shardwright.planner.flat_chains import FlatGathers, reduction_share
from shardwright.planner.model_states import ChainedUnit
from shardwright.planner.parts import Part
from shardwright.planner.pipelines.owners import by_stage
from shardwright.planner.precisions import MASTER_BYTES
from shardwright.planner.schedules.lowering import Program


class UnitSizes:
    """Of the units of one rank, in elements and bytes."""

    def __init__(self, stages: Sequence[tuple[int, ...]], units: Sequence[Sequence[Bucket]], element: int) -> None:
        self.of_stage = by_stage(stages)
        self.trained = [trained_elements(unit) for unit in units]
        self.gradients = [MASTER_BYTES * elements for elements in self.trained]
        """Of whole buffers."""
        self.whole = [element * sum(bucket.padded for bucket in unit) for unit in units]
        """Parameters in the compute dtype."""


class RankSizes:
    """The same of all parts of the parameters ([Note: states of experts] in parts.py), and their sums."""

    def __init__(self, parts: Sequence[tuple[Part, UnitSizes]]) -> None:
        self.parts, self.of_stage = parts, parts[0][1].of_stage
        every = [sizes for _, sizes in parts]
        self.gradients: list[int] = [sum(unit) for unit in zip(*(sizes.gradients for sizes in every), strict=True)]
        self.whole: list[int] = [sum(unit) for unit in zip(*(sizes.whole for sizes in every), strict=True)]

    @property
    def gathered(self) -> int:
        """Bytes of all units whole, where they rest sharded."""
        return sum(sum(sizes.whole) for part, sizes in self.parts if part.point.shard > 1)

    @property
    def reduced(self) -> int:
        """Bytes of all gradients at level g, where that is not the whole."""
        return sum(
            sum(sizes.gradients) // part.point.gradient_degree
            for part, sizes in self.parts
            if part.point.gradient_degree > 1
        )


class Gradients:
    """[Note: gradients of a stage], at one moment."""

    def __init__(self, sizes: UnitSizes, layout: Chain, int4: Collection[int], program: Program) -> None:
        self._sizes, self._layout = sizes, layout
        self._holds = [float(reduction_share(layout, axis, int4)) for axis in range(len(layout.sizes))]
        self._left = Counter(
            unit for step in program if step.kind == "REDUCE" for unit in sizes.of_stage.get(step.stage, ())
        )
        self._alive = set[int]()
        self._reduced: dict[int, int] = {}
        self._under_way: list[list[int]] = []
        """Of each chain its unit, the hop that runs, and how many it has."""

    @property
    def bytes(self) -> int:
        """Whole buffers, and what has been reduced."""
        return sum(self._sizes.gradients[unit] for unit in self._alive) + sum(self._reduced.values())

    @property
    def sending(self) -> int:
        """Bytes of hops under way."""
        return sum(round(self._sizes.gradients[unit] * self._holds[hop]) for unit, hop, _ in self._under_way)

    def fresh(self, stage: int) -> bool:
        """Whether a backward of this stage makes buffers."""
        return not self._alive.intersection(self._sizes.of_stage.get(stage, ()))

    def make(self, stage: int) -> None:
        """A backward has made the buffers of the stage."""
        self._alive.update(self._sizes.of_stage.get(stage, ()))

    def reduce(self, stage: int) -> int:
        """REDUCE of a stage. Returns the most bytes that gradients and hops take meanwhile."""
        most = 0
        for unit in self._sizes.of_stage.get(stage, ()):
            if not self._sizes.trained[unit]:
                continue
            self._advance()
            self._left[unit] -= 1
            last = self._left[unit] == 0
            hops = len(self._layout.sizes) if last else self._layout.gradients
            if hops:
                self._alive.discard(unit)
                self._under_way.append([unit, 0, hops])
            elif last:
                self._end(unit, last=True)
            most = max(most, self.bytes + self.sending)
        return most

    def _advance(self) -> None:
        for chain in self._under_way:
            chain[1] += 1
        for unit, hop, hops in self._under_way:
            if hop == hops:
                self._end(unit, last=self._left[unit] == 0)
        self._under_way = [chain for chain in self._under_way if chain[1] < chain[2]]

    def _end(self, unit: int, *, last: bool) -> None:
        self._alive.discard(unit)
        level = self._layout.optimizer_states if last else self._layout.gradients
        self._reduced[unit] = self._sizes.gradients[unit] // self._layout.degree(level)


class Gathered:
    """Whole parameters, where they rest sharded, at one moment."""

    def __init__(self, sizes: UnitSizes, layout: Chain, element: int, int8: Collection[int]) -> None:
        self._sizes, self._sharded = sizes, layout.parameters > 0
        gathers = FlatGathers(layout, layout.parameters, element, int8)
        self._more = [
            max(gathers.held(size, hops) for hops in range(layout.parameters + 1)) + gathers.arrival(size) - size
            for size in sizes.whole
        ]
        self._whole = set[int]()
        self.bytes = 0

    def gather(self, stage: int) -> None:
        """GATHER of a stage; counted as whole from here on, with what the widest hop takes beyond."""
        self._whole.update(self._sizes.of_stage.get(stage, ()) if self._sharded else ())
        self._count()

    def release(self, stage: int) -> None:
        """RELEASE of a stage."""
        self._whole.difference_update(self._sizes.of_stage.get(stage, ()))
        self._count()

    def _count(self) -> None:
        extra = max((self._more[unit] for unit in self._whole), default=0)
        self.bytes = sum(self._sizes.whole[unit] for unit in self._whole) + max(0, extra)


class RankGradients:
    """[Note: gradients of a stage], of all parts of the parameters, each as if the others had none: an upper bound
    while several are sent off."""

    def __init__(self, sizes: RankSizes, program: Program) -> None:
        self._parts = [
            Gradients(of_part, part.point.chain, part.point.int4_reductions, program) for part, of_part in sizes.parts
        ]

    @property
    def bytes(self) -> int:
        """As `Gradients.bytes`."""
        return sum(part.bytes for part in self._parts)

    @property
    def sending(self) -> int:
        """Bytes of hops under way."""
        return sum(part.sending for part in self._parts)

    def fresh(self, stage: int) -> bool:
        """As `Gradients.fresh`: they are made at once."""
        return self._parts[0].fresh(stage)

    def make(self, stage: int) -> None:
        """As `Gradients.make`."""
        for part in self._parts:
            part.make(stage)

    def reduce(self, stage: int) -> int:
        """As `Gradients.reduce`."""
        return sum(part.reduce(stage) for part in self._parts)


class RankGathered:
    """Whole parameters of all parts."""

    def __init__(self, sizes: RankSizes, element: int) -> None:
        self._parts = [
            Gathered(of_part, part.point.chain, element, part.point.int8_gathers) for part, of_part in sizes.parts
        ]

    @property
    def bytes(self) -> int:
        """As `Gathered.bytes`."""
        return sum(part.bytes for part in self._parts)

    def gather(self, stage: int) -> None:
        """As `Gathered.gather`."""
        for part in self._parts:
            part.gather(stage)

    def release(self, stage: int) -> None:
        """As `Gathered.release`."""
        for part in self._parts:
            part.release(stage)


def building(units: Iterable[ChainedUnit], outside: int, element: int, whole_model: int) -> tuple[int, int]:
    """Parameters, and master values, at the worst moment of starting up: each unit has its parameters in float32
    and, of one bucket at a time, copies of them.

    `outside`: elements that are there while these units are made, such as all that lies outside blocks. `whole_model`:
    elements that are there from the start, 0 where units are made one by one.
    """
    master = 0 if element == MASTER_BYTES else MASTER_BYTES
    kept = masters = 0
    worst = (MASTER_BYTES * max(outside, whole_model), 0)
    for unit in units:
        own = sum(bucket.numel for bucket, _ in unit)
        for bucket, layout in unit:
            copies = (MASTER_BYTES + (element if master else 0)) * bucket.padded
            moment = kept + MASTER_BYTES * max(own, outside, whole_model) + copies, masters
            worst = max(worst, moment, key=sum)
            kept += element * bucket.padded // layout.degree(layout.parameters)
            masters += master * bucket.padded // layout.degree(layout.optimizer_states)
    return worst
