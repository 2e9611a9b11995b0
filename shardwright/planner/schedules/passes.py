"""The actions of a problem as numbers, and what a pass over them leaves.

[Note: numbered actions]
With n = stages x micro-batches, F of stage s and micro-batch j is number s m + j, I is n more and W 2 n more. The F
that follows F is m further on, the I that follows I m back: tables of durations, memory and successors make a pass over
a whole schedule a loop over small integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from shardwright.planner.schedules.problem import Problem
from shardwright.planner.schedules.timetable import Action, Kind, Timetable

KINDS: tuple[Kind, ...] = ("F", "I", "W")


@dataclass(frozen=True, slots=True)
class Numbered:
    """Tables over all numbered actions, and the problem they are of: [Note: numbered actions]."""

    problem: Problem
    size: int
    """Actions of one kind."""
    duration: list[float]
    memory: list[float]
    """What an action adds to its rank's memory when it has run."""
    next: list[int]
    """The action that waits for it, of F and I; -1: none, or its own W."""
    send: list[float]
    """Time from its end until the next may start."""
    wakes: list[int]
    """The rank of the next action where that is another rank; -1 elsewhere."""

    def ready(self) -> list[float]:
        """When each F and I may start, before anything has run."""
        m = self.problem.micro_batches
        return [0.0] * m + [inf] * (2 * self.size - m)


@dataclass(frozen=True, slots=True)
class Pass:
    """A valid schedule: numbered actions of each rank in order, and the longest span of a rank."""

    span: float
    orders: Sequence[Sequence[int]]


def number(problem: Problem) -> Numbered:
    """The tables of a problem."""
    costs, m, stages = problem.costs, problem.micro_batches, problem.layout.stages
    size, last, rank_of = stages * m, stages - 1, problem.rank_of

    def spread(values: Sequence[float]) -> list[float]:
        return [value for value in values for _ in range(m)]

    def wake(stage: int, other: int) -> int:
        return rank_of[other] if rank_of[other] != rank_of[stage] else -1

    up = [wake(s, s + 1) for s in range(last)] + [-1]
    down = [-1] + [wake(s, s - 1) for s in range(1, stages)]
    let_go = [held - kept for kept, held in zip(costs.activations, costs.held_by_weight, strict=True)]
    return Numbered(
        problem=problem,
        size=size,
        duration=spread([*costs.forward, *costs.input_gradient, *costs.weight_gradient]),
        memory=spread([*costs.activations, *let_go, *(-held for held in costs.held_by_weight)]),
        next=[*range(m, size), *range(2 * size - m, 2 * size)] + [-1] * m + [*range(size, 2 * size - m)] + [-1] * size,
        send=spread([*costs.send, 0.0, 0.0, *costs.send]) + [0.0] * size,
        wakes=[rank for rank in up + down for _ in range(m)] + [-1] * size,
    )


def timetable_of(problem: Problem, orders: Sequence[Sequence[int]]) -> Timetable:
    """The actions by name."""
    m, stages = problem.micro_batches, problem.layout.stages
    chunk_of = [problem.layout.place(stage)[1] for stage in range(stages)]

    def named(action: int) -> Action:
        kind, rest = divmod(action, stages * m)
        stage, micro_batch = divmod(rest, m)
        return Action(KINDS[kind], chunk_of[stage], micro_batch)

    return tuple(tuple(map(named, order)) for order in orders)


def orders_of(problem: Problem, timetable: Timetable) -> list[list[int]]:
    """The inverse of `timetable_of`; B becomes I and W."""
    m, size = problem.micro_batches, problem.layout.stages * problem.micro_batches
    orders: list[list[int]] = []
    for rank, actions in enumerate(timetable):
        order: list[int] = []
        orders.append(order)
        for kind, chunk, micro_batch in actions:
            at = problem.layout.stage(rank, chunk) * m + micro_batch
            order.extend((size + at, 2 * size + at) if kind == "B" else (KINDS.index(kind) * size + at,))
    return orders
