"""Bytes of the model states of one rank of a pipeline outside its program: at rest, when it starts, when it publishes.

All are of the first of the processes that have the rank's stages, the fullest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwright.planner import flat
from shardwright.planner.flat import Bucket, FlatAtRest
from shardwright.planner.flat_chains import FlatPublishing
from shardwright.planner.groups import Groups
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.pipelines.buffers import UnitSizes, building
from shardwright.planner.pipelines.costs import pipe_of
from shardwright.planner.pipelines.owners import Owners
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.space import Point
from shardwright.schemas.job import JobSpec, TrainSpec


@dataclass(frozen=True, slots=True)
class RankStates:
    """The model states of one rank, whatever its schedule."""

    sizes: UnitSizes
    at_rest: FlatAtRest
    fixed: dict[str, int]
    """Bytes by category through every phase of every step but the first."""
    initialise: tuple[int, int]
    """Parameters, and master values, at the worst moment of starting up."""
    publication: int
    """New values on their way, with gradients that are still there."""
    kept: int
    """Copies of the optimizer's values and states that a late step starts from again, beside its gradients; 0 where
    nothing is kept (`kept_bytes` of the runtime's late.py)."""


def rank_states(point: Point, rank: int, job: JobSpec, owners: Owners, groups: Groups) -> RankStates:
    """The states of a rank; of the point's pipeline only the stages matter."""
    pipe, layout = pipe_of(point), point.chain
    element = PRECISIONS[point.precision].compute_bytes
    units, buckets = owners.units(pipe, rank), owners.flat(pipe, rank, layout)
    sizes = UnitSizes([unit.stages for unit in units], buckets, element)
    held = flat.at_rest(layout, owners.flat(pipe, rank, layout, job.train.optimizer), element, 0)
    blocks = [of for unit, of in zip(units, buckets, strict=True) if unit.block >= 0]
    return RankStates(
        sizes=sizes,
        at_rest=held,
        fixed={
            "parameters": held.parameters,
            "optimizer_states": optimizer_bytes(job.train, held),
            "inputs": groups.profile.input_bytes.at(point.micro_batch) * point.accumulation,
            "buffers": groups.profile.buffer_bytes,
        },
        initialise=_initialise(point, job, groups, blocks, buckets[len(blocks) :]),
        publication=FlatPublishing(layout, sizes.trained, element).worst,
        kept=_kept(job.train, held) if pipe.late_step and job.train.optimizer.clip_grad_norm is not None else 0,
    )


def _kept(train: TrainSpec, held: FlatAtRest) -> int:
    return MASTER_BYTES * held.own + OPTIMIZERS[train.optimizer.name].state_bytes(train, held.own, held.tensors)


def optimizer_bytes(train: TrainSpec, held: FlatAtRest) -> int:
    """Of the optimizer's states, float32 values of parameters that rest in fewer bits included."""
    return held.master + OPTIMIZERS[train.optimizer.name].state_bytes(train, held.own, held.tensors)


def _initialise(
    point: Point,
    job: JobSpec,
    groups: Groups,
    blocks: Sequence[tuple[Bucket, ...]],
    rest: Sequence[tuple[Bucket, ...]],
) -> tuple[int, int]:
    """The blocks of the rank first, one after the other; then all that lies outside of blocks has memory, also what
    other ranks have."""
    layout, element = point.chain, PRECISIONS[point.precision].compute_bytes
    outside = sum(parameter.numel for parameter in groups.root)
    whole = groups.profile.init == "constructor" and job.cluster.device.kind == "cpu"
    everything = groups.profile.numel if whole else 0
    padded = sum(bucket.padded for of in blocks for bucket in of)
    masters = 0 if element == MASTER_BYTES else MASTER_BYTES * padded // layout.degree(layout.optimizer_states)
    first = building(blocks, 0, layout, element, everything)
    parameters, made = building(rest, outside, layout, element, everything)
    last = parameters + element * padded // layout.degree(layout.parameters), made + masters
    return max(first, last, key=sum)
