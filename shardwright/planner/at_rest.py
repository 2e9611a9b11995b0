"""The bytes that every rank holds of the model states between forward, backward and step, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from shardwright.planner import flat
from shardwright.planner.engines import ENGINES
from shardwright.planner.flat import Bucket
from shardwright.planner.groups import Groups
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.parts import Part, parts_of
from shardwright.planner.pipelines.owners import Owners
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.sharding import own_shard, padded_shard
from shardwright.planner.space import Point, point_of
from shardwright.schemas.job import TrainSpec
from shardwright.schemas.plan import Decision

State = Literal["parameters", "gradients", "optimizer_states"]
STATES: tuple[State, ...] = ("parameters", "gradients", "optimizer_states")


def at_rest_bytes(decision: Decision, groups: Groups, train: TrainSpec, rank: int) -> dict[State, int]:
    """Bytes of the distinct storages that rank `rank` holds after the optimizer's step, before gradients are dropped.

    Exactly what `untyped_storage().nbytes()` adds up to over parameters, gradients and tensors of `optimizer.state`,
    each storage counted once. `groups` are of the model as one process has it: tensors that processes
    divide have the shapes of the fullest part. amsp's float32 values of parameters that rest in fewer bits, frozen
    ones included, count as optimizer states, as in ZeRO (arXiv 1910.02054, section 3.1). Raises ValueError for a rank
    outside the mesh.
    """
    if not 0 <= rank < decision.mesh.world_size:
        raise ValueError(f"rank {rank} is not in a world of {decision.mesh.world_size}")
    return at_rest_of(point_of(decision), groups, train, rank)


def at_rest_of(point: Point, groups: Groups, train: TrainSpec, rank: int) -> dict[State, int]:
    """The same of a point."""
    pipe_rank, member = divmod(rank // point.parallel.tp, point.copies)
    of_part = _flat if ENGINES[point.engine].flat else _dimension_0
    held = [of_part(part, groups, train, pipe_rank, part.rank(member)) for part in parts_of(point)]
    return {state: sum(each[state] for each in held) for state in STATES}


def _flat(part: Part, groups: Groups, train: TrainSpec, pipe_rank: int, member: int) -> dict[State, int]:
    point, layout = part.point, part.point.chain
    units: Sequence[Sequence[Bucket]] = part.groups(groups).flat(layout, train.optimizer)
    if point.pipe is not None:
        units = Owners(groups).flat(point.pipe, pipe_rank, part, train.optimizer)
    held = flat.at_rest(layout, units, PRECISIONS[point.precision].compute_bytes, member)
    return {
        "parameters": held.parameters,
        "gradients": held.gradients,
        "optimizer_states": held.master + OPTIMIZERS[train.optimizer.name].state_bytes(train, held.own, held.tensors),
    }


def _dimension_0(part: Part, groups: Groups, train: TrainSpec, _: int, member: int) -> dict[State, int]:
    degree = part.point.shard if ENGINES[part.point.engine].shards else 1
    parameters = part.groups(groups).profile.parameters
    trainable = [parameter.shape for parameter in parameters if parameter.trainable]
    own = sum(own_shard(shape, degree, member % degree) for shape in trainable)
    return {
        "parameters": MASTER_BYTES * sum(padded_shard(parameter.shape, degree) for parameter in parameters),
        "gradients": MASTER_BYTES * sum(padded_shard(shape, degree) for shape in trainable),
        "optimizer_states": OPTIMIZERS[train.optimizer.name].state_bytes(train, own, len(trainable)),
    }
