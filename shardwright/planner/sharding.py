"""Who holds which elements of a parameter: dimension-0 sharding as fully_shard does it.

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
