"""Local search on a whole schedule.

[Note: moves]
The span of the rank that ends late is a chain of actions, each of which starts when the one before it ends: that on the
same rank, or the one that sends its input. Only actions that wait for their rank keep the span long by their order; a
move takes one of them, drawn at random, a few places forward in its rank's order, if what it needs and the memory limit
allow that. It is the critical-path neighbourhood of job-shop scheduling (van Laarhoven, Aarts and Lenstra, "Job Shop
Scheduling by Simulated Annealing", Operations Research 40, 1992), with insertion instead of exchange. A move
that makes the span longer by less than a threshold is kept too; the threshold falls to 0 (Dueck and Scheuer, "Threshold
Accepting", Journal of Computational Physics 90, 1990).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import inf

from shardwright.planner.schedules.passes import Numbered, Pass
from shardwright.planner.schedules.problem import TOLERANCE

_FARTHEST = 6
"""Places that a move may take an action."""
_THRESHOLD = 0.02
"""Of the span, at the start."""


def start_times(numbered: Numbered, orders: Sequence[Sequence[int]]) -> list[float] | None:
    """When each action starts, by number, if each runs as early as its input allows; None for a deadlock."""
    ready, duration, following = numbered.ready() + [0.0] * numbered.size, numbered.duration, numbered.next
    send, wakes = numbered.send, numbered.wakes
    starts = [inf] * (3 * numbered.size)
    ranks = list(range(len(orders)))
    position, now, waiting = [0] * len(orders), [0.0] * len(orders), [-1] * len(orders)
    left = 3 * numbered.size
    while ranks:
        rank = ranks.pop()
        end, at = now[rank], position[rank]
        for action in orders[rank][at:]:
            arrival = ready[action]
            if arrival == inf:
                waiting[rank] = action
                break
            if arrival > end:
                end = arrival
            starts[action] = end
            end += duration[action]
            at += 1
            after = following[action]
            if after >= 0:
                ready[after] = end + send[action]
                other = wakes[action]
                if other >= 0 and waiting[other] == after:
                    waiting[other] = -1
                    ranks.append(other)
        left -= at - position[rank]
        position[rank], now[rank] = at, end
    return None if left else starts


def fits(numbered: Numbered, orders: Sequence[Sequence[int]]) -> bool:
    """Whether every rank stays within its limit."""
    return all(_within(numbered, order, limit) for order, limit in zip(orders, numbered.problem.limits, strict=True))


def _within(numbered: Numbered, order: Sequence[int], limit: float) -> bool:
    held, memory, most = 0.0, numbered.memory, limit * (1 + TOLERANCE) + TOLERANCE
    for action in order:
        held += memory[action]
        if held > most:
            return False
    return True


def spans(numbered: Numbered, orders: Sequence[Sequence[int]], starts: Sequence[float]) -> list[float]:
    """Of each rank, from the start of its first action to the end of its last."""
    return [starts[order[-1]] + numbered.duration[order[-1]] - starts[order[0]] for order in orders]


def replay(numbered: Numbered, orders: Sequence[Sequence[int]]) -> Pass | None:
    """A whole schedule as it is; None beyond the memory limits or for a deadlock."""
    starts = start_times(numbered, orders) if fits(numbered, orders) else None
    return None if starts is None else Pass(max(spans(numbered, orders, starts)), orders)


def improve(numbered: Numbered, found: Pass, bound: float, moves: int) -> Pass:
    """The best schedule that so many moves from this one lead to: [Note: moves]. Ends where the bound is met."""
    chance = random.Random(0)
    best, orders = found, [list(order) for order in found.orders]
    span = found.span
    starts = start_times(numbered, orders)
    if starts is None:
        raise ValueError("the schedule waits for itself")
    movable = _critical(numbered, orders, starts)
    for each in range(moves):
        if not movable or best.span <= bound * (1 + TOLERANCE):
            break
        rank, at = chance.choice(movable)
        moved = _moved(numbered, orders[rank], at, at - chance.randint(1, _FARTHEST))
        if moved is None or not _within(numbered, moved, numbered.problem.limits[rank]):
            continue
        before, orders[rank] = orders[rank], moved
        times = start_times(numbered, orders)
        longest = inf if times is None else max(spans(numbered, orders, times))
        if times is None or longest > best.span * (1 + _THRESHOLD * (1 - each / moves)) + TOLERANCE:
            orders[rank] = before
            continue
        span, movable = longest, _critical(numbered, orders, times)
        if span < best.span * (1 - TOLERANCE):
            best = Pass(span, [list(order) for order in orders])
    return best


def _moved(numbered: Numbered, order: list[int], at: int, to: int) -> list[int] | None:
    """The order with the action at one place taken forward to another, as far as what it needs on its rank allows."""
    action, size, m = order[at], numbered.size, numbered.problem.micro_batches
    needs = {action - size} if action >= size else set()
    if action % m:
        needs.add(action - 1)
    place = at
    while place > max(to, 0) and order[place - 1] not in needs:
        place -= 1
    if place == at:
        return None
    return [*order[:place], action, *order[place:at], *order[at + 1 :]]


def _critical(numbered: Numbered, orders: Sequence[Sequence[int]], starts: Sequence[float]) -> list[tuple[int, int]]:
    """Rank and place of the actions on the chain of the longest span that wait for their rank."""
    duration = numbered.duration
    longest = spans(numbered, orders, starts)
    rank = longest.index(max(longest))
    places = {action: (rank, at) for rank, order in enumerate(orders) for at, action in enumerate(order)}
    inputs = {after: action for action, after in enumerate(numbered.next) if after >= 0}
    action, movable = orders[rank][-1], []
    while True:
        rank, at = places[action]
        before = orders[rank][at - 1] if at else -1
        if before >= 0 and starts[before] + duration[before] >= starts[action] - TOLERANCE:
            if at > 1:
                movable.append((rank, at))
            action = before
        elif action in inputs and starts[action] > 0:
            action = inputs[action]
        else:
            return movable
