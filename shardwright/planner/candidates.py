"""Points that were looked at, and which of them is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan

from shardwright.planner.engines import ENGINES
from shardwright.planner.memory import Phase
from shardwright.planner.predict import Predictor
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.space import Point

TIE = 0.005
"""Step times this close to the shortest (relative) count as equal to it: predictions are not better than that. Among
them less memory wins, then the simpler point."""
MEMORY_TIE = 20
"""Memory counts as equal within this part of the budget: little of it is no reason to leave the simpler point."""

METHODS = ("none", "gather", "ring", "ulysses")
"""Of context parallelism, the simplest first."""

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
    """Smaller is simpler: nothing shared but samples, fewer blocks recomputed, no pipeline or one of fewer stages, less
    sharding, gradients reduced at once, fewer micro-batches."""
    extras = len(point.axes) + (point.secondary is not None) + len(point.int8_gathers) + len(point.int4_reductions)
    waits = point.gradient_degree != point.optimizer_degree
    pipe = point.pipe
    shared = point.parallel
    return (
        shared.tp * shared.cp * shared.ep,
        shared.tp * shared.cp,
        shared.cp,
        METHODS.index(shared.method),
        point.recomputed,
        list(ENGINES).index(point.engine),
        0 if pipe is None else pipe.ranks * pipe.chunks,
        0 if pipe is None else list(SCHEDULES).index(pipe.schedule),
        extras,
        point.shard,
        point.optimizer_degree,
        bool(point.kept),
        waits,
        point.accumulation,
    )


def memory_rank(reserved: int, point: Point, budget: int) -> tuple[int, tuple[int, ...]]:
    """Among equally fast ones the lower is better."""
    return reserved * MEMORY_TIE // budget, simplicity(point)


def best_first(candidates: Sequence[Candidate], budget: int) -> list[Candidate]:
    """Those that tie with the fastest, least memory and then simplest first; behind them the others by time."""
    fastest = min((each.seconds for each in candidates), default=nan)

    def order(each: Candidate) -> tuple[float, int, tuple[int, ...], int]:
        time = max(each.seconds, fastest * (1 + TIE))
        return time, *memory_rank(each.reserved, each.point, budget), each.reserved

    return sorted(candidates, key=order)


def measure(predictor: Predictor, point: Point) -> Candidate:
    """A point's memory against the budgets. Raises InputError where its schedule cannot be made."""
    peak, memory = predictor.peak(point), predictor.of(point.parallel).memory
    reserved = memory.reserved(peak.total)
    host = memory.host_bytes(point, peak.total)
    fits = reserved <= predictor.device_budget and host <= predictor.job.host_memory_limit
    return Candidate(point, peak, reserved, host, fits)


def timed(predictor: Predictor, candidate: Candidate) -> Candidate:
    """The candidate with its step time."""
    return replace(candidate, seconds=predictor.step(candidate.point).seconds)


def shortfall(predictor: Predictor, candidate: Candidate) -> int:
    """Bytes by which a candidate misses its budgets, device and host together."""
    return missing(predictor, candidate.reserved, candidate.host)


def missing(predictor: Predictor, reserved: int, host: int) -> int:
    """Bytes by which so many miss the budgets of a device and of a host."""
    return max(0, reserved - predictor.device_budget) + max(0, host - predictor.job.host_memory_limit)
