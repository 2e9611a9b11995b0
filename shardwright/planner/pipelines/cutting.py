"""Where a model is cut into stages, and how many blocks of each stage are recomputed, so that every rank fits.

[Note: in flight]
How much a rank holds at a moment follows from its timetable alone: for each of its stages the micro-batches between F
and I, and those between I and W. Of all moments only those matter that no other one exceeds in everything.

[Note: which blocks are recomputed]
A stage recomputes its first blocks, as few as let its rank fit. In a schedule like 1F1B early ranks hold more
micro-batches than late ones, so they recompute more, and get fewer blocks for it: the price of a stage is its time with
what it then has to recompute. Where a rank has several stages, each may fill an equal part of its memory while the
model is cut; after that the rank's memory is one, and the blocks that free most for their time are recomputed first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from math import inf
from operator import ge

from shardwright.planner.schedules.timetable import Layout, Timetable

CLOSE = 1e-4
"""The slowest stage of a cut is within this share of the shortest possible."""

Price = Callable[[int, int, int], float]
"""Seconds of a stage with the segments from one up to another, exclusive; never less with more of them, inf where it
cannot hold them: `price(stage, first, last)`."""


@dataclass(frozen=True, slots=True)
class Held:
    """Micro-batches that a rank holds at one moment, of each of its stages ([Note: in flight])."""

    active: tuple[int, ...]
    """Between F and I."""
    waiting: tuple[int, ...]
    """Between I and W."""


def in_flight(timetable: Timetable, layout: Layout) -> tuple[tuple[Held, ...], ...]:
    """Of each rank the moments at which it holds most ([Note: in flight])."""
    return tuple(_largest(_moments(actions, layout.chunks)) for actions in timetable)


def _moments(actions: Iterable[tuple[str, int, int]], chunks: int) -> Iterator[tuple[int, ...]]:
    """After every F and I; what an action lets go of is free at its end."""
    held = [0] * (2 * chunks)
    for kind, chunk, _ in actions:
        if kind == "F":
            held[chunk] += 1
        elif kind == "W":
            held[chunks + chunk] -= 1
            continue
        else:
            held[chunk] -= 1
            held[chunks + chunk] += kind == "I"
        yield tuple(held)


def _largest(moments: Iterable[tuple[int, ...]]) -> tuple[Held, ...]:
    kept: list[tuple[int, ...]] = []
    for moment in sorted(set(moments), key=sum, reverse=True):
        if not any(all(map(ge, other, moment)) for other in kept):
            kept.append(moment)
    return tuple(Held(moment[: len(moment) // 2], moment[len(moment) // 2 :]) for moment in kept)


def divide(price: Price, units: int, stages: int, ends: Sequence[int]) -> tuple[int, ...] | None:
    """Where the stages of `units` segments end, exclusive, the last one's end left out: such that the slowest is as
    fast as it can be (within CLOSE), and of such cuts one with the least sum of squares. `ends`: those permitted,
    ascending. None where nothing fits."""
    permitted = (*ends, units)
    if not 0 < stages <= len(permitted):
        return None
    price = cache(price)
    low, best = 0.0, _within(inf, price, stages, permitted)
    if best is None:
        return None
    high = _slowest(price, best)
    while high > low * (1 + CLOSE):
        middle = (low + high) / 2
        found = _within(middle, price, stages, permitted)
        if found is None:
            low = middle
        else:
            best, high = found, _slowest(price, found)
    return _even(high * (1 + 1e-12), price, stages, permitted)[:-1]


def _slowest(price: Price, ends: Sequence[int]) -> float:
    return max(price(stage, first, last) for stage, (first, last) in enumerate(zip((0, *ends), ends, strict=False)))


def _within(limit: float, price: Price, stages: int, permitted: Sequence[int]) -> tuple[int, ...] | None:
    """A cut whose stages take no longer than a limit: each as many segments as it can, as long as every later one
    gets one."""
    latest = _latest(limit, price, stages, permitted)
    return None if latest is None or latest[-1] != len(permitted) - 1 else tuple(permitted[at] for at in latest)


def _latest(limit: float, price: Price, stages: int, permitted: Sequence[int]) -> list[int] | None:
    """Of every stage the last end, as an index, that it can have."""
    first, begun, found = 0, -1, []
    for stage in range(stages):
        least, most = begun + 1, len(permitted) - (stages - stage)
        # The first end that is too far; inf may be a price within an infinite limit.
        at = bisect_left(
            range(least, most + 1),
            True,
            key=partial(_ends_late, limit, price, stage, first, permitted),
        )
        if at == 0:
            return None
        begun = least + at - 1
        first = permitted[begun]
        found.append(begun)
    return found


def _ends_late(limit: float, price: Price, stage: int, first: int, permitted: Sequence[int], end: int) -> bool:
    return _over(price(stage, first, permitted[end]), limit)


def _begins_late(limit: float, price: Price, stage: int, last: int, permitted: Sequence[int], begun: int) -> bool:
    """Late enough for the stage to be within the limit."""
    return not _over(price(stage, permitted[begun], last), limit)


def _over(seconds: float, limit: float) -> bool:
    return seconds > limit or seconds == inf


def _earliest(limit: float, price: Price, stages: int, permitted: Sequence[int]) -> list[int]:
    """Of every stage the first end that it can have for those behind it to take no longer than the limit."""
    end, found = len(permitted) - 1, [len(permitted) - 1]
    for stage in range(stages - 1, 0, -1):
        last = permitted[end]
        end = bisect_left(
            range(stage - 1, end),
            True,
            key=partial(_begins_late, limit, price, stage, last, permitted),
        ) + (stage - 1)
        found.append(end)
    return found[::-1]


def _even(limit: float, price: Price, stages: int, permitted: Sequence[int]) -> tuple[int, ...]:
    """Of the cuts within a limit that can be kept the most even one, by dynamic programming over the ends of stages."""
    latest = _latest(limit, price, stages, permitted)
    assert latest is not None, "there is a cut within the limit"
    earliest = _earliest(limit, price, stages, permitted)
    best: dict[int, tuple[float, tuple[int, ...]]] = {-1: (0.0, ())}
    for stage, (least, most) in enumerate(zip(earliest, latest, strict=True)):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for begun, (total, ends) in best.items():
            first = permitted[begun] if begun >= 0 else 0
            for end in range(max(least, begun + 1), most + 1):
                seconds = price(stage, first, permitted[end])
                if _over(seconds, limit):
                    break
                squared = total + seconds * seconds
                if end not in reached or squared < reached[end][0]:
                    reached[end] = squared, (*ends, permitted[end])
        best = reached
    return best[len(permitted) - 1][1]


@dataclass(frozen=True, slots=True)
class Weights:
    """What the segments of a model weigh, each for one micro-batch where nothing else is said."""

    seconds: Sequence[float]
    """F, I and W with nothing recomputed."""
    recompute: Sequence[float]
    """More of I when it is recomputed; 0 for embedding and head."""
    saved: Sequence[int]
    """Bytes from F to I."""
    saved_inputs: Sequence[int]
    """The same when it is recomputed."""
    held_by_weight: Sequence[int]
    """Bytes from I to W."""
    states: Sequence[float]
    """Bytes that are always there: parameters, gradients and optimizer states."""

    @property
    def units(self) -> int:
        """Segments: the blocks, and what lies before and after them."""
        return len(self.seconds)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one stage may take."""

    held: Held
    """Micro-batches of this stage alone."""
    room: float
    """Bytes for its states and activations."""


