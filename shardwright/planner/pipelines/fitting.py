"""From a pipeline as the space has it to one that fits: where the model is cut, and what each stage recomputes.

[Note: guides]
How much is in flight on a rank decides what it has to recompute, and with that how the model is best cut; for most
schedules it follows from ranks, chunks and micro-batches alone. The others make use of a limit and of real times, so
they take over the stages of a published schedule, their guide, and run them under what each rank then has left.

[Note: cutting again]
The first cut is by time alone. Where some rank has to recompute, the cut is made anew with what that costs, given what
the memory model says is left beside states and activations; this changes little once the ends of the model have found
their ranks, so that it is done CUTS times at most, and the cut that is least slow is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.pipelines.costs import PipelineCosts, SegmentCosts, pipe_of
from shardwright.planner.pipelines.cutting import (
    Allowance,
    Held,
    Price,
    StageChoice,
    Weights,
    divide,
    fewest,
    in_flight,
    stage_price,
)
from shardwright.planner.pipelines.owners import stage_segments
from shardwright.planner.pipelines.space import permitted_cuts
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS, Precision
from shardwright.planner.schedules.simulator import rank_work
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.timetable import Layout, even_costs
from shardwright.planner.space import Pipe, Point, permitted_blocks
from shardwright.schemas.job import JobSpec, ScheduleName
from shardwright.schemas.profile import ModelProfile

CUTS = 3
"""[Note: cutting again]."""
ROUNDS = 4
"""What is left on a rank depends a little on what it recomputes: so many times it is asked for."""
FORWARDS_FIRST = ("gpipe", "breadth-first")
"""Schedules that hold every micro-batch."""
STEADY = 2
"""Micro-batches a rank after which schedules hold no more than before."""

Rooms = Callable[[Point], Sequence[float]]
"""Bytes of activations that each rank of a point may hold."""


class Fitting:
    """Cuts the pipelines of one job."""

    def __init__(self, job: JobSpec, profile: ModelProfile, costs: PipelineCosts, rooms: Rooms) -> None:
        self._job, self._costs, self._rooms = job, costs, rooms
        self._blocks = costs.blocks
        self._ends = tuple(cut + 1 for cut in permitted_cuts(profile))
        self._totals = permitted_blocks(job, self._blocks)
        self._owned = [costs.owners.trained(range(segment, segment + 1)) for segment in range(self._blocks + 2)]
        self._by_time: Callable[[Precision, int, int], tuple[int, ...] | None] = lru_cache(maxsize=None)(
            self._cut_by_time
        )
        self._choice: Callable[[Precision, int, range], StageChoice] = lru_cache(maxsize=None)(
            lambda precision, micro_batch, own: _choice_of(costs.segments(precision, micro_batch), own, costs.blocks)
        )

    def by_time(self, point: Point) -> Point | None:
        """The point cut by time alone, with nothing recomputed; None where the model has too few places to cut."""
        pipe = pipe_of(point)
        cuts = self._by_time(point.precision, point.micro_batch, pipe.layout.stages)
        return None if cuts is None else _cut(point, cuts)

    def all_recomputed(self, point: Point) -> Point | None:
        """The same with as much recomputed as the job permits."""
        plain = self.by_time(point)
        if plain is None:
            return None
        most = self._totals[-1] if self._totals else 0
        counts = []
        for size in pipe_of(plain).sizes(self._blocks):
            counts.append(min(size, most))
            most -= counts[-1]
        return _recomputing(plain, counts)

    def fitted(self, point: Point) -> Point | None:
        """The point cut and with as few blocks recomputed as let it fit; None where it cannot."""
        plain = self.by_time(point)
        if plain is None or not self._has_room(plain):
            return None
        moments = self.moments(point)
        best: tuple[float, Point] | None = None
        tried: set[tuple[int, ...]] = set()
        current: Point | None = plain
        while current is not None and len(tried) < CUTS and pipe_of(current).cuts not in tried:
            tried.add(pipe_of(current).cuts)
            found = self._recomputed(current, moments)
            if found is not None:
                slowest = max(rank_work(self._costs.costs(found), pipe_of(found).layout, 1))
                if best is None or slowest < best[0]:
                    best = slowest, found
                if found == plain:
                    break
            current = self._cut_again(found or current, moments)
        return None if best is None else best[1]

    def loosened(self, point: Point, left: Sequence[int]) -> Point | None:
        """A point that fits, with fewer blocks recomputed because its ranks turned out to have so many bytes `left`;
        None where that changes nothing, and for schedules that are searched within limits."""
        pipe = pipe_of(point)
        if pipe.activation_limits or not any(pipe.checkpointed):
            return None
        found = self._recomputed(_cut(point, pipe.cuts), self.moments(point), left)
        return found if found is not None and pipe_of(found).checkpointed != pipe.checkpointed else None

    def _has_room(self, point: Point) -> bool:
        """Whether all ranks together have room for one micro-batch with everything recomputed, wherever the cuts are:
        what is left of the devices after states does not depend on them."""
        pipe = pipe_of(point)
        stages = range(pipe.layout.stages)
        choices = (self._choice(point.precision, point.micro_batch, self._own(pipe, stage)) for stage in stages)
        return sum(self._rooms(point)) >= sum(choice.kept[-1] for choice in choices)

    def moments(self, point: Point) -> tuple[tuple[Held, ...], ...]:
        """Of each rank what its schedule holds at once."""
        pipe = pipe_of(point)
        return guide_moments(pipe.schedule, pipe.layout, point.accumulation)

    # --- what is recomputed -----------------------------------------------------------------------------------------

    def _recomputed(self, point: Point, moments: Sequence[Sequence[Held]], more: Sequence[int] = ()) -> Point | None:
        """A cut point with the fewest blocks recomputed ([Note: which blocks are recomputed]), where its ranks have so
        many bytes `more` than room."""
        for _ in range(ROUNDS):
            counts = self._counts(point, moments, more or (0,) * pipe_of(point).ranks)
            if counts is None:
                return None
            before = pipe_of(point).checkpointed
            if all(map(int.__ge__, before, counts)):
                return self._permitted(point)
            point = _recomputing(point, [max(pair) for pair in zip(before, counts, strict=True)])
        return self._permitted(point)

    def _counts(self, point: Point, moments: Sequence[Sequence[Held]], more: Sequence[int]) -> list[int] | None:
        pipe, layout = pipe_of(point), pipe_of(point).layout
        counts = [0] * layout.stages
        for rank, room in enumerate(self._rooms(point)):
            stages = [layout.stage(rank, chunk) for chunk in range(layout.chunks)]
            choices = [self._choice(point.precision, point.micro_batch, self._own(pipe, stage)) for stage in stages]
            found = fewest(choices, moments[rank], room + more[rank])
            if found is None:
                return None
            for stage, count in zip(stages, found, strict=True):
                counts[stage] = count
        return counts

    def _own(self, pipe: Pipe, stage: int) -> range:
        return stage_segments(pipe, stage, self._blocks)

    def _permitted(self, point: Point) -> Point | None:
        """As many blocks recomputed as the job permits, at least those that have to be: more on the ranks with least to
        do."""
        pipe = pipe_of(point)
        needed = sum(pipe.checkpointed)
        total = next((each for each in self._totals if each >= needed), None)
        sizes, counts = pipe.sizes(self._blocks), list(pipe.checkpointed)
        if total is None:
            return None
        for _ in range(total - needed):
            work = rank_work(self._costs.costs(_recomputing(point, counts)), pipe.layout, 1)
            open_stages = [stage for stage, size in enumerate(sizes) if counts[stage] < size]
            counts[min(open_stages, key=lambda stage: (work[pipe.layout.place(stage)[0]], stage))] += 1
        return _recomputing(point, counts)

    # --- where it is cut --------------------------------------------------------------------------------------------

    def _cut_by_time(self, precision: Precision, micro_batch: int, stages: int) -> tuple[int, ...] | None:
        sums = [0.0, *accumulate(self._costs.segments(precision, micro_batch).seconds)]
        return self._divided(lambda stage, first, last: sums[last] - sums[first], stages)

    def _cut_again(self, point: Point, moments: Sequence[Sequence[Held]]) -> Point | None:
        """[Note: cutting again]."""
        cuts = self._divided(self._price(point, moments), pipe_of(point).layout.stages)
        return None if cuts is None else _cut(point, cuts)

    def _divided(self, price: Price, stages: int) -> tuple[int, ...] | None:
        """Cuts as a pipeline has them: numbers of blocks."""
        ends = divide(price, self._blocks + 2, stages, self._ends)
        return None if ends is None else tuple(end - 1 for end in ends)

    def _price(self, point: Point, moments: Sequence[Sequence[Held]]) -> Price:
        """Of stages that may each hold as much as their rank of this point does beside what states take."""
        layout, segments = pipe_of(point).layout, self._costs.segments(point.precision, point.micro_batch)
        each = bytes_an_element(point, self._job)
        states = [each * numel for numel in self._owned]
        rooms = self._rooms(point)
        allowances = []
        for stage in range(layout.stages):
            rank, chunk = layout.place(stage)
            own = [
                states[segment]
                for other in range(layout.chunks)
                for segment in self._own(pipe_of(point), layout.stage(rank, other))
            ]
            held = max(
                (Held((one.active[chunk],), (one.waiting[chunk],)) for one in moments[rank]),
                key=lambda one: (one.active, one.waiting),
            )
            allowances.append(Allowance(held, (rooms[rank] + sum(own)) / layout.chunks))
        weights = Weights(
            seconds=segments.seconds,
            recompute=segments.recompute,
            saved=segments.saved,
            saved_inputs=segments.saved_inputs,
            held_by_weight=segments.held_by_weight,
            states=states,
        )
        return stage_price(weights, allowances)


def _choice_of(segments: SegmentCosts, own: range, blocks: int) -> StageChoice:
    inside = [segment for segment in own if 1 <= segment <= blocks]
    firsts = [range(own.start, own.start)] + [range(inside[0], segment + 1) for segment in inside]
    return StageChoice(
        kept=[segments.kept(own, again) for again in firsts],
        held=sum(segments.held_by_weight[segment] for segment in own),
        recompute=[sum(segments.recompute[segment] for segment in again) for again in firsts],
    )


@lru_cache(maxsize=4096)
def guide_moments(schedule: ScheduleName, layout: Layout, micro_batches: int) -> tuple[tuple[Held, ...], ...]:
    """[Note: guides]; a schedule that depends on times is made for even ones, one whose memory does not grow with the
    number of micro-batches for no more than STEADY a rank."""
    family = SCHEDULES[schedule]
    if schedule in FORWARDS_FIRST:
        return ((Held((micro_batches,) * layout.chunks, (0,) * layout.chunks),),) * layout.ranks
    if family.memory is not None:
        micro_batches = min(micro_batches, STEADY * layout.ranks)
    costs = even_costs(layout, (1.0, 1.0, 1.0, 0.0), 1.0)
    return in_flight(family.make(layout, micro_batches, costs, None), layout)


def bytes_an_element(point: Point, job: JobSpec) -> float:
    """About what a parameter's element takes on a device, in states."""
    compute = PRECISIONS[point.precision].compute_bytes
    masters = MASTER_BYTES if compute < MASTER_BYTES else 0
    moments = OPTIMIZERS[job.train.optimizer.name].state_bytes(job.train, elements=1, tensors=0)
    return compute / point.shard + (masters + moments) / point.optimizer_degree + MASTER_BYTES / point.gradient_degree


def _cut(point: Point, cuts: tuple[int, ...]) -> Point:
    pipe = replace(pipe_of(point), cuts=cuts, checkpointed=(0,) * (len(cuts) + 1))
    return replace(point, pipe=pipe)


def _recomputing(point: Point, counts: Sequence[int]) -> Point:
    return replace(point, pipe=replace(pipe_of(point), checkpointed=tuple(counts)))
