"""The passes of a search at one memory limit, the most promising first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from shardwright.planner.schedules.blocks import blocks
from shardwright.planner.schedules.dispatch import Rules, dispatch
from shardwright.planner.schedules.families.family import DoesNotFitError
from shardwright.planner.schedules.families.v_blocks import from_block
from shardwright.planner.schedules.filling import fill
from shardwright.planner.schedules.improve import replay
from shardwright.planner.schedules.orders import alternating, one_by_one, turns
from shardwright.planner.schedules.passes import Numbered, Pass, orders_of
from shardwright.planner.schedules.problem import TOLERANCE
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.timetable import Timetable

Orders = Sequence[Sequence[int]]

STRAIGHT = (
    Rules("urgent", 1.0, 0.0, clear="urgent", slack=0.02, in_flight=1.0),
    Rules("alternate", 0.0, 0.75, clear="always", in_flight=1.0),
    Rules("alternate", 0.5, 1.0),
    Rules("alternate", 1.0, 0.0, in_flight=1.0),
    Rules("alternate", 0.5, 0.0),
    Rules("alternate", 0.5, 0.3, slack=0.05),
    Rules("alternate", 0.5, 1.0, in_flight=1.0),
    Rules("alternate", 0.5, 0.0, overlap=0.15, slack=0.2, budget=2.0, in_flight=0.75),
    Rules("urgent", 1.0, 0.0, overlap=0.3, clear="always", spacing=1.0, in_flight=0.25),
    Rules("urgent", 0.0, 0.75, clear="always", in_flight=0.75),
    Rules("alternate", 0.5, 0.5, clear="always", slack=0.1, budget=2.0),
    Rules("urgent", 0.5, 0.5, slack=0.02),
    Rules("alternate", 0.3, 0.3, clear="urgent", look_ahead=True, slack=0.02, spacing=1.0, budget=0.5, in_flight=0.5),
    Rules("gradient", 0.0, 0.0),
)
"""For one stage a rank. Chosen, each for what it adds to those before, on the profiles of the zero-bubble paper
(arXiv 2401.10241) and on random costs with half to twice the memory of p micro-batches."""

SEVERAL = (
    Rules("urgent", 0.5, 1.0, look_ahead=True, spacing=1.0, budget=1.5, in_flight=0.25, ahead=(1, 0)),
    Rules("alternate", 1.0, 0.0, slack=0.02, spacing=1.0, in_flight=0.25, ahead=(1, 0)),
    Rules("urgent", 1.0, 0.6, clear="alternate", look_ahead=True, slack=0.05, spacing=0.8, budget=2.0, ahead=(2, 1.5)),
    Rules("urgent", 0.0, 0.3, 0.15, "urgent", True, 0.2, 0.5, 2.0, 0.25, (1, 0)),
    Rules("urgent", 1.0, 0.0, 0.15, "always", False, 0.02, 0.8, 1.5, 0.5, (1, 0)),
    Rules("gradient", 0.0, 0.3, 0.15, "never", True, 0.2, 0.5, 2.0, 0.75, (1, 0)),
    Rules("urgent", 0.5, 1.0, look_ahead=True, slack=0.05, spacing=0.5, budget=2.0, ahead=(2, 1.5)),
    Rules("gradient", 0.3, 1.0, clear="always", spacing=0.5),
    Rules("urgent", 0.7, 0.75, look_ahead=True, spacing=0.5, ahead=(1, 0)),
    Rules("gradient", 0.3, 1.0, clear="alternate", look_ahead=True, spacing=0.8, budget=9.0, ahead=(0.75, 1.5)),
)
"""For several stages a rank, chosen likewise on random costs with 0.5 to 1 times the memory of p micro-batches."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "order": ("gradient", "alternate", "urgent"),
    "delay": (0.0, 0.3, 0.5, 0.7, 1.0),
    "yielding": (0.0, 0.3, 0.5, 0.75, 1.0),
    "overlap": (0.0, 0.15, 0.3),
    "clear": ("never", "always", "urgent", "alternate"),
    "look_ahead": (False, True),
    "slack": (0.0, 0.01, 0.02, 0.05, 0.1, 0.2),
    "spacing": (0.0, 0.5, 0.8, 1.0),
    "budget": (0.5, 1.0, 1.5, 2.0, 9.0),
    "in_flight": (None, 1.0, 0.75, 0.5, 0.25),
    "ahead": (None, (2, 2), (2, 1.5), (2, 1), (2, 0.5), (1.75, 1), (1.5, 1), (1.5, 0), (1, 0), (0.75, 0)),
}
"""What a variation may set a rule to."""

