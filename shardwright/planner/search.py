"""Search of the whole space: the fastest point that fits.

[Note: checkpointing in the search]
Time grows with the number of checkpointed blocks and nothing else does with it, so for every configuration of the rest
only the least number that fits is of interest. Memory falls with it except in the backward of a checkpointed block,
which needs the recomputed activations beside what is saved before it: once that phase alone is over the budget, no
larger number can fit. One block saves at most what the largest of them keeps for backward, which gives the number to
start from. Memory grows with the micro-batch as long as micro-batches accumulate, so a size at which nothing fits ends
the larger ones, but for the one that needs no accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import nan

from shardwright.planner.memory import Phase
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.predict import Predictor
from shardwright.planner.space import Point, block_count, configurations, permitted_blocks

TIE = 0.005
"""Step times this close to the shortest (relative) count as equal to it: predictions are not better than that. Among
them less memory wins, then the simpler point."""
MEMORY_TIE = 20
"""Memory counts as equal within this part of the budget: little of it is no reason to leave the simpler point."""


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


@dataclass(frozen=True, slots=True)
class Found:
    """What the search found, best first."""

    feasible: Sequence[Candidate]
    infeasible: Sequence[Candidate]
    """Closest to fitting first."""
    considered: int
    """Configurations, each with its best checkpointing; those that a smaller micro-batch rules out are counted."""


def simplicity(point: Point) -> tuple[int, ...]:
    """Smaller is simpler: fewer blocks recomputed, less sharding, gradients reduced at once, fewer micro-batches."""
    engines = ("single", "ddp", "fsdp2")
    waits = point.gradient_degree != point.shard
    return point.checkpointed, engines.index(point.engine), point.shard, bool(point.kept), waits, point.accumulation


def search(predictor: Predictor) -> Found:
    """Every permitted configuration with its best checkpointing ([Note: checkpointing in the search])."""
    feasible, infeasible, considered = [], [], 0
    full: set[Point] = set()
    for configuration in configurations(predictor.job, predictor.profile):
        considered += 1
        kind = replace(configuration, micro_batch=0, accumulation=0)
        if configuration.accumulation > 1 and kind in full:
            continue
        candidate = least_that_fits(predictor, configuration)
        if candidate is None:
            continue
        if candidate.fits:
            feasible.append(timed(predictor, candidate))
        else:
            infeasible.append(candidate)
            full.add(kind)
    infeasible.sort(key=lambda each: (shortfall(predictor, each), simplicity(each.point)))
    return Found(best_first(feasible, predictor.device_budget), infeasible, considered)


def best_first(candidates: Sequence[Candidate], budget: int) -> list[Candidate]:
    """Those that tie with the fastest, least memory and then simplest first; behind them the others by time."""
    fastest = min((each.seconds for each in candidates), default=nan)

    def order(each: Candidate) -> tuple[float, int, tuple[int, ...], int]:
        time = max(each.seconds, fastest * (1 + TIE))
        return time, each.reserved * MEMORY_TIE // budget, simplicity(each.point), each.reserved

    return sorted(candidates, key=order)


def least_that_fits(predictor: Predictor, configuration: Point) -> Candidate | None:
    """The configuration with the fewest checkpointed blocks that fit, or with those that come closest; None where the
    job permits no number of blocks."""
    closest: Candidate | None = None
    for blocks in _worth_trying(predictor, configuration):
        candidate = measure(predictor, replace(configuration, checkpointed=blocks))
        if candidate.fits:
            return candidate
        if closest is None or shortfall(predictor, candidate) < shortfall(predictor, closest):
            closest = candidate
        if candidate.peak.recomputes:
            break
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
    device = max(0, candidate.reserved - predictor.device_budget)
    return device + max(0, candidate.host - predictor.job.host_memory_limit)


def _worth_trying(predictor: Predictor, configuration: Point) -> Iterator[int]:
    """Permitted numbers of checkpointed blocks, without those that cannot save enough."""
    permitted = permitted_blocks(predictor.job, block_count(predictor.profile))
    if not permitted:
        return
    yield permitted[0]
    first = replace(configuration, checkpointed=permitted[0])
    excess = predictor.memory.reserved(predictor.memory.peak(first).total) - predictor.device_budget
    saving = _largest_saving(predictor, configuration)
    least = permitted[0] + (excess / saving if saving > 0 else 0)
    yield from (blocks for blocks in permitted[1:] if blocks >= least or blocks == permitted[-1])


def _largest_saving(predictor: Predictor, configuration: Point) -> float:
    """Most reserved bytes that checkpointing one more block can save."""
    dtype = PRECISIONS[configuration.precision].compute
    blocks = [unit.costs[dtype].saved for unit in predictor.profile.units if unit.kind == "block"]
    size = configuration.micro_batch
    saved = max((saved["none"].at(size) - saved["full"].at(size) for saved in blocks), default=0)
    return predictor.memory.reserved(saved)
