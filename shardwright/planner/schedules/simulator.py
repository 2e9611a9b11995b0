"""One simulator for every schedule: times, memory, bubbles, and the period of iterations that follow each other.

[Note: bubble rate]
The zero-bubble papers count, per rank, from the start of its first action to the end of its last, take the largest of
these spans as the cost, and of it the share that is not work (Qi et al., arXiv 2401.10241, sections 2.3 and 3.2):
`(cost - m (T_F + T_B + T_W)) / cost`. Where stages are uneven, `m (T_F + T_B + T_W)` is here the work of the busiest
rank: the bubble is what even the rank that never has too little to do spends waiting.

A span leaves out that ranks start one after the other. The makespan counts it; iterations that follow each other
without a barrier between them overlap, and then take the steady period each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardwright.planner.schedules.execution import Execution, micro_batches_of
from shardwright.planner.schedules.problem import TOLERANCE
from shardwright.planner.schedules.timetable import Action, Costs, Layout, Timetable

Lane = tuple[tuple[Action, float, float], ...]
"""Actions of a rank in order, each with start and end."""


@dataclass(frozen=True)
class Simulation:
    """When every action runs. Times in the unit of the costs, from 0, the start of the first action."""

    timetable: Timetable
    layout: Layout
    costs: Costs
    starts: tuple[list[float], ...]
    """Per rank, of its actions in order."""
    ends: tuple[list[float], ...]

    @cached_property
    def ranks(self) -> tuple[Lane, ...]:
        """Per rank its actions in order, each with start and end."""
        return tuple(
            tuple(zip(*of_rank, strict=True)) for of_rank in zip(self.timetable, self.starts, self.ends, strict=True)
        )

    @cached_property
    def micro_batches(self) -> int:
        """Of the iteration."""
        return micro_batches_of(self.timetable)

    @property
    def makespan(self) -> float:
        """From the start of the first action to the end of the last."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    @property
    def span(self) -> float:
        """The largest over the ranks of the time from the start of its first action to the end of its last."""
        return max(
            (ends[-1] - starts[0] for starts, ends in zip(self.starts, self.ends, strict=True) if ends), default=0.0
        )

    @property
    def work(self) -> float:
        """Time of all actions of the busiest rank."""
        return max(rank_work(self.costs, self.layout, self.micro_batches))

    def bubble_rate(self) -> float:
        """See [Note: bubble rate]."""
        return (self.span - self.work) / self.span if self.span else 0.0

    @cached_property
    def memory(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """Per rank the points of a staircase, (time, held from then on), in units of `Costs.activations`. F's memory is
        held from its start, what I, W and B let go of is free at their end."""
        return tuple(tuple(self._staircase(rank)) for rank in range(self.layout.ranks))

    @cached_property
    def peak_memory(self) -> tuple[float, ...]:
        """Per rank the most that it holds at once, in units of `Costs.activations`."""
        return tuple(max((held for _, held in steps), default=0.0) for steps in self.memory)

    def beyond(self, limits: Sequence[float] | None) -> list[int]:
        """The ranks that hold more than their limits; None: there are none."""
        if limits is None:
            return []
        peaks = zip(self.peak_memory, limits, strict=True)
        return [rank for rank, (peak, limit) in enumerate(peaks) if peak > limit * (1 + TOLERANCE)]

    def _staircase(self, rank: int) -> Iterator[tuple[float, float]]:
        table = _memory_table(self.costs, self.layout, rank)
        held = 0.0
        for (kind, chunk, _), start, end in zip(self.timetable[rank], self.starts[rank], self.ends[rank], strict=True):
            held += table[kind, chunk]
            yield start if kind == "F" else end, held


def simulate(timetable: Timetable, layout: Layout, costs: Costs) -> Simulation:
    """Each rank runs its actions in the given order, each as early as its inputs allow. Raises ScheduleError where an
    action is missing, runs twice, before what it needs, or never; ValueError where costs and layout do not fit."""
    starts, ends, _ = Execution(timetable, layout, costs).run()
    return Simulation(timetable, layout, costs, starts, ends)


def check(timetable: Timetable, layout: Layout, micro_batches: int | None = None) -> None:
    """Raises ScheduleError unless every F, I and W (or F and B) of every stage and micro-batch runs exactly once, in an
    order without deadlock."""
    free = (0.0,) * layout.stages
    Execution(timetable, layout, Costs(free, free, free, free[1:], free, free), micro_batches).run()


def progress(timetable: Timetable, layout: Layout, costs: Costs) -> tuple[Lane, ...]:
    """For each rank its actions until the first that cannot run: because it is none of this layout, comes before what
    it needs, has run already, or waits for something that never comes. Of a right timetable, all of them."""
    starts, ends, *_ = Execution(timetable, layout, costs).advance()
    return tuple(tuple(zip(*of_rank, strict=False)) for of_rank in zip(timetable, starts, ends, strict=True))


def rank_work(costs: Costs, layout: Layout, micro_batches: int) -> list[float]:
    """Per rank the time of all its actions of an iteration."""
    work = [0.0] * layout.ranks
    for stage in range(layout.stages):
        each = costs.forward[stage] + costs.input_gradient[stage] + costs.weight_gradient[stage]
        work[layout.place(stage)[0]] += micro_batches * each
    return work


def steady_period(timetable: Timetable, layout: Layout, costs: Costs) -> float:
    """How much later an iteration ends than the one before when many follow each other, each rank going on to the next
    as soon as it is done with its own.

    The ends of one iteration's ranks are a max-plus linear function A of those of the iteration before, so the period
    is A's eigenvalue, the largest mean of a cycle of ranks (Baccelli et al., "Synchronization and Linearity", theorem
    3.23). It is found from below: longest paths under a guess either settle, which proves the guess, or close a cycle
    whose mean is larger, the next guess. `Costs.send` is paid between iterations no more than within one.
    """
    execution = Execution(timetable, layout, costs)
    _, ends, order = execution.run()
    ranks = [rank for rank in range(layout.ranks) if ends[rank]]
    if not ranks:
        return 0.0
    ready = [0.0] * layout.ranks
    period = max(rank_work(costs, layout, execution.micro_batches))
    parents: dict[int, tuple[int, float]] = {}
    tolerance = 1e-12 * max(1.0, max(end[-1] for end in ends if end)) * len(order) ** 0.5
    while True:
        after, origins = execution.again(order, ready)
        late = [rank for rank in ranks if after[rank] - period > ready[rank] + tolerance]
        if not late:
            return period
        moved = list(ready)
        for rank in late:
            parents[rank] = origins[rank], after[rank] - ready[origins[rank]]
            moved[rank] = after[rank] - period
        ready = moved
        period = max(period, _largest_cycle_mean(parents))


def _largest_cycle_mean(parents: dict[int, tuple[int, float]]) -> float:
    """Of a graph in which each node has one edge at most; 0 if there is no cycle."""
    best = 0.0
    for first in parents:
        node, length, edges, visited = first, 0.0, 0, set[int]()
        while node in parents and node not in visited:
            visited.add(node)
            node, weight = parents[node]
            length, edges = length + weight, edges + 1
            if node == first:
                best = max(best, length / edges)
                break
    return best


def _memory_table(costs: Costs, layout: Layout, rank: int) -> dict[tuple[str, int], float]:
    """What an action of a rank adds to its memory, by kind and chunk ([Note: memory of an action])."""
    table: dict[tuple[str, int], float] = {}
    for chunk in range(layout.chunks):
        stage = layout.stage(rank, chunk)
        kept, held = costs.activations[stage], costs.held_by_weight[stage]
        table |= {("F", chunk): kept, ("I", chunk): held - kept, ("W", chunk): -held, ("B", chunk): -kept}
    return table
