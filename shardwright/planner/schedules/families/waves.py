"""Hanayo: 2W stages a rank, placed back and forth, so that micro-batches go over the ranks in W waves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from shardwright.planner.schedules.families.family import DoesNotFitError
from shardwright.planner.schedules.simulator import simulate
from shardwright.planner.schedules.timetable import Action, Costs, Layout, Timetable


def hanayo(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """Liu et al., "Hanayo: Harnessing Wave-like Pipeline Parallelism", arXiv 2308.15762, section 3: no second copy of
    the weights, bubbles that shrink with the number of waves. The paper draws the order for as many micro-batches as
    ranks, p; here a rank that is free takes what is there, backwards first, then the stage nearest the model's end. Of
    more micro-batches, p to 2p are on their way at once, or p follow p: the shortest of these within the limits."""
    best: tuple[float, Timetable] | None = None
    for timetable in _candidates(layout, micro_batches, costs):
        simulation = simulate(timetable, layout, costs)
        if not simulation.beyond(limits) and (best is None or simulation.span < best[0] * (1 - 1e-9)):
            best = simulation.span, timetable
    if best is None:
        raise DoesNotFitError("waves do not fit into this memory")
    return best[1]


def _candidates(layout: Layout, micro_batches: int, costs: Costs) -> Iterator[Timetable]:
    ranks = layout.ranks
    yield _Listing(layout, costs, micro_batches, ranks).run()
    if micro_batches > ranks:
        yield _in_turn(layout, costs, micro_batches)
        yield _Listing(layout, costs, micro_batches, ranks + ranks // 2).run()
        yield _Listing(layout, costs, micro_batches, 2 * ranks).run()


def _in_turn(layout: Layout, costs: Costs, micro_batches: int) -> Timetable:
    """p micro-batches after p."""
    orders: list[list[Action]] = [[] for _ in range(layout.ranks)]
    for first in range(0, micro_batches, layout.ranks):
        group = _Listing(layout, costs, min(layout.ranks, micro_batches - first), layout.ranks).run()
        for order, actions in zip(orders, group, strict=True):
            order += (action._replace(micro_batch=first + action.micro_batch) for action in actions)
    return tuple(map(tuple, orders))


class _Listing:
    """A list scheduler: events in the order of time, a choice for each rank that is free. At most `in_flight`
    micro-batches are on their way at once."""

    def __init__(self, layout: Layout, costs: Costs, micro_batches: int, in_flight: int) -> None:
        self.layout, self.costs, self.micro_batches, self.in_flight = layout, costs, micro_batches, in_flight
        self.last = layout.stages - 1
        self.places = [layout.place(stage) for stage in range(layout.stages)]
        # Arrivals no further apart than rounding count as one event.
        self.same = 1e-9 * max(*costs.forward, *costs.input_gradient, *costs.weight_gradient, *costs.send, 0.0)
        self.ready: list[list[tuple[int, int, int]]] = [[] for _ in range(layout.ranks)]
        """By rank, what it could start: its number in the order of preference, stage, micro-batch."""
        self.free = [0.0] * layout.ranks
        self.events: list[tuple[float, int, int, int]] = []
        """Time and what is there from then on: the same three."""
        self.orders: list[list[Action]] = [[] for _ in range(layout.ranks)]
        self.entered = 0

    def run(self) -> Timetable:
        """The whole schedule."""
        for _ in range(self.in_flight):
            self._enter(0.0)
        while self.events:
            now, touched = self.events[0][0], set[int]()
            while self.events and self.events[0][0] <= now + self.same:
                _, preference, stage, micro_batch = heappop(self.events)
                touched.add(self.places[stage][0])
                if micro_batch >= 0:
                    heappush(self.ready[self.places[stage][0]], (preference, stage, micro_batch))
            for rank in sorted(touched):
                if self.ready[rank] and self.free[rank] <= now + self.same:
                    self._start(rank, max(now, self.free[rank]))
        return tuple(map(tuple, self.orders))

    def _enter(self, time: float) -> None:
        if self.entered < self.micro_batches:
            heappush(self.events, (time, self._forward(0), 0, self.entered))
            self.entered += 1

    def _forward(self, stage: int) -> int:
        return 2 * self.last + 1 - stage

    def _start(self, rank: int, now: float) -> None:
        preference, stage, micro_batch = heappop(self.ready[rank])
        backward = preference <= self.last
        costs, chunk = self.costs, self.places[stage][1]
        self.orders[rank].append(Action("B" if backward else "F", chunk, micro_batch))
        whole = costs.input_gradient[stage] + costs.weight_gradient[stage]
        end = now + (whole if backward else costs.forward[stage])
        self.free[rank] = end
        heappush(self.events, (end, 0, stage, -1))
        if backward and stage == 0:
            self._enter(end)
        elif backward:
            heappush(self.events, (end + costs.send[stage - 1], stage - 1, stage - 1, micro_batch))
        elif stage == self.last:
            heappush(self.events, (end, stage, stage, micro_batch))
        else:
            heappush(self.events, (end + costs.send[stage], self._forward(stage + 1), stage + 1, micro_batch))