_FILLINGS = ((0.0, 0.0), (0.0, 0.3), (0.05, 0.0), (0.0, 1.0), (0.1, 0.3), (0.2, 0.0), (0.2, 1.0))
"""Slack of the target in ramps, and overlap."""
_FAR = 1.5
"""A span of so many times the bound is not worth another filling."""
_BLOCKS, _FEWEST_BLOCKS = 40, 4
_BLOCK_ACTIONS = 100_000
"""Building blocks tried, from the largest that fits: so many times the actions of a schedule, between the two."""


def constructed(numbered: Numbered, bound: float) -> Iterator[Pass | None]:
    """Orders known to be good, filled, then the fixed families as they are and filled; None where that is no schedule
    within the limits."""
    for orders in _known_orders(numbered):
        yield from fillings(numbered, orders, bound)
    for timetable in _timetables(numbered):
        orders = orders_of(numbered.problem, timetable)
        yield replay(numbered, orders)
        yield from fillings(numbered, [[a for a in order if a < 2 * numbered.size] for order in orders], bound)


def listed(numbered: Numbered, bound: float) -> Iterator[Pass | None]:
    """Passes of list scheduling, without end: a portfolio of rules, then the best of them with one to three settings
    changed at random."""
    chance = random.Random(0)
    pick: Callable[[Sequence[Any]], Any] = chance.choice
    rules = STRAIGHT if numbered.problem.layout.chunks == 1 else SEVERAL
    good: list[tuple[float, int, Rules]] = []
    seen: set[Rules] = set()
    for tried in count():
        if tried < len(rules):
            rule = rules[tried]
        else:
            rule = pick(good[:4])[2] if good and chance.random() < 0.85 else pick(rules)
            for _ in range(pick((1, 1, 2, 3))):
                name = pick(tuple(CHOICES))
                rule = rule._replace(**{name: pick(CHOICES[name])})
        found = dispatch(numbered, rule, bound) if rule not in seen else None
        seen.add(rule)
        if found is not None:
            good = sorted([*good, (found.span, tried, rule)])[:6]
        yield found


def fillings(numbered: Numbered, orders: Orders, bound: float) -> Iterator[Pass | None]:
    """Orders of F and I, filled against several targets, unless the first shows them to be far off."""
    ramp = numbered.problem.returns[0]
    for slack, overlap in _FILLINGS:
        found = fill(numbered, orders, bound + slack * ramp, overlap)
        yield found
        if found is None or found.span > bound * _FAR:
            return


def _known_orders(numbered: Numbered) -> Iterator[Orders]:
    problem = numbered.problem
    layout = problem.layout
    if layout.chunks == 1:
        for share, extra in ((0.0, 0), (0.5, 0), (0.0, 1), (1.0, 0)):
            yield alternating(problem, share, extra)
    elif layout.chunks == 2 and layout.placement == "wave":
        for lead in (1.0, 0.8, 1.2):
            orders = turns(problem, lead)
            if orders is not None:
                yield orders
    yield one_by_one(problem)


def _timetables(numbered: Numbered) -> Iterator[Timetable]:
    """Those of the fixed families of this layout, and of further building blocks on a V."""
    problem = numbered.problem
    layout, m = problem.layout, problem.micro_batches
    for family in SCHEDULES.values():
        fits = family.allowed_chunks(layout.chunks) and (layout.chunks == 1 or family.placement == layout.placement)
        if family.name == "zb-auto" or not fits or family.refuses(layout, m):
            continue
        try:
            yield family.make(layout, m, problem.costs, problem.limits)
        except DoesNotFitError:
            continue
    if layout.chunks == 2 and layout.placement == "wave":
        room = min(limit / max(kept, TOLERANCE) for limit, kept in zip(problem.limits, problem.kept, strict=True))
        fitting = [block for block in blocks(layout.ranks) if block.memory <= room]
        number = min(_BLOCKS, max(_FEWEST_BLOCKS, _BLOCK_ACTIONS // (3 * numbered.size)))
        for block in fitting[: -number - 1 : -1]:
            yield from_block(layout.ranks, m, block.slots)
