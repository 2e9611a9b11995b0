"""Bytes of the model states outside forward and backward: at rest, when the optimizer steps, and at the start of a run.

All are of shard rank 0, the fullest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

from shardwright.planner import flat
from shardwright.planner.engines import ENGINES
from shardwright.planner.flat import Bucket, Chain, trained_elements
from shardwright.planner.flat_chains import FlatPublishing
from shardwright.planner.groups import Groups
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.parts import parts_of
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

    def plus(self, other: StateBytes) -> StateBytes:
        """Of both together, each with its own most of what changes: never too little."""
        return StateBytes(
            parameters=self.parameters + other.parameters,
            optimizer_states=self.optimizer_states + other.optimizer_states,
            step=self.step + other.step,
            initialise=(self.initialise[0] + other.initialise[0], self.initialise[1] + other.initialise[1]),
            publication=self.publication + other.publication,
            gathered=self.gathered + other.gathered,
        )


ChainedUnit: TypeAlias = tuple[tuple[Bucket, Chain], ...]
"""Buckets of a unit, each with the chain that its states lie on."""


def state_bytes(point: Point, groups: Groups, job: JobSpec, whole: Groups | None = None) -> StateBytes:
    """The bytes of a point; only what the engine, the shard degrees and the precision say of it matters. `whole`: the
    model before its tensors were divided, where they are."""
    flat_states = ENGINES[point.engine].flat
    made = [(_flat if flat_states else _stock)(part.point, part.groups(groups), job) for part in parts_of(point)]
    every = made[0]
    for each in made[1:]:
        every = every.plus(each)
    building = (
        _building(point, groups, job, whole) if flat_states else _sharding(point, every.parameters, groups, job, whole)
    )
    return replace(every, initialise=max(building, key=sum))


def _stock(point: Point, groups: Groups, job: JobSpec) -> StateBytes:
    """Without what starting up takes."""
    sizes, engine = groups.sizes(point.shard), ENGINES[point.engine]
    optimizer = OPTIMIZERS[job.train.optimizer.name]
    gradients = MASTER_BYTES * (sum(sizes.block_gradients) + sizes.root_gradients) // point.shard
    foreach = engine.dtensors and not optimizer.fused_on_dtensors
    copied = foreach and optimizer.foreach_copies_gradients(job.train.optimizer)
    gathered = PRECISIONS[point.precision].compute_bytes * (sizes.root + max(sizes.blocks, default=0))
    return StateBytes(
        parameters=MASTER_BYTES * (sum(sizes.blocks) + sizes.root) // point.shard,
        optimizer_states=optimizer.state_bytes(job.train, sizes.own, sizes.tensors),
        step=gradients * (2 if copied else 1),
        initialise=(0, 0),
        publication=0,
        gathered=gathered if engine.shards else 0,
    )


def _sharding(
    point: Point, parameters: int, groups: Groups, job: JobSpec, whole: Groups | None
) -> Iterator[tuple[int, int]]:
    """All parameters at rest, and beside them what initialisation holds whole."""
    elements = groups.numel if _starts_whole(groups, job) else groups.largest
    yield parameters + (MASTER_BYTES * elements if ENGINES[point.engine].shards else 0), 0
    yield from _undivided(parameters, 0, groups, job, whole)


def _undivided(
    parameters: int, masters: int, groups: Groups, job: JobSpec, whole: Groups | None
) -> Iterator[tuple[int, int]]:
    """Where tensors are divided: the model is first whole, or each unit is, at the latest beside all the others."""
    if whole is None or whole.numel == groups.numel:
        return
    yield (
        (MASTER_BYTES * whole.numel, 0)
        if _starts_whole(groups, job)
        else (
            parameters + MASTER_BYTES * whole.largest,
            masters,
        )
    )


def _starts_whole(groups: Groups, job: JobSpec) -> bool:
    """Whether the device holds the whole model before it is sharded: a constructor's on a CPU."""
    return groups.profile.init == "constructor" and job.cluster.device.kind == "cpu"


def _flat(point: Point, groups: Groups, job: JobSpec) -> StateBytes:
    """Without what starting up takes."""
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
        initialise=(0, 0),
        publication=FlatPublishing(layout, trained, compute).worst,
        gathered=whole[-1] + max(whole[:-1], default=0) if layout.parameters else 0,
    )


def _building(point: Point, groups: Groups, job: JobSpec, whole: Groups | None) -> Iterator[tuple[int, int]]:
    """Bytes while each bucket of `ShardedStates` is made: what is kept of those before, the parameters that have not
    been taken over, a float32 copy of the bucket's and, in bf16, one of that."""
    compute = PRECISIONS[point.precision].compute_bytes
    master = 0 if compute == MASTER_BYTES else MASTER_BYTES
    whole_model = _starts_whole(groups, job)
    left = MASTER_BYTES * groups.profile.numel if whole_model else 0
    shards = masters = 0
    # Within a run of equal units everything is linear in the place, so that its ends are the worst.
    for unit, run in groupby(chained_units(point, groups)):
        count = len(tuple(run))
        own = MASTER_BYTES * sum(bucket.numel for bucket, _ in unit)
        shard = sum(compute * bucket.padded // layout.degree(layout.parameters) for bucket, layout in unit)
        values = sum(master * bucket.padded // layout.degree(layout.optimizer_states) for bucket, layout in unit)
        for place in {0, count - 1}:
            behind = left - place * own if whole_model else own
            for more, made in _taking_over(unit, compute):
                yield shards + place * shard + behind + more, masters + place * values + made
        left -= count * own if whole_model else 0
        shards, masters = shards + count * shard, masters + count * values
    yield from _undivided(shards, masters, groups, job, whole)


def chained_units(point: Point, groups: Groups) -> list[ChainedUnit]:
    """The buckets of every unit, each with its own chain, in the order in which the runtime makes them."""
    made = [(part.point.chain, part.groups(groups).flat(part.point.chain)) for part in parts_of(point)]
    layouts = [layout for layout, _ in made]
    return [in_order(layouts, buckets) for buckets in zip(*(units for _, units in made), strict=True)]


def in_order(layouts: Sequence[Chain], buckets: Sequence[Sequence[Bucket]]) -> ChainedUnit:
    """Of one unit, the experts' last."""
    return tuple((bucket, layout) for layout, of in zip(layouts, buckets, strict=True) for bucket in of)


def _taking_over(unit: ChainedUnit, compute: int) -> Iterator[tuple[int, int]]:
    """The same beside the units before and the parameters of this one and those behind, relative to when none of the
    buckets of this one has been made."""
    master = 0 if compute == MASTER_BYTES else MASTER_BYTES
    shards = masters = 0
    for bucket, layout in unit:
        own = MASTER_BYTES * bucket.numel
        shard = compute * bucket.padded // layout.degree(layout.parameters)
        values = master * bucket.padded // layout.degree(layout.optimizer_states)
        made = values + (shard if layout.parameters else 0)
        copies = (MASTER_BYTES + (compute if master else 0)) * bucket.padded
        yield shards + copies + max(0, made - own), masters
        shards, masters = shards + shard - own, masters + values
