"""The timetable of a point, and the programs that it becomes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from shardwright.planner.pipelines.costs import PipelineCosts, pipe_of
from shardwright.planner.schedules.lowering import Edge, Gathers, Program, lower
from shardwright.planner.schedules.simulator import Simulation
from shardwright.planner.schedules.table import SCHEDULES, simulated_schedule
from shardwright.planner.schedules.timetable import Costs, Layout, Timetable
from shardwright.planner.space import Point

GATHERS = Gathers(lead=1, gap=1)
"""Where parameters rest sharded: gathered an action ahead, whole through the runs of a stage."""


class Made(NamedTuple):
    """A schedule."""

    layout: Layout
    costs: Costs
    """That it was made for (`PipelineCosts.costs`)."""
    timetable: Timetable
    simulation: Simulation


_Key: TypeAlias = tuple[str, int, int, int, Costs, tuple[int, ...]]
"""What a timetable depends on, as `_make` takes it."""


class Schedules:
    """The schedules of all points of one job, each made once."""

    def __init__(self, costs: PipelineCosts) -> None:
        self._costs = costs
        self._made: Callable[[str, int, int, int, Costs, tuple[int, ...]], Made] = lru_cache(maxsize=4096)(_make)
        self._programs: Callable[..., tuple[Program, ...]] = lru_cache(maxsize=256)(self._lower)

    def made(self, point: Point) -> Made:
        """The timetable of a point's family, within its activation limits where it has some. Raises InputError where
        the family has none."""
        pipe, made = pipe_of(point), self._made(*self._key(point))
        if _places(made.layout) != _places(pipe.layout):
            raise ValueError(f"{pipe.schedule} does not place stages as {pipe.placement}")
        return made

    def programs(self, point: Point) -> tuple[Program, ...]:
        """What every rank does: messages, and the gathers and reductions of its stages."""
        reduces = 1 if point.gradient_degree > 1 and point.accumulation > 1 else None
        gathers = GATHERS if point.shard > 1 else None
        return self._programs(self._key(point), self._costs.edges(point), reduces, gathers)

    def _key(self, point: Point) -> _Key:
        pipe, costs = pipe_of(point), self._costs.costs(point)
        return pipe.schedule, pipe.ranks, pipe.chunks, point.accumulation, costs, pipe.activation_limits

    def _lower(
        self, key: _Key, edges: tuple[Edge, ...], reduces: int | None, gathers: Gathers | None
    ) -> tuple[Program, ...]:
        made = self._made(*key)
        return lower(made.timetable, made.layout, edges=edges, costs=made.costs, reduce_every=reduces, gathers=gathers)


def _make(name: str, ranks: int, chunks: int, micro_batches: int, costs: Costs, limits: tuple[int, ...]) -> Made:
    made = simulated_schedule(SCHEDULES[name], ranks, chunks, micro_batches, costs, memory_limit=limits or None)
    return Made(made.layout, made.costs, made.timetable, made)


def _places(layout: Layout) -> list[tuple[int, int]]:
    return [layout.place(stage) for stage in range(layout.stages)]
