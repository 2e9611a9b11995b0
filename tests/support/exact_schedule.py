"""Exact answers for tiny pipelines: whether any schedule of F, I and W is shorter than a span.

Breadth first over everything that can have run: a state is how many F, I and W each stage has run, with the times that
matter for what follows (when each rank is free, when inputs that wait have come). Of two states with the same counts,
one that is nowhere later makes the other superfluous, since every continuation of the other does no worse from it:
start times are maxima and sums, and memory depends on the counts alone. States from which a rank cannot end in time are
dropped. Micro-batches run in order on each stage, as they are alike.

A rank's first action can only be F of micro-batch 0 on its lowest stage, as soon as it comes, so that every rank's
deadline is known from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shardwright.planner.schedules.timetable import Costs, Layout


class _State(NamedTuple):
    counts: tuple[tuple[int, int, int], ...]
    """F, I and W run of each stage."""
    free: tuple[float, ...]
    """Of each rank."""
    inputs: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    """Of each stage, arrivals of inputs of F and of I that have not run."""

    def times(self) -> tuple[float, ...]:
        return self.free + tuple(time for both in self.inputs for times in both for time in times)


class _Search:
    def __init__(self, layout: Layout, costs: Costs, micro_batches: int, limits: Sequence[float], span: float) -> None:
        self.layout, self.costs, self.m, self.limits = layout, costs, micro_batches, limits
        self.rank = [layout.place(stage)[0] for stage in range(layout.stages)]
        self.last = layout.stages - 1
        come, begins = 0.0, dict[int, float]()
        for stage in range(layout.stages):
            begins.setdefault(self.rank[stage], come)
            come += costs.forward[stage] + (costs.send[stage] if stage < self.last else 0.0)
        self.deadline = [begins[rank] + span for rank in range(layout.ranks)]

    def start(self) -> _State:
        stages = self.layout.stages
        return _State(
            ((0, 0, 0),) * stages,
            (0.0,) * self.layout.ranks,
            (((0.0,) * self.m, ()),) + (((), ()),) * (stages - 1),
        )

    def held(self, state: _State, rank: int) -> float:
        return sum(
            (f - i) * self.costs.activations[stage] + (i - w) * self.costs.held_by_weight[stage]
            for stage, (f, i, w) in enumerate(state.counts)
            if self.rank[stage] == rank
        )

    def next(self, state: _State) -> Iterator[_State]:
        for stage, (f, i, w) in enumerate(state.counts):
            forwards, gradients = state.inputs[stage]
            if forwards:
                yield from self.run(state, stage, 0, forwards[0])
            if gradients and i < f:
                yield from self.run(state, stage, 1, gradients[0])
            if w < i:
                yield from self.run(state, stage, 2, 0.0)

    def run(self, state: _State, stage: int, kind: int, come: float) -> Iterator[_State]:
        costs, rank = self.costs, self.rank[stage]
        if kind == 0 and self.held(state, rank) + costs.activations[stage] > self.limits[rank] + 1e-9:
            return
        times = (costs.forward, costs.input_gradient, costs.weight_gradient)[kind]
        end = max(state.free[rank], come) + times[stage]
        counts, free, inputs = list(state.counts), list(state.free), [list(both) for both in state.inputs]
        run = list(counts[stage])
        run[kind] += 1
        counts[stage] = (run[0], run[1], run[2])
        free[rank] = end
        if kind < 2:
            inputs[stage][kind] = inputs[stage][kind][1:]
        if kind == 0 and stage < self.last:
            inputs[stage + 1][0] += (end + costs.send[stage],)
        elif kind == 0:
            inputs[stage][1] += (end,)
        elif kind == 1 and stage:
            inputs[stage - 1][1] += (end + costs.send[stage - 1],)
        after = _State(tuple(counts), tuple(free), tuple((both[0], both[1]) for both in inputs))
        if self.in_time(after):
            yield after

    def in_time(self, state: _State) -> bool:
        left = [0.0] * self.layout.ranks
        for stage, (f, i, w) in enumerate(state.counts):
            left[self.rank[stage]] += (
                (self.m - f) * self.costs.forward[stage]
                + (self.m - i) * self.costs.input_gradient[stage]
                + (self.m - w) * self.costs.weight_gradient[stage]
            )
        return all(
            free + work <= deadline for free, work, deadline in zip(state.free, left, self.deadline, strict=True)
        )


def shorter_exists(layout: Layout, costs: Costs, micro_batches: int, limits: Sequence[float], span: float) -> bool:
    """Whether there is a schedule within the limits whose longest span is at most `span`."""
    search = _Search(layout, costs, micro_batches, limits, span)
    states = [search.start()]
    for _ in range(3 * layout.stages * micro_batches):
        fronts: dict[tuple[tuple[int, int, int], ...], list[tuple[tuple[float, ...], _State]]] = {}
        for state in states:
            for after in search.next(state):
                times, front = after.times(), fronts.setdefault(after.counts, [])
                if not any(_no_later(other, times) for other, _ in front):
                    front[:] = [kept for kept in front if not _no_later(times, kept[0])]
                    front.append((times, after))
        states = [state for front in fronts.values() for _, state in front]
    return bool(states)


def _no_later(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b + 1e-9 for a, b in zip(one, other, strict=True))
