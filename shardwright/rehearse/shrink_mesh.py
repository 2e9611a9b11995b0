"""Fewer processes, the same structure: axes stay wider than one and shard degrees apart, where they can.

[Note: how axes are shrunk]
Ranks count through the levels of the cluster, fastest first, and through the axes of the mesh, last first; shard
degrees count through them too, and one may end inside an axis (that of fsdp2's second copy). So the world is a product
of factors, each within one level, one axis and one gap between neighbouring degrees. A rehearsal gives each factor the
size 2, drops factors while the product is more than the processes allowed (a gap loses its slower factors first, and
only then vanishes whole, the slowest one first), and grows what is left towards four processes. Four tell apart what
two cannot (the first shard, the last one and those between), and more than four prove nothing new about one axis.
The stages of a pipeline lie on an axis of their own, the slowest: it stays, with up to four ranks where each factor of
the others still finds room, and these share the processes that are left. Tensor parallelism lies on the fastest axis,
which stays with two processes. How many processes share sequences or experts counts as a degree, so that these groups
stay, too, as long as there is room.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import NamedTuple

from shardwright.planner.space import PIPELINE_AXIS, TENSOR_AXIS
from shardwright.schemas.cluster import ClusterSpec, LevelSpec
from shardwright.schemas.plan import Decision

_ENOUGH = 4


class Factor(NamedTuple):
    """The part of the world that lies in one axis, one level of the cluster and one gap between degrees."""

    axis: str
    level: int
    gap: int
    size: int
    end: int
    """Devices with the same part of every layer, inside of it and itself: the degree that it leads to."""


@dataclass(frozen=True, slots=True)
class SmallMesh:
    """A mesh for few processes, and the levels of a cluster for it."""

    axes: dict[str, int]
    """Size by axis; an axis that vanished has size 1."""
    levels: tuple[LevelSpec, ...]
    kept: tuple[tuple[Factor, int], ...]
    """What is left of the factors, each with its size."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return prod(self.axes.values())

    @property
    def ranks(self) -> int:
        """Ranks of the pipeline; 1 without one."""
        return self.axes.get(PIPELINE_AXIS, 1)

    @property
    def tensor_ranks(self) -> int:
        """Processes that share every layer; 1 without tensor parallelism."""
        return self.axes.get(TENSOR_AXIS, 1)

    @property
    def copies(self) -> int:
        """Processes that train the same stages, or the whole model, with the same part of every layer."""
        return self.world_size // (self.ranks * self.tensor_ranks)

    def degree(self, degree: int) -> int:
        """What has become of a shard degree."""
        return prod(small for factor, small in self.kept if factor.axis != TENSOR_AXIS and factor.end <= degree)


def shrink_mesh(decision: Decision, cluster: ClusterSpec, processes: int) -> SmallMesh:
    """The smallest mesh of the same structure on at most `processes` ([Note: how axes are shrunk])."""
    kept = _kept(factors(decision, cluster), processes)
    axes = [axis.name for axis in decision.mesh.axes]
    sizes = {axis: prod(small for factor, small in kept if factor.axis == axis) for axis in axes}
    widths = [prod(small for factor, small in kept if factor.level == n) for n in range(len(cluster.levels))]
    levels = [
        level.model_copy(update={"size": width})
        for level, width in zip(cluster.levels, widths, strict=True)
        if width > 1
    ]
    return SmallMesh(sizes, tuple(levels) or (cluster.levels[0].model_copy(update={"size": 1}),), tuple(kept))


def _kept(found: Sequence[Factor], processes: int) -> list[tuple[Factor, int]]:
    """What is left of the factors, each with its size."""
    across = [factor for factor in found if factor.axis == TENSOR_AXIS]
    if across:
        parts = 2 if processes >= 2 * (1 + any(factor.axis == PIPELINE_AXIS for factor in found)) else 1
        whole = across[0]._replace(size=prod(factor.size for factor in across))
        return [(whole, parts), *_kept(found[len(across) :], processes // parts)]
    others = [factor for factor in found if factor.axis != PIPELINE_AXIS]
    along = found[len(others) :]
    if not along:
        return _grown(_few(others, processes), min(processes, _ENOUGH))
    whole = along[-1]._replace(size=prod(factor.size for factor in along))
    ranks = _ranks(whole.size, len(others), processes)
    copies = processes // ranks
    return [*_grown(_few(others, copies), min(copies, _ENOUGH)), (whole, ranks)]


def _ranks(ranks: int, others: int, processes: int) -> int:
    """Of the small pipeline: at least two, and no more than leave each of the other factors its two processes."""
    least = 2
    while others and processes >> others < least:
        others -= 1
    return max(least, min(ranks, _ENOUGH, processes >> others))


def factors(decision: Decision, cluster: ClusterSpec) -> list[Factor]:
    """The world as a product of factors, fastest first; those of size 1 are left out."""
    found: list[Factor] = []
    degrees = _degrees(decision)
    room = [level.size for level in cluster.levels]
    end = 1
    for axis in reversed(decision.mesh.axes):
        left, shares_layers = axis.size, axis.name == TENSOR_AXIS
        for number in range(len(room)):
            while (size := gcd(left, room[number], 0 if shares_layers else _to_next(degrees, end))) > 1:
                end, left, room[number] = end * (1 if shares_layers else size), left // size, room[number] // size
                found.append(Factor(axis.name, number, bisect_left(degrees, end), size, end))
            if room[number] > 1:
                break
        if left > 1:  # the axis does not divide the levels evenly: what is left counts to the slowest
            end *= 1 if shares_layers else left
            found.append(Factor(axis.name, len(room) - 1, bisect_left(degrees, end), left, end))
    return found


def _degrees(decision: Decision) -> list[int]:
    """The shard degrees, how many share sequences and experts, and the world size of each part, from one on."""
    states, world = decision.states, decision.mesh.world_size // decision.tensor_parallel.degree
    shared = (decision.context_parallel.degree, decision.expert_parallel.degree)
    secondary = () if states.secondary is None else (states.secondary.degree,)
    named = (states.parameters.degree, states.gradients.degree, states.optimizer_states.degree, *secondary)
    return sorted({1, *named, *shared, world})


def _to_next(degrees: Sequence[int], end: int) -> int:
    """How much wider the next degree is."""
    return next((degree // end for degree in degrees if degree > end), 1)


def _few(found: Sequence[Factor], processes: int) -> list[Factor]:
    """As many factors as fit when each has size 2."""
    kept = list(found)
    while 2 ** len(kept) > processes:
        gaps = [factor.gap for factor in kept]
        shared = [number for number, gap in enumerate(gaps) if gaps.count(gap) > 1]
        del kept[shared[-1] if shared else -1]
    return kept


def _grown(kept: Sequence[Factor], processes: int) -> list[tuple[Factor, int]]:
    """Each factor with its size: 2, or 4 where it is that large and there is room.

    Powers of two, because then the script's factor WORLD_SIZE changes no bit of a gradient, however it is rounded.
    """
    sizes = [2] * len(kept)
    for number, factor in enumerate(kept):
        others = prod(sizes) // sizes[number]
        sizes[number] = 4 if factor.size >= 4 and 4 * others <= processes else 2
    return list(zip(kept, sizes, strict=True))