def stage_price(weights: Weights, allowances: Sequence[Allowance]) -> Price:
    """Seconds of a stage with what it has to recompute ([Note: which blocks are recomputed])."""
    seconds, states = _sums(weights.seconds), _sums(weights.states)
    again, saved = _sums(weights.recompute), _sums(weights.saved)
    inputs, held = _sums(weights.saved_inputs), _sums(weights.held_by_weight)
    final = weights.units - 1

    def price(stage: int, first: int, last: int) -> float:
        allowed = allowances[stage]
        active, waiting = allowed.held.active[0], allowed.held.waiting[0]
        begin, end = max(first, 1), min(last, final)
        """The stage's blocks."""
        room = allowed.room - (states[last] - states[first]) - waiting * (held[last] - held[first])
        plain = seconds[last] - seconds[first]
        blocks = max(0, end - begin)

        def fits(count: int) -> bool:
            middle = begin + count
            kept = saved[last] - saved[first] - (saved[middle] - saved[begin]) + (inputs[middle] - inputs[begin])
            return active * kept <= room

        if fits(0):
            return plain
        count = bisect_left(range(1, blocks + 1), True, key=fits) + 1
        return plain + again[begin + count] - again[begin] if count <= blocks else inf

    return price


def _sums(values: Sequence[float]) -> list[float]:
    return [0.0, *accumulate(values)]


@dataclass(frozen=True, slots=True)
class StageChoice:
    """What checkpointing can do for one stage of a rank."""

    kept: Sequence[float]
    """Bytes from F to I with none, one, two, ... of its blocks recomputed."""
    held: float
    """Bytes from I to W."""
    recompute: Sequence[float]
    """Seconds of recomputing none, one, two, ... of them."""


def fewest(stages: Sequence[StageChoice], moments: Sequence[Held], room: float) -> tuple[int, ...] | None:
    """Of every stage of one rank the blocks to recompute for all moments to fit into its room: one after the other
    those that free most for their time where it is fullest. None where even all are not enough."""
    counts = [0] * len(stages)
    while True:
        needs = [_need(stages, moment, counts) for moment in moments]
        fullest = max(range(len(moments)), key=needs.__getitem__, default=None)
        if fullest is None or needs[fullest] <= room:
            return tuple(counts)
        best = max(_gains(stages, moments[fullest], counts), default=None)
        if best is None:
            return None
        counts[-best[1]] += 1


def _need(stages: Sequence[StageChoice], moment: Held, counts: Sequence[int]) -> float:
    active = sum(each * stage.kept[count] for each, stage, count in zip(moment.active, stages, counts, strict=True))
    return active + sum(each * stage.held for each, stage in zip(moment.waiting, stages, strict=True))


def _gains(stages: Sequence[StageChoice], moment: Held, counts: Sequence[int]) -> Iterable[tuple[float, int]]:
    """Bytes freed a second by one more block of each stage that has one left, with the stage's number, negated: of
    equal ones the first."""
    for index, (stage, count) in enumerate(zip(stages, counts, strict=True)):
        if count + 1 < len(stage.kept):
            freed = moment.active[index] * (stage.kept[count] - stage.kept[count + 1])
            seconds = stage.recompute[count + 1] - stage.recompute[count]
            if freed > 0:
                yield freed / max(seconds, 1e-12), -index
