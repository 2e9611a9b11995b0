"""Bytes of the model states of one rank of a pipeline outside its program: at rest, when it starts, when it publishes.

All are of the first of the processes that have the rank's stages, the fullest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwright.planner import flat
from shardwright.planner.flat import FlatAtRest
from shardwright.planner.flat_chains import FlatPublishing
from shardwright.planner.groups import Groups
from shardwright.planner.model_states import ChainedUnit, in_order
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.parts import parts_of
from shardwright.planner.pipelines.buffers import RankSizes, UnitSizes, building
from shardwright.planner.pipelines.costs import pipe_of
from shardwright.planner.pipelines.owners import Owners
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.space import Point
from shardwright.schemas.job import JobSpec, TrainSpec


@dataclass(frozen=True, slots=True)
class RankStates:
    """The model states of one rank, whatever its schedule."""

    sizes: RankSizes
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


def rank_states(
    point: Point, rank: int, job: JobSpec, owners: Owners, groups: Groups, whole: Groups | None = None
) -> RankStates:
    """The states of a rank; of the point's pipeline only the stages matter. `whole`: the model before its tensors were
    divided, where they are."""
    pipe = pipe_of(point)
    element = PRECISIONS[point.precision].compute_bytes
    units, parts = owners.units(pipe, rank), parts_of(point)
    stages = [unit.stages for unit in units]
    buckets = [owners.flat(pipe, rank, part) for part in parts]
    sizes = [UnitSizes(stages, of_part, element) for of_part in buckets]
    held = [
        flat.at_rest(part.point.chain, owners.flat(pipe, rank, part, job.train.optimizer), element, 0) for part in parts
    ]
    chained = [in_order([part.point.chain for part in parts], of_unit) for of_unit in zip(*buckets, strict=True)]
    blocks = [of for unit, of in zip(units, chained, strict=True) if unit.block >= 0]
    everything = _sum(held)
    return RankStates(
        sizes=RankSizes(list(zip(parts, sizes, strict=True))),
        at_rest=everything,
        fixed={
            "parameters": everything.parameters,
            "optimizer_states": optimizer_bytes(job.train, everything),
            "inputs": groups.profile.input_bytes.at(point.micro_batch) * point.accumulation,
            "buffers": groups.profile.buffer_bytes,
        },
        initialise=_initialise(element, job, groups, blocks, chained[len(blocks) :], whole),
        publication=sum(
            FlatPublishing(part.point.chain, of.trained, element).worst for part, of in zip(parts, sizes, strict=True)
        ),
        kept=_kept(job.train, everything) if pipe.late_step and job.train.optimizer.clip_grad_norm is not None else 0,
    )


def _sum(held: Sequence[FlatAtRest]) -> FlatAtRest:
    return FlatAtRest(*(sum(getattr(each, name) for each in held) for name in FlatAtRest.__slots__))


def _kept(train: TrainSpec, held: FlatAtRest) -> int:
    return MASTER_BYTES * held.own + OPTIMIZERS[train.optimizer.name].state_bytes(train, held.own, held.tensors)


def optimizer_bytes(train: TrainSpec, held: FlatAtRest) -> int:
    """Of the optimizer's states, float32 values of parameters that rest in fewer bits included."""
    return held.master + OPTIMIZERS[train.optimizer.name].state_bytes(train, held.own, held.tensors)


def _initialise(
    element: int,
    job: JobSpec,
    groups: Groups,
    blocks: Sequence[ChainedUnit],
    rest: Sequence[ChainedUnit],
    whole: Groups | None,
) -> tuple[int, int]:
    """The blocks of the rank first, one after the other; then all that lies outside of blocks has memory, also what
    other ranks have. Where tensors are divided, a block, or all that lies outside, is whole first."""
    outside = sum(parameter.numel for parameter in groups.root)
    starts_whole = groups.profile.init == "constructor" and job.cluster.device.kind == "cpu"
    everything = groups.profile.numel if starts_whole else 0
    master = 0 if element == MASTER_BYTES else MASTER_BYTES
    masters = sum(
        master * bucket.padded // layout.degree(layout.optimizer_states) for of in blocks for bucket, layout in of
    )
    at_rest = sum(element * bucket.padded // layout.degree(layout.parameters) for of in blocks for bucket, layout in of)
    first = building(blocks, 0, element, everything)
    parameters, made = building(rest, outside, element, everything)
    moments = [first, (parameters + at_rest, made + masters)]
    if whole is not None and whole.numel > groups.numel:
        largest = MASTER_BYTES * whole.largest
        moments.append((MASTER_BYTES * whole.numel, 0) if starts_whole else (at_rest + largest, masters))
    return max(moments, key=sum)
