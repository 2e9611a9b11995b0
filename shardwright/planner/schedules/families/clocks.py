"""Schedules that are put together one action after the other, each at its time."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.planner.schedules.families.family import DoesNotFitError
from shardwright.planner.schedules.problem import TOLERANCE
from shardwright.planner.schedules.timetable import Action


class Clocks:
    """What each rank has run so far, until when, how long it idled and what it holds."""

    def __init__(self, limits: Sequence[float]) -> None:
        ranks = len(limits)
        self.limits = [limit * (1 + TOLERANCE) for limit in limits]
        self.orders: list[list[Action]] = [[] for _ in limits]
        self.clocks, self.idle, self.memory, self.began = ([0.0] * ranks for _ in range(4))
        self.idlest = 0.0
        """The most that any rank idled."""

    @property
    def span(self) -> float:
        """The longest of the ranks."""
        return max(clock - began for clock, began in zip(self.clocks, self.began, strict=True))

    def run(self, rank: int, action: Action, arrives: float, takes: float, adds: float) -> float:
        """Runs an action as soon as its input is there; `adds` to the rank's memory. Returns when it ends. Raises
        DoesNotFitError beyond the limit."""
        start = max(self.clocks[rank], arrives)
        if self.orders[rank]:
            self.idle[rank] += start - self.clocks[rank]
            self.idlest = max(self.idlest, self.idle[rank])
        else:
            self.began[rank] = start
        self.memory[rank] += adds
        if self.memory[rank] > self.limits[rank]:
            raise DoesNotFitError("memory is full")
        self.orders[rank].append(action)
        self.clocks[rank] = start + takes
        return self.clocks[rank]
