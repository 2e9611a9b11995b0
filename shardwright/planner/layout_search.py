"""Search of the points that share a copy of the model in one way: the fastest that fits.

[Note: checkpointing in the search]
Time grows with the number of checkpointed blocks and nothing else does with it, so for every configuration of the rest
only the least number that fits is of interest. Memory falls with it except in the backward of a checkpointed block,
which needs the recomputed activations beside what is saved before it: once that phase alone is over the budget, no
larger number can fit. One block saves at most what the largest of them keeps for backward, which gives the number to
start from. Memory grows with the micro-batch as long as micro-batches accumulate, so a size at which nothing fits ends
the larger ones, but for the one that needs no accumulation.

[Note: bounds]
What is at rest alone rules many configurations out (`MemoryModel.at_rest_floor`). The others need at least so many
checkpointed blocks (`fewest_blocks`) and with these at least so many seconds (`TimeModel.least`); all three are cheap.
In the order of that bound they are predicted in full, until it is past the fastest that fits. Of those that may tie
with it, only the ones are predicted whose bounds of memory and simplicity are not behind the best so far. Whatever is
asked of the space (the fastest of all, of one engine, of those that differ in one decision) is answered exactly that
way, and what was predicted for one question is there for the next.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import inf
from typing import Any, NamedTuple

from shardwright.planner.candidates import (
    TIE,
    Candidate,
    Predicate,
    best_first,
    measure,
    memory_rank,
    missing,
    shortfall,
    simplicity,
    timed,
)
from shardwright.planner.names import family
from shardwright.planner.pipelines.search import PipelineSearch
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.predict import Predictor
from shardwright.planner.space import Point, block_count, configurations, permitted_blocks

MOST_IN_VAIN = 16
"""Configurations that are predicted in full for an example of what was not chosen, while none of them fits."""


class _Bounds(NamedTuple):
    """What a configuration takes at least."""

    seconds: float
    reserved: int
    blocks: int
    """Checkpointed."""
    point: Point


class LayoutSearch:
    """The points of one `Parallel`, every question about them answered exactly ([Note: bounds])."""

    def __init__(self, predictor: Predictor) -> None:
        """`predictor`: the one of that `Parallel`."""
        self._predictor = predictor
        memory, budget = predictor.memory, predictor.device_budget
        permitted = permitted_blocks(predictor.job, block_count(predictor.profile))
        self._missing: list[tuple[int, Point]] = []
        bounds: list[_Bounds] = []
        for point in configurations(predictor.job, predictor.profile, predictor.parallel):
            floor = memory.at_rest_floor(point)
            reserved = memory.reserved(floor)
            short = missing(predictor, reserved, memory.host_bytes(point, floor))
            self._missing.append((short, point))
            fewest = None if short else memory.fewest_blocks(point, budget)
            blocks = None if fewest is None else next((each for each in permitted if each >= fewest), None)
            if blocks is not None:
                seconds = predictor.time.least(replace(point, checkpointed=blocks))
                bounds.append(_Bounds(seconds, reserved, blocks, point))
        self._by_time = sorted(bounds, key=_first)
        self._results: dict[Point, Candidate | None] = {}
        self._full: dict[Point, int] = {}
        self._pipelines = PipelineSearch(predictor)

    @property
    def considered(self) -> int:
        """Configurations, each with its best checkpointing, and pipelines, each with its best cut too."""
        return len(self._missing) + self._pipelines.considered

    @cached_property
    def _by_memory(self) -> list[tuple[tuple[int, tuple[int, ...]], Point]]:
        """Every configuration with what its states alone miss the budgets by, those that miss them by least first."""
        return sorted((((short, simplicity(point)), point) for short, point in self._missing), key=_first)

    @cached_property
    def families(self) -> list[str]:
        """The methods that have points here, those that need least memory first."""
        plain = (point for _, point in self._by_memory)
        return list(dict.fromkeys(map(family, (*plain, *self._pipelines.points))))

    @property
    def has_pipelines(self) -> bool:
        """Whether the space has points with pipeline stages."""
        return self._pipelines.considered > 0

    @property
    def measured(self) -> list[Candidate]:
        """Those that were predicted in full so far."""
        return [*(result for result in self._results.values() if result is not None), *self._pipelines.measured]

    def best(self, where: Predicate, at_most: float = inf) -> Candidate | None:
        """The fastest configuration that fits, of those that `where` picks and that take `at_most` so many seconds;
        ties as `best_first` has them."""
        plain = self._best_plain(where, at_most)
        pipeline = self._pipelines.best(where, at_most if plain is None else min(at_most, plain.seconds * (1 + TIE)))
        found = [each for each in (plain, pipeline) if each is not None]
        return best_first(found, self._predictor.device_budget)[0] if found else None

    def _best_plain(self, where: Predicate, at_most: float) -> Candidate | None:
        """Without pipeline stages."""
        picked = [each for each in self._by_time if where(each.point) and each.seconds <= at_most]
        found = [each for each in self._ascending(picked, slack=0.0) if each.seconds <= at_most]
        if not found:
            return None
        fastest = min(each.seconds for each in found)
        return self._simplest(found, [each for each in picked if each.seconds <= fastest * (1 + TIE)], fastest)

    def example(self, where: Predicate) -> Candidate | None:
        """A configuration that `where` picks and that fits, such that none is faster by more than TIE; None also where
        none of the first MOST_IN_VAIN fits."""
        picked = [each for each in self._by_time if where(each.point)]
        found = self._ascending(picked, slack=TIE, vain=MOST_IN_VAIN)
        fastest = min((each.seconds for each in found), default=inf)
        pipeline = self._pipelines.best(where, fastest)
        found += [] if pipeline is None else [pipeline]
        return best_first(found, self._predictor.device_budget)[0] if found else None

    def _ascending(self, picked: list[_Bounds], slack: float, vain: float = inf) -> list[Candidate]:
        """Those that fit, predicted in the order of their bounds until none can be faster, but for `slack`, or so many
        were predicted in `vain`."""
        found: list[Candidate] = []
        fastest = inf
        for tried, each in enumerate(picked):
            if each.seconds >= fastest * (1 - slack) or (not found and tried >= vain):
                break
            candidate = self._result(each.point)
            if candidate is not None and candidate.fits:
                found.append(candidate)
                fastest = min(fastest, candidate.seconds)
        return found

    def _simplest(self, found: list[Candidate], ties: list[_Bounds], fastest: float) -> Candidate:
        """Of all that tie with the fastest, the one that `best_first` puts first."""
        budget = self._predictor.device_budget
        best = best_first(found, budget)[0]
        bounds = [
            (memory_rank(each.reserved, replace(each.point, checkpointed=each.blocks), budget), each.point)
            for each in ties
        ]
        for bound, point in sorted(bounds, key=_first):
            if bound > memory_rank(best.reserved, best.point, budget):
                break
            candidate = self._result(point)
            if candidate is not None and candidate.fits and candidate.seconds <= fastest * (1 + TIE):
                best = best_first([best, candidate, *found], budget)[0]
        return best

    def closest(self, where: Predicate, vain: float = inf) -> Candidate | None:
        """Where none of those that `where` picks fits: the one that misses the budgets by least, of those looked at
        until `vain` in a row were no closer; of pipelines one of those that miss by little."""
        plain, pipeline = self._closest_plain(where, vain), self._pipelines.closest(where)
        return min((each for each in (plain, pipeline) if each is not None), key=self._distance, default=None)

    def _closest_plain(self, where: Predicate, vain: float) -> Candidate | None:
        nearest: Candidate | None = None
        further = 0
        for bound, point in self._by_memory:
            if nearest is not None and (bound >= self._distance(nearest) or further >= vain):
                break
            candidate = self._measure(point) if where(point) else None
            if candidate is None:
                continue
            further += 1
            if nearest is None or self._distance(candidate) < self._distance(nearest):
                nearest, further = candidate, 0
        return nearest

    def _distance(self, candidate: Candidate) -> tuple[int, tuple[int, ...]]:
        return distance(self._predictor, candidate)

    def _result(self, point: Point) -> Candidate | None:
        """The configuration predicted in full; None where a bound says that it cannot fit."""
        if point in self._results:
            return self._results[point]
        kind = replace(point, micro_batch=0, accumulation=0)
        if point.accumulation > 1 and self._full.get(kind, inf) < point.micro_batch:
            return None
        candidate = self._measure(point)
        if candidate is not None and not candidate.fits and point.accumulation > 1:
            self._full[kind] = min(point.micro_batch, self._full.get(kind, point.micro_batch))
        return candidate

    def _measure(self, point: Point) -> Candidate | None:
        if point not in self._results:
            candidate = least_that_fits(self._predictor, point)
            if candidate is not None and candidate.fits:
                candidate = timed(self._predictor, candidate)
            self._results[point] = candidate
        return self._results[point]


def distance(predictor: Predictor, candidate: Candidate) -> tuple[int, tuple[int, ...]]:
    """Smaller is closer to fitting."""
    return shortfall(predictor, candidate), simplicity(candidate.point)


def _first(entry: tuple[Any, ...]) -> Any:
    return entry[0]


def least_that_fits(predictor: Predictor, configuration: Point) -> Candidate | None:
    """The configuration with the fewest checkpointed blocks that fit, or with those that come closest; None where the
    job permits no number of blocks."""
    permitted = permitted_blocks(predictor.job, block_count(predictor.profile))
    saving = _largest_saving(predictor, configuration)
    closest: Candidate | None = None
    least = 0.0
    for blocks in permitted:
        if blocks < least and blocks != permitted[-1]:
            continue
        candidate = measure(predictor, replace(configuration, checkpointed=blocks))
        if candidate.fits:
            return candidate
        if closest is None or shortfall(predictor, candidate) < shortfall(predictor, closest):
            closest = candidate
        if candidate.peak.recomputes:
            break
        if blocks == permitted[0] and saving > 0:
            least = blocks + (candidate.reserved - predictor.device_budget) / saving
    return closest


def _largest_saving(predictor: Predictor, configuration: Point) -> float:
    """Most reserved bytes that checkpointing one more block can save."""
    dtype = PRECISIONS[configuration.precision].compute
    blocks = [unit.costs[dtype].saved for unit in predictor.profile.units if unit.kind == "block"]
    size = configuration.micro_batch
    saved = max((saved["none"].at(size) - saved["full"].at(size) for saved in blocks), default=0)
    return predictor.memory.reserved(saved)
