"""Search of the pipelines: the fastest that fits, of all or of those that differ in one decision.

[Note: steps to a prediction]
What a pipeline takes is found in steps, each dearer than the one before, and each with a bound that the next one does
not go below: the work of all its segments shared equally by its ranks; then what the pipeline takes that differs in its
states alone, which are spread widest, so that it has most room and the least to recompute; then, cut and with what it
has to recompute itself, the work of its busiest rank, and the update of its parameters; then its schedule, simulated
without collectives; then the whole step. What does not fit with a smaller micro-batch does not with a larger one. At
every moment the one with the lowest bound goes a step further, until that one is predicted in full: it is the fastest.
Pipelines are independent of each other, so what was found for one question is there for the next.

[Note: searched schedules]
A schedule that is searched for takes seconds, so it is not made for every pipeline. The fastest pipelines under its
guides ([Note: guides]), published schedules that are quickly made, say where to search: for the SEARCHED best of each
number of chunks, under the memory that their stages leave. As the search draws on the published schedules, its result
is not worse than its guide's. Where the planner chooses the schedule, those with more than MOST_PASSES passes (stages
times micro-batches) are not searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from heapq import heapify, heappop, heapreplace
from itertools import islice, pairwise
from math import inf

from shardwright.planner.candidates import (
    TIE,
    Candidate,
    Predicate,
    best_first,
    measure,
    timed,
)
from shardwright.planner.pipelines.costs import pipe_of
from shardwright.planner.pipelines.fitting import Fitting, bytes_an_element
from shardwright.planner.pipelines.rooms import Rooms
from shardwright.planner.pipelines.space import job_schedules, pipelines, placement_of
from shardwright.planner.precisions import Precision
from shardwright.planner.predict import Predictor
from shardwright.planner.schedules.families.family import Family
from shardwright.planner.schedules.simulator import rank_work
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.space import Pipe, Point
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.job import ScheduleName

SEARCHED = 1
"""[Note: searched schedules]."""
MOST_PASSES = 1024
"""[Note: searched schedules]."""
MOST_GAINED = 0.15
"""By how much a searched schedule may be shorter than its guide: guides that are further from what is asked for are not
searched."""
CUT_TOLERANCE = 0.005
"""Cuts are found by a heuristic, so that more room may make one a little worse."""
MOST_LOOSENED = 0.05
"""By how much less a pipeline may take once its memory was measured, and less is recomputed where there is room."""
TIED = 4
"""Of pipelines as fast as the fastest so many are looked at, for the one with least memory."""

GUIDES: dict[ScheduleName, tuple[ScheduleName, ...]] = {
    "zb-1p": ("1f1b", "zb-h1"),
    "zb-2p": ("zb-h2", "zb-h1", "1f1b"),
    "zb-v": ("v-half", "v-min", "dualpipe-v"),
    "zb-auto": ("1f1b", "zb-h1", "zb-h2", "v-half", "v-min", "dualpipe-v"),
}
"""Of schedules that are searched for ([Note: guides]). Those in units and waves are their own guides."""


@dataclass(slots=True)
class _Entry:
    """A pipeline, and what has been found of it so far ([Note: steps to a prediction])."""

    point: Point
    """As the space has it, uncut."""
    order: int
    wanted: bool
    """Whether the job permits it; else it is a guide only."""
    bounds: list[float]
    """Of every step that was taken."""
    after: list[Point] = field(default_factory=list)
    """Points of the space whose guide it is."""
    fitted: Point | None = None
    found: Candidate | None = None


class PipelineSearch:
    """The pipelines of one job, every question about them answered as [Note: steps to a prediction] says."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._results: dict[Point, Candidate | None] = {}
        self._fitted: dict[Point, Point | None] = {}
        """By the point without its axes, which make no difference but for padding."""
        self._thriftiest: dict[Point, Point] = {}
        """Of the points that differ in how their states are spread, the one with least on a device."""
        self._smaller: dict[tuple[Point, int], Point] = {}
        """Of every point but for its micro-batch, by that: the point with the next smaller one."""
        self._searches: list[Candidate] | None = None

    @cached_property
    def _points(self) -> tuple[Point, ...]:
        return tuple(pipelines(self._predictor.job, self._predictor.profile, self._predictor.parallel))

    @property
    def considered(self) -> int:
        """Pipelines, each with its best cut and checkpointing."""
        return len(self._points)

    @property
    def points(self) -> tuple[Point, ...]:
        """All of them, uncut."""
        return self._points

    @property
    def measured(self) -> list[Candidate]:
        """Those that were predicted in full so far."""
        return [each for each in self._results.values() if each is not None]

    def best(self, where: Predicate, at_most: float = inf) -> Candidate | None:
        """The fastest that fits, of those that `where` picks and that take `at_most` so many seconds; of the searched
        ones, those that were thought worth it."""
        if not any(map(where, self._points)):
            return None
        found = [each for each in self._candidates(where, at_most) if each.seconds <= at_most]
        return best_first(found, self._predictor.device_budget)[0] if found else None

    def closest(self, where: Predicate) -> Candidate | None:
        """Where none fits: one that misses the budgets by little. With as much recomputed as may be; of each number of
        ranks the one with the smallest micro-batch, the widest sharding and the schedule that holds least."""
        thriftiest: dict[tuple[object, ...], Point] = {}
        for point in filter(where, self._points):
            key = pipe_of(point).ranks, point.precision
            if pipe_of(point).schedule not in GUIDES and _thrift(point) < _thrift(thriftiest.setdefault(key, point)):
                thriftiest[key] = point
        cut = [each for each in map(self._fitting.all_recomputed, thriftiest.values()) if each is not None]
        if not cut:
            return None
        nearest = max(cut, key=lambda point: min(self._rooms(point)))
        self._predicted(nearest)
        return self._results.get(nearest)

    # --- fixed schedules --------------------------------------------------------------------------------------------

    def _candidates(self, where: Predicate, at_most: float) -> list[Candidate]:
        """The fastest with a published schedule, those that tie with it, and those searched for."""
        found: list[Candidate] = []
        entries = [entry for entry in self._entries if entry.wanted and where(entry.point)]
        for candidate in islice(self._ascending(entries, at_most * (1 + MOST_LOOSENED)), 1 + TIED):
            if found and candidate.seconds > found[0].seconds * (1 + TIE):
                break
            found.append(candidate)
        found += [each for each in list(map(self._loosened, found)) if each is not None]
        searched = [each for each in self._pool(at_most) if where(each.point)]
        if not found and not searched:
            searched = self._search_where(where, at_most)
        return found + searched

    def _ascending(self, entries: Sequence[_Entry], at_most: float, work: float = inf) -> Iterator[Candidate]:
        """Those that fit, take `at_most` so many seconds, and of which the busiest rank works no longer than `work`,
        fastest first."""
        heap = [(entry.bounds[0], 1, entry.order) for entry in entries]
        heapify(heap)
        while heap:
            bound, level, order = heap[0]
            if bound > at_most:
                return
            entry = self._entries[order]
            if level > len(_STEPS):
                heappop(heap)
                if entry.found is not None:
                    yield entry.found
                continue
            if len(entry.bounds) == level:
                entry.bounds.append(max(entry.bounds[-1], _STEPS[level - 1](self, entry)))
            if entry.bounds[level] == inf or (level == _WORK and entry.bounds[level] > work):
                heappop(heap)
            else:
                heapreplace(heap, (entry.bounds[level], level + 1, order))

    def _fit_thriftiest(self, entry: _Entry) -> float:
        """The second step."""
        fitted = self._fit_point(self._thriftiest[_any_states(entry.point)])
        return inf if fitted is None else self._predictor.pipelines.time.shortest(fitted) * (1 - CUT_TOLERANCE)

    def _fit(self, entry: _Entry) -> float:
        """The third step."""
        fitted = self._fit_point(entry.point)
        entry.fitted = None if fitted is None else replace(fitted, axes=entry.point.axes)
        return inf if entry.fitted is None else self._predictor.pipelines.time.least(entry.fitted)

    def _fit_point(self, point: Point) -> Point | None:
        alike = replace(point, axes=())
        if alike not in self._fitted:
            smaller = self._smaller.get((_any_size(point), point.micro_batch))
            fits = smaller is None or self._fit_point(smaller) is not None
            self._fitted[alike] = self._fitting.fitted(point) if fits else None
        return self._fitted[alike]

    def _simulate(self, entry: _Entry) -> float:
        """The fourth step."""
        point = self._within_limits(entry)
        try:
            made = self._predictor.pipelines.schedules.made(point)
        except InputError:
            return inf
        work = max(rank_work(made.costs, made.layout, point.accumulation))
        return entry.bounds[-1] + max(0.0, self._predictor.pipelines.time.period(point) - work)

    def _predict(self, entry: _Entry) -> float:
        """The last step."""
        entry.found = self._predicted(self._within_limits(entry))
        return inf if entry.found is None else entry.found.seconds

    def _within_limits(self, entry: _Entry) -> Point:
        assert entry.fitted is not None, "this step comes after the second"
        return limited(entry.fitted, self._rooms(entry.fitted))

    def _predicted(self, point: Point) -> Candidate | None:
        """In full; None where it does not fit after all."""
        if point not in self._results:
            self._results[point] = self._result(point)
        found = self._results[point]
        return found if found is not None and found.fits else None

    def _result(self, point: Point) -> Candidate | None:
        """None where its schedule cannot be made."""
        try:
            candidate = measure(self._predictor, point)
        except InputError:
            return None
        return timed(self._predictor, candidate) if candidate.fits else candidate

    def _loosened(self, candidate: Candidate) -> Candidate | None:
        """The candidate with less recomputed, where the memory that it was found to take leaves room for that."""
        predictor, point = self._predictor, candidate.point
        whole = int(predictor.device_budget / (predictor.memory.reserved(_LARGE) / _LARGE))
        left = [max(0, whole - peak.total) for peak in predictor.pipelines.memory.peaks(point)]
        looser = self._fitting.loosened(point, left)
        return None if looser is None else self._predicted(looser)

    # --- searched schedules -----------------------------------------------------------------------------------------

    def _pool(self, at_most: float) -> list[Candidate]:
        """What was searched for among all pipelines ([Note: searched schedules]), at the first question that one of
        them could answer."""
        if self._searches is None and any(entry.after for entry in self._entries):
            self._searches = self._search_where(lambda point: True, at_most)
        return self._searches or []

    def _search_where(self, where: Predicate, at_most: float) -> list[Candidate]:
        guides = [entry for entry in self._entries if any(map(where, entry.after))]
        found = []
        for chunks in sorted({pipe_of(entry.point).chunks for entry in guides}):
            of_chunks = [entry for entry in guides if pipe_of(entry.point).chunks == chunks]
            for guide in islice(self._ascending(of_chunks, at_most * (1 + MOST_GAINED), work=at_most), SEARCHED):
                entry = next(each for each in of_chunks if each.found is guide)
                found += [self._search(entry, target) for target in filter(where, entry.after)]
        return [each for each in found if each is not None]

    def _search(self, guide: _Entry, target: Point) -> Candidate | None:
        assert guide.fitted is not None, "a guide has been predicted"
        pipe = replace(pipe_of(guide.fitted), schedule=pipe_of(target).schedule, placement=pipe_of(target).placement)
        point = replace(guide.fitted, pipe=pipe)
        return self._predicted(limited(point, self._rooms(point)))

    # --- the space --------------------------------------------------------------------------------------------------

    @cached_property
    def _fitting(self) -> Fitting:
        predictor = self._predictor
        return Fitting(predictor.job, predictor.profile, predictor.pipelines.costs, self._rooms)

    @cached_property
    def _rooms(self) -> Callable[[Point], tuple[int, ...]]:
        return Rooms(self._predictor.profile, self._predictor.pipelines.memory.room).of

    @cached_property
    def _entries(self) -> tuple[_Entry, ...]:
        entries = tuple(self._made_entries())
        self._relate(entries)
        return entries

    def _made_entries(self) -> Iterator[_Entry]:
        """One for each point with a schedule that is made at once, and for each guide."""
        after: dict[Point, list[Point]] = {}
        wanted: dict[Point, bool] = {}
        for point in self._points:
            if pipe_of(point).schedule not in GUIDES:
                wanted[point] = True
                continue
            for guide in self._guides(point):
                wanted.setdefault(guide, False)
                after.setdefault(guide, []).append(point)
        order = 0
        for point in wanted:
            bound = self._least(point)
            if bound < inf:
                yield _Entry(point, order, wanted[point], [bound], after.get(point, []))
                order += 1

    def _relate(self, entries: Sequence[_Entry]) -> None:
        sizes: dict[Point, dict[int, Point]] = {}
        for point in (entry.point for entry in entries):
            sizes.setdefault(_any_size(point), {}).setdefault(point.micro_batch, point)
            least = self._thriftiest.setdefault(_any_states(point), point)
            if self._state_bytes(point) < self._state_bytes(least):
                self._thriftiest[_any_states(point)] = point
        for kind, points in sizes.items():
            self._smaller |= {(kind, larger): points[one] for one, larger in pairwise(sorted(points))}

    def _state_bytes(self, point: Point) -> float:
        return bytes_an_element(point, self._predictor.job)

    def _guides(self, point: Point) -> Iterator[Point]:
        for pipe in self._guide_pipes(pipe_of(point), point.accumulation):
            yield replace(point, pipe=pipe)

    @cached_property
    def _guide_pipes(self) -> Callable[[Pipe, int], tuple[Pipe, ...]]:
        named = job_schedules(self._predictor.job)

        def lies(family: Family, pipe: Pipe) -> bool:
            return family.allowed_chunks(pipe.chunks) and placement_of(family, pipe.chunks) == pipe.placement

        def of(pipe: Pipe, accumulation: int) -> tuple[Pipe, ...]:
            if pipe.schedule not in named and pipe.layout.stages * accumulation > MOST_PASSES:
                return ()
            families = [SCHEDULES[name] for name in GUIDES[pipe.schedule]]
            able = [each for each in families if lies(each, pipe) and not each.refuses(pipe.layout, accumulation)]
            return tuple(replace(pipe, schedule=family.name) for family in able)  # type: ignore[arg-type]

        return cache(of)

    def _least(self, point: Point) -> float:
        """The first step: no pipeline of so many ranks takes less; inf where states alone do not fit."""
        ranks, job = pipe_of(point).ranks, self._predictor.job
        states = bytes_an_element(point, job) * self._numel / ranks
        if self._predictor.memory.reserved(int(states)) > self._predictor.device_budget:
            return inf
        total, longest = self._seconds(point.precision, point.micro_batch)
        return point.accumulation * max(total / ranks, longest)

    @cached_property
    def _numel(self) -> int:
        return self._predictor.profile.numel

    @cached_property
    def _seconds(self) -> Callable[[Precision, int], tuple[float, float]]:
        """Of all segments, and of the longest."""
        segments = self._predictor.pipelines.costs.segments

        def of(precision: Precision, micro_batch: int) -> tuple[float, float]:
            seconds = segments(precision, micro_batch).seconds
            return sum(seconds), max(seconds)

        return cache(of)


