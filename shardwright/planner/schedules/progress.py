"""How far a timetable gets that cannot run to its end."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.planner.schedules.timetable import Action, Costs, Layout, Timetable

_BEFORE = {"F": "", "I": "F", "W": "FI", "B": "F"}
"""Kinds that must have run, and no others, of the same chunk and micro-batch."""

Lane = tuple[tuple[Action, float, float], ...]
"""Actions of a rank in order, each with start and end."""


def progress(timetable: Timetable, layout: Layout, costs: Costs) -> tuple[Lane, ...]:
    """For each rank its actions until the first that cannot run: because it is none of this layout, comes before what
    it needs, has run already, or waits for something that never comes. Of a right timetable, all of them."""
    run = _Run(timetable, layout, costs)
    while sum(run.advance(rank) for rank in range(len(timetable))):
        pass
    return tuple(map(tuple, run.lanes))


class _Run:
    """The state of all ranks."""

    def __init__(self, timetable: Timetable, layout: Layout, costs: Costs) -> None:
        self.timetable, self.layout, self.costs = timetable, layout, costs
        self.lanes: list[list[tuple[Action, float, float]]] = [[] for _ in timetable]
        self.ends: dict[tuple[int, int], dict[str, float]] = {}
        """When each kind ended, by stage and micro-batch; B counts as I and W."""

    def advance(self, rank: int) -> int:
        """Runs a rank as far as it goes; returns by how many actions."""
        lane, before = self.lanes[rank], len(self.lanes[rank])
        for action in self.timetable[rank][before:]:
            arrival = self._arrival(rank, action)
            if arrival is None:
                break
            start = max(arrival, lane[-1][2] if lane else 0.0)
            end = start + self._duration(rank, action)
            lane.append((action, start, end))
            done = self.ends.setdefault((self.layout.stage(rank, action.chunk), action.micro_batch), {})
            done.update(dict.fromkeys("IW" if action.kind == "B" else action.kind, end))
        return len(lane) - before

    def _arrival(self, rank: int, action: Action) -> float | None:
        """When what an action needs is there; None if it cannot run as far as is known."""
        kind, chunk, micro_batch = action
        if chunk >= self.layout.chunks:
            return None
        stage = self.layout.stage(rank, chunk)
        if set(self.ends.get((stage, micro_batch), ())) != set(_BEFORE[kind]):
            return None
        last = stage == self.layout.stages - 1
        if kind == "W" or (kind == "F" and stage == 0) or (kind in "IB" and last):
            return 0.0
        other = stage - 1 if kind == "F" else stage + 1
        end = self.ends.get((other, micro_batch), {}).get("F" if kind == "F" else "I")
        return None if end is None else end + self._send(min(stage, other))

    def _send(self, stage: int) -> float:
        ranks = {self.layout.place(each)[0] for each in (stage, stage + 1)}
        return self.costs.send[stage] if len(ranks) == 2 else 0.0

    def _duration(self, rank: int, action: Action) -> float:
        stage, costs = self.layout.stage(rank, action.chunk), self.costs
        times: dict[str, Sequence[float]] = {
            "F": costs.forward,
            "I": costs.input_gradient,
            "W": costs.weight_gradient,
        }
        return sum(times[kind][stage] for kind in ("IW" if action.kind == "B" else action.kind))
