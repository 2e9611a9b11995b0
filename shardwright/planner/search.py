"""Search of the whole space: the fastest point that fits.

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

[Note: stock engines first]
PyTorch's own engines have been run on many GPUs, ours has not. So `amsp` is taken where nothing else fits, or where the
prediction says that it is faster by OWN_ENGINE_GAIN at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, nan
from typing import Any, NamedTuple

from shardwright.planner.engines import ENGINES
from shardwright.planner.memory import Phase
from shardwright.planner.names import family
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.predict import Predictor
from shardwright.planner.space import Point, block_count, configurations, permitted_blocks

TIE = 0.005
"""Step times this close to the shortest (relative) count as equal to it: predictions are not better than that. Among
them less memory wins, then the simpler point."""
MEMORY_TIE = 20
"""Memory counts as equal within this part of the budget: little of it is no reason to leave the simpler point."""
OWN_ENGINE_GAIN = 0.05
"""By how much faster `amsp` has to be than the best stock engine ([Note: stock engines first])."""

Predicate = Callable[[Point], bool]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point that was looked at."""

    point: Point
    peak: Phase
    reserved: int
    host: int
    fits: bool
    seconds: float = nan
    """Step time, once it was asked for."""


def simplicity(point: Point) -> tuple[int, ...]:
    """Smaller is simpler: fewer blocks recomputed, less sharding, gradients reduced at once, fewer micro-batches."""
    extras = len(point.axes) + (point.secondary is not None) + len(point.int8_gathers) + len(point.int4_reductions)
    waits = point.gradient_degree != point.optimizer_degree
    return (
        point.checkpointed,
        list(ENGINES).index(point.engine),
        extras,
        point.shard,
        point.optimizer_degree,
        bool(point.kept),
        waits,
        point.accumulation,
    )


class _Bounds(NamedTuple):
    """What a configuration takes at least."""

    seconds: float
    reserved: int
    blocks: int
    """Checkpointed."""
    point: Point


class Search:
    """The space of one job, every question about it answered exactly ([Note: bounds])."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        memory, budget = predictor.memory, predictor.device_budget
        permitted = permitted_blocks(predictor.job, block_count(predictor.profile))
        self._by_memory: list[tuple[tuple[int, tuple[int, ...]], Point]] = []
        bounds: list[_Bounds] = []
        for point in configurations(predictor.job, predictor.profile):
            floor = memory.at_rest_floor(point)
            reserved = memory.reserved(floor)
            missing = _missing(predictor, reserved, memory.host_bytes(point, floor))
            self._by_memory.append(((missing, simplicity(point)), point))
            fewest = None if missing else memory.fewest_blocks(point, budget)
            blocks = None if fewest is None else next((each for each in permitted if each >= fewest), None)
            if blocks is not None:
                seconds = predictor.time.least(replace(point, checkpointed=blocks))
                bounds.append(_Bounds(seconds, reserved, blocks, point))
        self._by_memory.sort(key=_first)
        self._by_time = sorted(bounds, key=_first)
        self._results: dict[Point, Candidate | None] = {}
        self._full: dict[Point, int] = {}

    @property
    def considered(self) -> int:
        """Configurations, each with its best checkpointing."""
        return len(self._by_memory)

    @cached_property
    def families(self) -> list[str]:
        """The methods that have points here, those that need least memory first."""
        return list(dict.fromkeys(family(point) for _, point in self._by_memory))

    @property
    def measured(self) -> int:
        """Those that were predicted in full so far."""
        return sum(result is not None for result in self._results.values())

    @property
    def feasible(self) -> list[Candidate]:
        """Those of them that fit, best first."""
        return best_first([each for each in self._measured() if each.fits], self._predictor.device_budget)

    @property
    def infeasible(self) -> list[Candidate]:
        """Those of them that do not, closest first."""
        return sorted((each for each in self._measured() if not each.fits), key=self._distance)

    def chosen(self) -> Candidate | None:
        """The plan's point, or None where nothing fits ([Note: stock engines first])."""
        stock = self.best(lambda point: not ENGINES[point.engine].flat)
        enough = inf if stock is None else stock.seconds / (1 + OWN_ENGINE_GAIN)
        return self.best(lambda point: ENGINES[point.engine].flat, at_most=enough) or stock

    def best(self, where: Predicate, at_most: float = inf) -> Candidate | None:
        """The fastest configuration that fits, of those that `where` picks and that take `at_most` so many seconds;
        ties as `best_first` has them."""
        picked = [each for each in self._by_time if where(each.point) and each.seconds <= at_most]
        found = [each for each in self._ascending(picked, slack=0.0) if each.seconds <= at_most]
        if not found:
            return None
        fastest = min(each.seconds for each in found)
        return self._simplest(found, [each for each in picked if each.seconds <= fastest * (1 + TIE)], fastest)

    def example(self, where: Predicate) -> Candidate | None:
        """A configuration that `where` picks and that fits, such that none is faster by more than TIE."""
        picked = [each for each in self._by_time if where(each.point)]
        found = self._ascending(picked, slack=TIE)
        return best_first(found, self._predictor.device_budget)[0] if found else None

    def _ascending(self, picked: list[_Bounds], slack: float) -> list[Candidate]:
        """Those that fit, predicted in the order of their bounds until none can be faster, but for `slack`."""
        found: list[Candidate] = []
        fastest = inf
        for each in picked:
            if each.seconds >= fastest * (1 - slack):
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
            (_rank(each.reserved, replace(each.point, checkpointed=each.blocks), budget), each.point) for each in ties
        ]
        for bound, point in sorted(bounds, key=_first):
            if bound > _rank(best.reserved, best.point, budget):
                break
            candidate = self._result(point)
            if candidate is not None and candidate.fits and candidate.seconds <= fastest * (1 + TIE):
                best = best_first([best, candidate, *found], budget)[0]
        return best

    def closest(self, where: Predicate) -> Candidate | None:
        """Where none of those that `where` picks fits: the one that misses the budgets by least."""
        nearest: Candidate | None = None
        for bound, point in self._by_memory:
            if nearest is not None and bound >= self._distance(nearest):
                break
            candidate = self._measure(point) if where(point) else None
            if candidate is not None and (nearest is None or self._distance(candidate) < self._distance(nearest)):
                nearest = candidate
        return nearest

    def _measured(self) -> Iterator[Candidate]:
        return (result for result in self._results.values() if result is not None)

    def _distance(self, candidate: Candidate) -> tuple[int, tuple[int, ...]]:
        return shortfall(self._predictor, candidate), simplicity(candidate.point)

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


