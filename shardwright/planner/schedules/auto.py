"""zb-auto: a search for the shortest schedule within a memory limit per rank.

[Note: how it searches]
Lower bounds come first ([Note: bound of the work] and those after it): a schedule that meets one ends the search. Until
then it tries orders of F and I that are known to be good, filled with W's ([Note: filling]); the fixed families; list
scheduling against a target ([Note: dispatch]) with a portfolio of rules, then with the best of them varied. The best of
these is improved by local search ([Note: moves]) or, if the problem is small, by dynamic programming ([Note: states of
a schedule]). The number of passes is limited, not the time, and what is random has a fixed seed: the same input gives
the same schedule.

[Note: more memory is never worse]
A pass that sees more memory can do worse with it. So the search runs at the limit and, down a grid of smaller limits,
at each of them as if it were the limit; the best of all counts. Whatever a limit of the grid yields, a larger one has
seen too. Most of the grid is never tried: a bound rises as memory falls, and once it reaches the best span found,
nothing below can be better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import ceil, log2

from shardwright.planner.schedules.bounds import bound_of
from shardwright.planner.schedules.candidates import constructed, listed
from shardwright.planner.schedules.families.family import DoesNotFitError
from shardwright.planner.schedules.improve import improve, replay
from shardwright.planner.schedules.passes import Pass, number, timetable_of
from shardwright.planner.schedules.problem import TOLERANCE, Problem, make_problem
from shardwright.planner.schedules.small import solve
from shardwright.planner.schedules.timetable import Costs, Layout, Timetable

PASSES = 96
"""Passes of list scheduling at each limit."""
_FEWEST = 10
_ACTIONS = 6000
"""Schedules of more actions get fewer passes, in proportion, but no fewer than `_FEWEST`."""
_MANY = 30_000
"""Schedules of more actions are searched at fewer limits."""
_SMALL = 72
"""Schedules of no more actions are searched for the best of all."""
_MOVES = 1000
_MOVED = 200_000
"""Moves of the local search at each limit, at most, and times the actions of the schedule."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best schedule of a search."""

    timetable: Timetable
    span: float
    """The longest over the ranks, as `Simulation.span`."""
    bound: float
    """No schedule within the limits has a shorter one."""

    @property
    def gap(self) -> float:
        """By how much the span may be too long, as a share of the bound."""
        return self.span / self.bound - 1.0 if self.bound > 0 else 0.0


def search(
    layout: Layout,
    costs: Costs,
    micro_batches: int,
    limits: Sequence[float] | None = None,
    passes: int = PASSES,
) -> Found:
    """The best schedule found: [Note: how it searches]. `limits`: memory per rank in units of `Costs.activations`, or
    None; `passes` at each limit tried. Raises DoesNotFitError where a rank cannot hold one micro-batch."""
    problem = make_problem(layout, costs, micro_batches, limits)
    _demand_room(problem)
    bound, best = bound_of(problem), None
    for cap in _caps(problem):
        rung = problem.under(cap)
        least = bound_of(rung)
        if best is not None and least >= best.span * (1 - TOLERANCE):
            break
        found = _search_at(rung, least, passes)
        if found is not None and (best is None or found.span < best.span):
            best = found
    assert best is not None, "one micro-batch after the other is a schedule"
    return Found(timetable_of(problem, best.orders), best.span, bound)


def _demand_room(problem: Problem) -> None:
    for rank, (needed, limit) in enumerate(zip(problem.kept, problem.limits, strict=True)):
        if needed > limit * (1 + TOLERANCE):
            raise DoesNotFitError(
                f"rank {rank} keeps {needed:g} for one micro-batch, more than its memory limit of {limit:g}"
            )


def _caps(problem: Problem) -> Iterator[float]:
    """The limit, and below it the grid: steps of half a micro-batch (of more with more than 8 ranks; of p / 4 for
    schedules of many actions) up to 2 p of them, of p / 2 above; down to what one micro-batch needs on every rank."""
    ranks, unit, top = problem.layout.ranks, problem.unit, max(problem.limits)
    yield top
    many = 3 * problem.layout.stages * problem.micro_batches > _MANY
    fine = ranks / 4 if many else 0.5 * 2.0 ** max(0, ceil(log2(ranks / 8)))
    coarse = ranks / 2
    knee = 2 * ranks
    grid = [knee + coarse * n for n in range(1, 1 + int((top / unit - knee) / coarse))] if top > knee * unit else []
    grid = [fine * n for n in range(1, 1 + int(knee / fine))] + grid
    for cap in reversed(grid):
        if 1.0 <= cap < top / unit * (1 - TOLERANCE):
            yield cap * unit


def _search_at(problem: Problem, bound: float, passes: int) -> Pass | None:
    """The best pass at one limit; ends where the bound is met."""
    numbered, best = number(problem), None
    actions = 3 * numbered.size
    allowed = max(min(passes, _FEWEST), int(passes * min(1.0, _ACTIONS / actions)))
    for found in chain(constructed(numbered, bound), islice(listed(numbered, bound), allowed)):
        if found is not None and (best is None or found.span < best.span):
            best = replay(numbered, found.orders) or found
            if best.span <= bound * (1 + TOLERANCE):
                return best
    if best is not None and actions <= _SMALL:
        return solve(numbered, best.span) or best
    return best and improve(numbered, best, bound, moves=min(_MOVES, _MOVED // actions) * passes // PASSES)