_STEPS: tuple[Callable[[PipelineSearch, _Entry], float], ...] = (
    PipelineSearch._fit_thriftiest,
    PipelineSearch._fit,
    PipelineSearch._simulate,
    PipelineSearch._predict,
)
"""Those after the first, in order, each to the bound that it finds; inf: the pipeline does not fit."""

_LARGE = 2**40
"""Bytes of which the share that is reserved beyond them is well measured."""
_WORK = 2
"""Which bound is the work of the busiest rank."""


def _any_states(point: Point) -> Point:
    """The same for all points that differ in how their states are spread."""
    return replace(point, axes=(), shard=1, gradient_degree=1, optimizer_degree=1)


def _any_size(point: Point) -> Point:
    """The same for all points that differ in their micro-batch."""
    return replace(point, axes=(), micro_batch=0, accumulation=0)


def limited(point: Point, rooms: Sequence[int]) -> Point:
    """The point with what its ranks have left as the limit of its schedule, where that is searched under one."""
    pipe = pipe_of(point)
    limits = tuple(rooms) if SCHEDULES[pipe.schedule].searches else ()
    return replace(point, pipe=replace(pipe, activation_limits=limits))


def _thrift(point: Point) -> tuple[float, ...]:
    """Less takes less memory."""
    pipe = pipe_of(point)
    memory = SCHEDULES[pipe.schedule].memory
    held = point.accumulation if memory is None else min(point.accumulation, memory(pipe.layout))
    return (
        held * point.micro_batch,
        point.micro_batch,
        -point.optimizer_degree,
        -point.shard,
        -point.gradient_degree,
        len(point.axes),
    )