def _first(entry: tuple[Any, ...]) -> Any:
    return entry[0]


def _rank(reserved: int, point: Point, budget: int) -> tuple[int, tuple[int, ...]]:
    """Among equally fast ones the lower is better."""
    return reserved * MEMORY_TIE // budget, simplicity(point)


def best_first(candidates: Sequence[Candidate], budget: int) -> list[Candidate]:
    """Those that tie with the fastest, least memory and then simplest first; behind them the others by time."""
    fastest = min((each.seconds for each in candidates), default=nan)

    def order(each: Candidate) -> tuple[float, int, tuple[int, ...], int]:
        time = max(each.seconds, fastest * (1 + TIE))
        return time, *_rank(each.reserved, each.point, budget), each.reserved

    return sorted(candidates, key=order)


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


def measure(predictor: Predictor, point: Point) -> Candidate:
    """A point's memory against the budgets."""
    peak = predictor.memory.peak(point)
    reserved = predictor.memory.reserved(peak.total)
    host = predictor.memory.host_bytes(point, peak.total)
    fits = reserved <= predictor.device_budget and host <= predictor.job.host_memory_limit
    return Candidate(point, peak, reserved, host, fits)


def timed(predictor: Predictor, candidate: Candidate) -> Candidate:
    """The candidate with its step time."""
    return replace(candidate, seconds=predictor.time.step(candidate.point).seconds)


def shortfall(predictor: Predictor, candidate: Candidate) -> int:
    """Bytes by which a candidate misses its budgets, device and host together."""
    return _missing(predictor, candidate.reserved, candidate.host)


def _missing(predictor: Predictor, reserved: int, host: int) -> int:
    return max(0, reserved - predictor.device_budget) + max(0, host - predictor.job.host_memory_limit)


def _largest_saving(predictor: Predictor, configuration: Point) -> float:
    """Most reserved bytes that checkpointing one more block can save."""
    dtype = PRECISIONS[configuration.precision].compute
    blocks = [unit.costs[dtype].saved for unit in predictor.profile.units if unit.kind == "block"]
    size = configuration.micro_batch
    saved = max((saved["none"].at(size) - saved["full"].at(size) for saved in blocks), default=0)
    return predictor.memory.reserved(saved)
