"""Seconds of one collective over the levels of a cluster.

[Note: ring over levels]
A ring of p devices gathers V bytes in p - 1 hops. Every group of m neighbouring devices below a level receives the
share of the others, V (1 - m/p), over its m links of that level, so that

    t = max over levels of V (1 - m/p) / (m * efficiency * bandwidth)  +  sum over levels of hops * latency

where a level that joins s groups has (s - 1) hops for each group of the levels above it. A reduce-scatter of V bytes
costs the same. An all-reduce moves twice as much, up and down a tree of ceil(log2 s) hops a level. In an all-to-all
nothing is shared on the way: of the V bytes that every device sends, V (1 - m/p) leave the group below a level, each
over the link of the device that sends them. (Thakur et al. 2005,
"Optimization of Collective Communication Operations in MPICH"; hops as NCCL counts them, github.com/NVIDIA/nccl,
src/graph/tuning.cc.)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2, prod
from typing import Literal

from shardwright.schemas.cluster import LevelSpec

CollectiveKind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
Links = Sequence[tuple[LevelSpec, int]]
"""Levels that a group spans, fastest first, with how many groups of the level below each joins."""


def collective_seconds(kind: CollectiveKind, links: Links, size: int, efficiency: float) -> float:
    """Time of one collective of `size` bytes, the whole tensor's, or what one process sends in an all-to-all
    ([Note: ring over levels]); 0.0 in a group of one."""
    parts = [part for _, part in links]
    devices = prod(parts)
    if devices == 1 or size == 0:
        return 0.0
    transfer = ring = tree = 0.0
    for index, (level, part) in enumerate(links):
        below = prod(parts[:index])
        links_used = 1 if kind == "all_to_all" else below
        transfer = max(transfer, size * (1 - below / devices) / (links_used * efficiency * level.bandwidth))
        ring += level.latency * (part - 1) * prod(parts[index + 1 :])
        tree += level.latency * ceil(log2(part))
    return 2 * (transfer + tree) if kind == "all_reduce" else transfer + ring
