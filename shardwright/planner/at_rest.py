"""The bytes that every rank holds of the model states between forward, backward and step, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from shardwright.planner import flat
from shardwright.planner.engines import ENGINES
from shardwright.planner.flat import Bucket
from shardwright.planner.groups import Groups
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.pipelines.owners import Owners
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.sharding import own_shard, padded_shard
from shardwright.planner.space import point_of
from shardwright.schemas.job import TrainSpec
from shardwright.schemas.plan import Decision

State = Literal["parameters", "gradients", "optimizer_states"]


def at_rest_bytes(decision: Decision, groups: Groups, train: TrainSpec, rank: int) -> dict[State, int]:
    """Bytes of the distinct storages that rank `rank` holds after the optimizer's step, before gradients are dropped.

    Exactly what `untyped_storage().nbytes()` adds up to over parameters, gradients and tensors of `optimizer.state`,
    each storage counted once. amsp's float32 values of parameters that rest in fewer bits, frozen ones included, count
    as optimizer states, as in ZeRO (arXiv 1910.02054, section 3.1). Raises ValueError for a rank outside the mesh.
    """
    if not 0 <= rank < decision.mesh.world_size:
        raise ValueError(f"rank {rank} is not in a world of {decision.mesh.world_size}")
    traits = OPTIMIZERS[train.optimizer.name]
    if ENGINES[decision.engine.name].flat:
        element = PRECISIONS[decision.precision].compute_bytes
        point, member = point_of(decision), rank
        layout = point.chain
        units: Sequence[Sequence[Bucket]] = groups.flat(layout, train.optimizer)
        if point.pipe is not None:
            pipe_rank, member = divmod(rank, point.copies)
            units = Owners(groups).flat(point.pipe, pipe_rank, layout, train.optimizer)
        held = flat.at_rest(layout, units, element, member)
        return {
            "parameters": held.parameters,
            "gradients": held.gradients,
            "optimizer_states": held.master + traits.state_bytes(train, held.own, held.tensors),
        }
    degree = decision.states.parameters.degree if ENGINES[decision.engine.name].shards else 1
    parameters = groups.profile.parameters
    trainable = [parameter.shape for parameter in parameters if parameter.trainable]
    own = sum(own_shard(shape, degree, rank % degree) for shape in trainable)
    return {
        "parameters": MASTER_BYTES * sum(padded_shard(parameter.shape, degree) for parameter in parameters),
        "gradients": MASTER_BYTES * sum(padded_shard(shape, degree) for shape in trainable),
        "optimizer_states": traits.state_bytes(train, own, len(trainable)),
    }
