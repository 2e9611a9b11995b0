"""Small problems, solved by dynamic programming.

[Note: states of a schedule]
What can still come depends on how many F, I and W each stage has run and on times: when each rank is free, and when
the inputs that wait have come. Micro-batches are alike, so each stage runs them in order. Start times are maxima and
sums of earlier ones and memory depends on the counts alone; so of two states with the same counts, the one that is
nowhere later has continuations at least as good, and the other can go. Level by level, each with one more action than
the last, the states that are left lead to the shortest schedule of all. States are also dropped that cannot end before
a schedule already known ([Note: latest starts]). Where a level still has too many, those that leave least spare time
go: then the best schedule may be missed.
"""

from __future__ import annotations

from typing import NamedTuple

from shardwright.planner.schedules.improve import replay
from shardwright.planner.schedules.latest import latest_starts
from shardwright.planner.schedules.passes import Numbered, Pass
from shardwright.planner.schedules.problem import TOLERANCE

_WIDTH = 1000
"""States of a level."""


class _State(NamedTuple):
    counts: tuple[int, ...]
    """Actions run: F of every stage, then I, then W."""
    free: tuple[float, ...]
    """Of each rank."""
    held: tuple[float, ...]
    inputs: tuple[tuple[float, ...], ...]
    """Arrivals of inputs that wait: F of every stage, then I."""
    action: int
    before: _State | None

    def is_no_later(self, other: _State) -> bool:
        """Of two states with the same counts."""
        return all(a <= b + TOLERANCE for a, b in zip(self.free, other.free, strict=True)) and all(
            a <= b + TOLERANCE
            for mine, its in zip(self.inputs, other.inputs, strict=True)
            for a, b in zip(mine, its, strict=True)
        )


class _Small:
    """A problem and the span to beat."""

    def __init__(self, numbered: Numbered, span: float) -> None:
        problem = numbered.problem
        self.numbered, self.problem, self.m, self.stages = (
            numbered,
            problem,
            problem.micro_batches,
            len(problem.rank_of),
        )
        self.latest = latest_starts(problem, span * (1 - TOLERANCE), 0.0)
        self.deadline = [problem.starts[own[0]] + span * (1 - TOLERANCE) for own in problem.stages_of]
        self.limit = [limit * (1 + TOLERANCE) + TOLERANCE for limit in problem.limits]
        self.lines = [[kind * self.stages + stage for kind in range(3) for stage in own] for own in problem.stages_of]
        """Of each rank."""

    def start(self) -> _State:
        ranks, stages = len(self.limit), self.stages
        inputs = ((0.0,) * self.m,) + ((),) * (2 * stages - 1)
        return _State((0,) * (3 * stages), (0.0,) * ranks, (0.0,) * ranks, inputs, -1, None)

    def after(self, state: _State, line: int) -> _State | None:
        """The state with the next action of one kind and stage run, None if it cannot run in time."""
        kind, stage = divmod(line, self.stages)
        count, rank = state.counts[line], self.problem.rank_of[stage]
        inputs = list(state.inputs)
        if kind < 2:
            if not inputs[line]:
                return None
            begin = max(state.free[rank], inputs[line][0])
            inputs[line] = inputs[line][1:]
        elif count < state.counts[line - self.stages]:
            begin = state.free[rank]
        else:
            return None
        action, tables = line * self.m + count, self.numbered
        if kind < 2 and begin > self.latest[action] + TOLERANCE:
            return None
        held = state.held[rank] + tables.memory[action]
        end, following = begin + tables.duration[action], tables.next[action]
        if held > self.limit[rank] or end + self.left(state.counts, rank, line) > self.deadline[rank]:
            return None
        if following >= 0:
            inputs[following // self.m] += (end + tables.send[action],)
        return _State(
            (*state.counts[:line], count + 1, *state.counts[line + 1 :]),
            (*state.free[:rank], end, *state.free[rank + 1 :]),
            (*state.held[:rank], held, *state.held[rank + 1 :]),
            tuple(inputs),
            action,
            state,
        )

    def left(self, counts: tuple[int, ...], rank: int, running: int = -1) -> float:
        """Work that a rank has yet to do, but for one action of the line that is running."""
        duration, m = self.numbered.duration, self.m
        return sum((m - counts[line] - (line == running)) * duration[line * m] for line in self.lines[rank])

    def spare(self, state: _State) -> float:
        """The least time that a rank has to spare."""
        return min(
            deadline - free - self.left(state.counts, rank)
            for rank, (deadline, free) in enumerate(zip(self.deadline, state.free, strict=True))
        )


def solve(numbered: Numbered, span: float) -> Pass | None:
    """The shortest schedule if it is shorter than `span`, else None: [Note: states of a schedule]."""
    small = _Small(numbered, span)
    level = [small.start()]
    for _ in range(3 * numbered.size):
        fronts: dict[tuple[int, ...], list[_State]] = {}
        for state in level:
            for line in range(3 * small.stages):
                after = small.after(state, line)
                if after is None:
                    continue
                front = fronts.setdefault(after.counts, [])
                if not any(other.is_no_later(after) for other in front):
                    front[:] = [other for other in front if not after.is_no_later(other)]
                    front.append(after)
        level = [state for front in fronts.values() for state in front]
        if len(level) > _WIDTH:
            level = sorted(level, key=small.spare, reverse=True)[:_WIDTH]
    return min((_schedule(small, state) for state in level), key=lambda found: found.span, default=None)


def _schedule(small: _Small, state: _State | None) -> Pass:
    orders: list[list[int]] = [[] for _ in small.limit]
    while state is not None and state.action >= 0:
        stage = state.action // small.m % small.stages
        orders[small.problem.rank_of[stage]].append(state.action)
        state = state.before
    found = replay(small.numbered, [order[::-1] for order in orders])
    if found is None:
        raise AssertionError("a state within the limits is a schedule within the limits")
    return found
