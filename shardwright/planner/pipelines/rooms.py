"""What every rank of a pipeline has left for activations, worked out once for ranks that are alike.

[Note: ranks that are alike]
Most ranks of a large pipeline have as many blocks of the same kind, and nothing else. Where activations go from each
unit to the next alone, such ranks need the same beside their activations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

from shardwright.planner.pipelines.costs import WHOLE_BACKWARD, pipe_of
from shardwright.planner.pipelines.owners import stage_segments
from shardwright.planner.space import Pipe, Point
from shardwright.schemas.job import ScheduleName
from shardwright.schemas.profile import ModelProfile


class Rooms:
    """Of all pipelines of one job, by the memory model's `room`."""

    def __init__(self, profile: ModelProfile, room: Callable[[Point, int], int]) -> None:
        self._room = room
        self._kinds = [unit.fingerprint for unit in profile.units for _ in range(unit.count)]
        self._chained = all(edge.kind == "chain" for edge in profile.edges)
        self._known: dict[Hashable, int] = {}
        self._all: Callable[[Point], tuple[int, ...]] = lru_cache(maxsize=100_000)(self._of_ranks)

    def of(self, point: Point) -> tuple[int, ...]:
        """Of each rank; the same for all schedules that cut backward in two, and for all others."""
        pipe = pipe_of(point)
        schedule: ScheduleName = "1f1b" if pipe.schedule in WHOLE_BACKWARD else "zb-h1"
        return self._all(replace(point, pipe=replace(pipe, schedule=schedule, activation_limits=())))

    def _of_ranks(self, point: Point) -> tuple[int, ...]:
        pipe, rooms = pipe_of(point), []
        uncut = replace(point, pipe=replace(pipe, cuts=(), checkpointed=()))
        for rank in range(pipe.ranks):
            key = uncut, self._like(pipe, rank)
            if key not in self._known:
                self._known[key] = self._room(point, rank)
            rooms.append(self._known[key])
        return tuple(rooms)

    def _like(self, pipe: Pipe, rank: int) -> Hashable:
        """Equal for ranks that are alike ([Note: ranks that are alike])."""
        if not self._chained:
            return rank, pipe.cuts, pipe.checkpointed
        stages = []
        for chunk in range(pipe.chunks):
            stage = pipe.layout.stage(rank, chunk)
            own = stage_segments(pipe, stage, len(self._kinds) - 2)
            kinds = tuple((kind, len(tuple(run))) for kind, run in groupby(self._kinds[segment] for segment in own))
            stages.append((stage == 0, stage == pipe.layout.stages - 1, kinds, pipe.checkpointed[stage]))
        return tuple(stages)
