"""Pipelines as points, made by hand."""

from __future__ import annotations

from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.space import Pipe, Point


def pipe(**changes: object) -> Pipe:
    """Two stages of two blocks each, unless something is changed."""
    usual: dict[str, object] = {
        "ranks": 2,
        "chunks": 1,
        "placement": "loop",
        "schedule": "1f1b",
        "cuts": (2,),
        "checkpointed": (0, 0),
    }
    return Pipe(**{**usual, **changes})  # type: ignore[arg-type]


def pipe_of_family(name: str) -> Pipe:
    """Eight blocks on two ranks, as many on each stage, the first of each checkpointed."""
    family = SCHEDULES[name]
    stages = 2 * family.chunks
    return pipe(
        schedule=name,
        chunks=family.chunks,
        placement=family.placement,
        cuts=tuple(8 * (stage + 1) // stages for stage in range(stages - 1)),
        checkpointed=(1,) * stages,
    )


def point(of: Pipe, **changes: object) -> Point:
    """One copy of a pipeline, four micro-batches of two in fp32, unless something is changed."""
    usual: dict[str, object] = {
        "engine": "amsp",
        "world": of.ranks,
        "pipe": of,
        "shard": 1,
        "optimizer_degree": 1,
        "gradient_degree": 1,
        "kept": None,
        "micro_batch": 2,
        "accumulation": 4,
        "checkpointed": 0,
        "precision": "fp32",
    }
    return Point(**{**usual, **changes})  # type: ignore[arg-type]
