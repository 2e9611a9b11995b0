"""Bytes of the model states outside forward and backward: at rest, when the optimizer steps, and at the start of a run.

All are of shard rank 0, the fullest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from shardwright.planner import flat
from shardwright.planner.engines import ENGINES
from shardwright.planner.flat import Bucket, Chain, trained_elements
from shardwright.planner.flat_chains import FlatPublishing
from shardwright.planner.groups import Groups
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.space import Point
from shardwright.schemas.job import JobSpec


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Of one point."""

    parameters: int
    optimizer_states: int
    step: int
    """Gradients when the optimizer steps, with the copies that it makes of them."""
    initialise: tuple[int, int]
    """Parameters, and master values, at the worst moment of starting up."""
    publication: int
    """New values on their way, with gradients that are still there."""
    gathered: int
    """The root and the largest block, gathered together at least once in a step."""


def state_bytes(point: Point, groups: Groups, job: JobSpec) -> StateBytes:
    """The bytes of a point; only what the engine, the shard degrees and the precision say of it matters."""
    return (_flat if ENGINES[point.engine].flat else _stock)(point, groups, job)


def _stock(point: Point, groups: Groups, job: JobSpec) -> StateBytes:
    sizes, engine = groups.sizes(point.shard), ENGINES[point.engine]
    optimizer = OPTIMIZERS[job.train.optimizer.name]
    parameters = MASTER_BYTES * (sum(sizes.blocks) + sizes.root) // point.shard
    gradients = MASTER_BYTES * (sum(sizes.block_gradients) + sizes.root_gradients) // point.shard
    foreach = engine.dtensors and not optimizer.fused_on_dtensors
    copied = foreach and optimizer.foreach_copies_gradients(job.train.optimizer)
    gathered = PRECISIONS[point.precision].compute_bytes * (sizes.root + max(sizes.blocks, default=0))
    whole = MASTER_BYTES * (groups.profile.numel if _starts_whole(groups, job) else groups.largest)
    return StateBytes(
        parameters=parameters,
        optimizer_states=optimizer.state_bytes(job.train, sizes.own, sizes.tensors),
        step=gradients * (2 if copied else 1),
        initialise=(parameters + (whole if engine.shards else 0), 0),
        publication=0,
        gathered=gathered if engine.shards else 0,
    )


def _starts_whole(groups: Groups, job: JobSpec) -> bool:
    """Whether the device holds the whole model before it is sharded: a constructor's on a CPU."""
    return groups.profile.init == "constructor" and job.cluster.device.kind == "cpu"


def _flat(point: Point, groups: Groups, job: JobSpec) -> StateBytes:
    layout, compute = point.chain, PRECISIONS[point.precision].compute_bytes
    units = groups.flat(layout, job.train.optimizer)
    held = flat.at_rest(layout, units, compute, rank=0)
    trained = [trained_elements(unit) for unit in units]
    whole = [compute * sum(bucket.padded for bucket in unit) for unit in units]
    return StateBytes(
        parameters=held.parameters,
        optimizer_states=held.master
        + OPTIMIZERS[job.train.optimizer.name].state_bytes(job.train, held.own, held.tensors),
        step=held.gradients,
        initialise=max(_building(point, groups, job), key=sum),
        publication=FlatPublishing(layout, trained, compute).worst,
        gathered=whole[-1] + max(whole[:-1], default=0) if layout.parameters else 0,
    )


def _building(point: Point, groups: Groups, job: JobSpec) -> Iterator[tuple[int, int]]:
    """Bytes while each bucket of `ShardedStates` is made: what is kept of those before, the parameters that have not
    been taken over, a float32 copy of the bucket's and, in bf16, one of that."""
    layout, compute = point.chain, PRECISIONS[point.precision].compute_bytes
    master = 0 if compute == MASTER_BYTES else MASTER_BYTES
    whole_model = _starts_whole(groups, job)
    left = MASTER_BYTES * groups.profile.numel if whole_model else 0
    shards = masters = 0
    # Within a run of equal units everything is linear in the place, so that its ends are the worst.
    for unit, run in groupby(groups.flat(layout)):
        count = len(tuple(run))
        own = MASTER_BYTES * sum(bucket.numel for bucket in unit)
        shard = compute * sum(bucket.padded for bucket in unit) // layout.degree(layout.parameters)
        values = master * sum(bucket.padded for bucket in unit) // layout.degree(layout.optimizer_states)
        for place in {0, count - 1}:
            behind = left - place * own if whole_model else own
            for more, made in _taking_over(unit, layout, compute):
                yield shards + place * shard + behind + more, masters + place * values + made
        left -= count * own if whole_model else 0
        shards, masters = shards + count * shard, masters + count * values


def _taking_over(unit: Sequence[Bucket], layout: Chain, compute: int) -> Iterator[tuple[int, int]]:
    """The same beside the units before and the parameters of this one and those behind, relative to when none of the
    buckets of this one has been made."""
    master = 0 if compute == MASTER_BYTES else MASTER_BYTES
    shards = masters = 0
    for bucket in unit:
        own = MASTER_BYTES * bucket.numel
        shard = compute * bucket.padded // layout.degree(layout.parameters)
        values = master * bucket.padded // layout.degree(layout.optimizer_states)
        made = values + (shard if layout.parameters else 0)
        copies = (MASTER_BYTES + (compute if master else 0)) * bucket.padded
        yield shards + copies + max(0, made - own), masters
        shards, masters = shards + shard - own, masters + values
