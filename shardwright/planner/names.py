"""What a point is called."""

from __future__ import annotations

from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.space import Point


def plan_name(point: Point, blocks: int) -> str:
    """The field's name of a point, for example `FSDP2 x 8 (ZeRO-3), bf16, 12 of 32 blocks checkpointed`."""
    parts = [_layout(point), PRECISIONS[point.precision].short]
    if point.checkpointed:
        parts.append(f"{point.checkpointed} of {blocks} blocks checkpointed")
    return ", ".join(parts)


def summary(point: Point, blocks: int) -> str:
    """The name, and all else in which two points may differ: how the batch is cut, and when gradients are reduced."""
    cut = f"micro-batch {point.micro_batch} x {point.accumulation}"
    waits = ", gradients reduced once a step" if point.gradients_wait else ""
    return f"{plan_name(point, blocks)}, {cut}{waits}"


def _layout(point: Point) -> str:
    kept = " (parameters kept)" if point.kept else ""
    if point.world == 1:
        return f"one device{kept}"
    if point.engine == "ddp":
        return f"DDP x {point.world}"
    if point.shard == 1:
        return f"FSDP2, replicated x {point.world}{kept}"
    if point.replicas > 1:
        return f"HSDP {point.replicas} x {point.shard}{kept}"
    return f"FSDP2 x {point.shard}{kept or ' (ZeRO-3)'}"
