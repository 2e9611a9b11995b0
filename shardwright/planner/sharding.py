"""Who holds which elements: dimension-0 sharding as fully_shard does it, and the exact bytes at rest of every rank.

[Note: dimension-0 shards]
fully_shard splits dimension 0 of each parameter as `torch.chunk` does: pieces of ceil(n / degree) rows, the last ones
shorter or empty. The parameter's storage is padded to a full piece on every rank, empty or not, because the padded
pieces enter the all-gather as they are (torch 2.13, _fsdp_param.py, `_init_sharded_param`); the reduce-scatter's
output, whose views are the gradients, is padded the same way (_fsdp_collectives.py, `foreach_reduce`). Optimizer states
are made like the parameter's own elements and hold no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

from shardwright.planner.engines import ENGINES
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.precisions import MASTER_BYTES
from shardwright.schemas.job import OptimizerSpec
from shardwright.schemas.plan import Decision
from shardwright.schemas.profile import Parameter

State = Literal["parameters", "gradients", "optimizer_states"]


def padded_shard(shape: Sequence[int], degree: int) -> int:
    """Elements of one rank's padded piece of a parameter ([Note: dimension-0 shards])."""
    if degree == 1:
        return prod(shape)
    return -(-shape[0] // degree) * prod(shape[1:])


def own_shard(shape: Sequence[int], degree: int, rank: int) -> int:
    """Elements of the piece of shard rank `rank` without its padding; 0 for an empty piece."""
    if degree == 1:
        return prod(shape)
    rows = -(-shape[0] // degree)
    return max(0, min(rows, shape[0] - rows * rank)) * prod(shape[1:])


def padded_numel(shape: Sequence[int], degree: int) -> int:
    """Elements of a gathered parameter: the padded pieces of all ranks."""
    return padded_shard(shape, degree) * degree


def at_rest_bytes(
    decision: Decision, parameters: Sequence[Parameter], optimizer: OptimizerSpec, rank: int
) -> dict[State, int]:
    """Bytes of the distinct storages that rank `rank` holds after the optimizer's step, before gradients are dropped.

    Exactly what `untyped_storage().nbytes()` adds up to over parameters, gradients and tensors of `optimizer.state`,
    each storage counted once. Raises ValueError for a rank outside the mesh.
    """
    if not 0 <= rank < decision.mesh.world_size:
        raise ValueError(f"rank {rank} is not in a world of {decision.mesh.world_size}")
    traits = OPTIMIZERS[optimizer.name]
    degree = decision.states.parameters.degree if ENGINES[decision.engine.name].shards else 1
    trainable = [parameter.shape for parameter in parameters if parameter.trainable]
    own = sum(own_shard(shape, degree, rank % degree) for shape in trainable)
    return {
        "parameters": MASTER_BYTES * sum(padded_shard(parameter.shape, degree) for parameter in parameters),
        "gradients": MASTER_BYTES * sum(padded_shard(shape, degree) for shape in trainable),
        "optimizer_states": traits.state_bytes(optimizer, own, len(trainable)),
    }
