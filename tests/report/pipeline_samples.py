"""Pipeline plans to draw: a straight one, a V with two copies, and uneven stages with recomputed blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

from support.pipeline_plans import pipeline_plan
from support.plans import make_plan

from shardwright.schemas.plan import Plan


def plan_of(world: int, blocks: int, sequences: int, **changes: Any) -> Plan:
    """What the pipelines are made of."""
    paths = tuple(f"blocks.{index}" for index in range(blocks))
    return make_plan(world=world, blocks=paths, train={"global_batch": sequences}, **changes)


@cache
def straight() -> Plan:
    """Four equal stages."""
    return pipeline_plan(plan_of(4, 12, 24), ranks=4, family="zb-h1", micro_batches=8)


@cache
def v_shaped() -> Plan:
    """Eight stages back and forth over four ranks of two devices each, which share their states."""
    states = plan_of(8, 16, 24, engine="amsp", shard=2, axes=(2,))
    return pipeline_plan(states, ranks=4, chunks=2, family="zb-v", copies=2, micro_batches=12)


@cache
def uneven() -> Plan:
    """The embedding alone, a heavy head, and recomputed blocks, under limits of the activations."""
    return pipeline_plan(
        plan_of(4, 12, 24),
        ranks=4,
        family="zb-auto",
        micro_batches=12,
        cuts=(0, 5, 9),
        checkpointed=(0, 5, 1, 0),
        embedding=1,
        head=3,
        limits=(40 << 20,) * 4,
    )


@cache
def long() -> Plan:
    """More actions than a line of the terminal can show."""
    return pipeline_plan(plan_of(4, 16, 64), ranks=4, chunks=4, family="interleaved-1f1b", micro_batches=64)


@cache
def deep() -> Plan:
    """More ranks than the short form shows."""
    return pipeline_plan(plan_of(24, 24, 24), ranks=24, micro_batches=24)
