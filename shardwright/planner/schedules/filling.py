"""Times and W's for orders of F and I that are given.

[Note: filling]
Each rank runs its F's and I's in the order given, each as early as its input allows. A W is run where it fits into the
wait for the next input, where memory must be let go of for the next F, and where waiting would spend more idle time
than a rank may have if it is to end within the target: target - work. So bubbles fall where they delay nobody, as long
as the target can be met. That W's fill gaps is the idea of Qi et al., "Zero Bubble Pipeline Parallelism"
(arXiv 2401.10241, section 3.1); they allow a rank as much idle time as the worst rank has had so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf

from shardwright.planner.schedules.passes import Numbered, Pass
from shardwright.planner.schedules.problem import TOLERANCE


class _Filling:
    """The state of all ranks while W's are put between their F's and I's."""

    __slots__ = ("budget", "done", "numbered", "orders", "overlap", "position", "ready", "spans", "states", "waiting")

    def __init__(self, numbered: Numbered, orders: Sequence[Sequence[int]], target: float, overlap: float) -> None:
        ranks = len(orders)
        self.numbered, self.orders, self.overlap = numbered, orders, overlap
        self.ready = numbered.ready()
        self.done: list[list[int]] = [[] for _ in orders]
        self.position = [0] * ranks
        self.waiting = [-1] * ranks
        self.budget = [target - work for work in numbered.problem.work]
        self.states = [(0.0, 0.0, 0.0, 0.0)] * ranks
        """Of each rank: when it is free, began, how long it idled, its memory."""
        self.spans = [inf] * ranks

    def advance(self, rank: int, pending: deque[int], longest: float) -> list[int] | None:
        """Run a rank until it waits for another; the ranks that may go on by that, None if this is no schedule."""
        tables, ready, done = self.numbered, self.ready, self.done[rank]
        duration, memory, following, send, wakes = (
            tables.duration, tables.memory, tables.next, tables.send, tables.wakes,
        )  # fmt: skip
        order, size, waiting = self.orders[rank], tables.size, self.waiting
        limit = tables.problem.limits[rank] * (1 + TOLERANCE) + TOLERANCE
        now, began, idle, held = self.states[rank]
        woken = []
        at, budget, fitting = self.position[rank], self.budget[rank] + TOLERANCE, 1.0 - self.overlap
        for action in order[at:]:
            arrival = ready[action]
            if arrival == inf:
                self.waiting[rank] = action
                break
            if action < size:
                while held + memory[action] > limit:
                    if not pending:
                        return None
                    weight = pending.popleft()
                    now += duration[weight]
                    held += memory[weight]
                    done.append(weight)
            while arrival > now and pending:
                takes, gap = duration[pending[0]], arrival - now
                if takes * fitting > gap + TOLERANCE and idle + gap <= budget:
                    break
                weight = pending.popleft()
                now += takes
                held += memory[weight]
                done.append(weight)
            if arrival > now:
                if at:
                    idle += arrival - now
                else:
                    began = arrival
                now = arrival
            now += duration[action]
            if now - began > longest:
                return None
            held += memory[action]
            done.append(action)
            at += 1
            if action >= size:
                pending.append(action + size)
            after = following[action]
            if after >= 0:
                ready[after] = now + send[action]
                other = wakes[action]
                if other >= 0 and waiting[other] == after:
                    waiting[other] = -1
                    woken.append(other)
        self.position[rank] = at
        self.states[rank] = now, began, idle, held
        if at == len(order):
            self.spans[rank] = now - began + sum(duration[weight] for weight in pending)
            done.extend(pending)
        return woken


def fill(
    numbered: Numbered,
    orders: Sequence[Sequence[int]],
    target: float,
    overlap: float = 0.0,
    longest: float = inf,
) -> Pass | None:
    """A schedule with these orders of F and I: [Note: filling]. `overlap`: the share of a W that may reach beyond the
    next input's arrival. None where memory does not allow the orders, they deadlock, or a span exceeds `longest`."""
    filling = _Filling(numbered, orders, target, overlap)
    pending: list[deque[int]] = [deque() for _ in orders]
    ranks = list(range(len(orders)))[::-1]
    while ranks:
        rank = ranks.pop()
        woken = filling.advance(rank, pending[rank], longest)
        if woken is None:
            return None
        ranks.extend(woken)
    span = max(filling.spans)
    return Pass(span, filling.done) if span <= longest and span < inf else None
