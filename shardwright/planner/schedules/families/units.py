"""ZeroPP: micro-batches in units, so that a block's parameters are gathered once for all of a unit.

[Note: units]
Tang et al., "Adaptive Blockwise Task-interleaved Pipeline Parallelism" (first "ZeroPP: Unleashing Exceptional
Parallelism Efficiency through Tensor-Parallelism-Free Methodology"), arXiv 2402.03791: stages are placed in a loop, a
unit's U micro-batches pass a rank's chunk before the next chunk's turn, and F, I and W of units that follow each other
are interleaved, so that W's fill bubbles. A chunk's parameters are then gathered 2 ceil(m / U) times a step, and more
micro-batches are held the larger U is. The paper does not print the order of its later version. This one is interleaved
1F1B with groups of U instead of p micro-batches, a shorter warm-up as in ZB-H1, and W's that come late by a number of
I's that grows with the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from shardwright.planner.schedules.families.family import DoesNotFitError
from shardwright.planner.schedules.simulator import simulate
from shardwright.planner.schedules.timetable import Action, Costs, Layout, Timetable

_SHAPES = ((1, 1), (2, 1), (2, 2))
"""Forwards of the warm-up, and I's that a W comes late, for each rank behind or before this one."""


def zeropp(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """[Note: units]. Units of p micro-batches, which holds least; under a memory limit, the units of p, 2p, 4p ... or
    all micro-batches that give the shortest schedule within it, the largest of these."""
    best: tuple[float, int, Timetable] | None = None
    for unit in _units(layout.ranks, micro_batches, limits is not None):
        for warm_up, late in _SHAPES:
            timetable = in_units(layout, micro_batches, unit, warm_up, late)
            simulation = simulate(timetable, layout, costs)
            if simulation.beyond(limits):
                continue
            # As fast counts for a larger unit, not for a longer warm-up, which only holds more.
            allowance = 1e-9 if best is not None and unit > best[1] else -1e-9
            if best is None or simulation.span < best[0] * (1 + allowance):
                best = simulation.span, unit, timetable
    if best is None:
        raise DoesNotFitError("a unit of micro-batches does not fit into this memory")
    return best[2]


def _units(ranks: int, micro_batches: int, larger: bool) -> Iterator[int]:
    unit = min(ranks, micro_batches)
    yield unit
    while larger and 2 * unit <= micro_batches:
        unit *= 2
        yield unit


def in_units(layout: Layout, micro_batches: int, unit: int, warm_up: int, late: int) -> Timetable:
    """[Note: units] with units of `unit` micro-batches or a few more, if they do not divide into such; `warm_up` and
    `late` as in `_SHAPES`."""
    ranks, chunks = layout.ranks, layout.chunks
    number = max(1, micro_batches // unit)
    bounds = [micro_batches * each // number for each in range(number + 1)]
    units = [range(*pair) for pair in pairwise(bounds)]
    forwards = [Action("F", chunk, each) for unit in units for chunk in range(chunks) for each in unit]
    inputs = [Action("I", chunk, each) for unit in units for chunk in reversed(range(chunks)) for each in unit]
    weights = [Action("W", chunk, each) for _, chunk, each in inputs]
    longest = max(map(len, units))
    timetable = []
    for rank in range(ranks):
        first = min((chunks - 1) * longest + 1 + warm_up * (ranks - 1 - rank), len(forwards))
        actions = forwards[:first]
        for index, backward in enumerate(inputs):
            actions.append(backward)
            actions += weights[index - late * rank :][:1] if index >= late * rank else ()
            actions += forwards[first + index :][:1]
        actions += weights[max(0, len(inputs) - late * rank) :]
        timetable.append(tuple(actions))
    return tuple(timetable)
