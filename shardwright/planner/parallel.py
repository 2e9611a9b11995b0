"""How processes share the work of one copy of the model: tensor, context and expert parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardwright.schemas.cluster import ClusterSpec, LevelSpec
from shardwright.schemas.plan import ContextMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """The degrees of a point, and what goes with them.

    [Note: processes]
    The rank of a process is (pp * data + d) * tp + t: neighbours share every layer (`tp`), then come the `data`
    processes with the same part of every layer, then the stages of a pipeline. The model states are sharded over the
    `data` ones. Of these, every `cp` neighbours share each sequence, and every `ep` neighbours share the experts.
    """

    tp: int = 1
    sequence: bool = False
    """Whether activations between divided layers are divided along the sequence."""
    cp: int = 1
    method: Literal["none"] | ContextMethod = "none"
    ep: int = 1


WHOLE = Parallel()
"""Every process has whole layers, sequences and expert stacks."""


def without_fastest(cluster: ClusterSpec, inner: int) -> ClusterSpec:
    """The cluster with every `inner` neighbouring devices as one: its fastest levels divided by them. Levels keep their
    names, of size 1 where all of their groups are inside one device now. `inner` has to be one of `shard_degrees`."""
    levels: list[LevelSpec] = []
    for level in cluster.levels:
        taken = min(level.size, inner)
        levels.append(level.model_copy(update={"size": level.size // taken}))
        inner //= taken
    return cluster.model_copy(update={"levels": tuple(levels)})
