"""Fewer processes, the same structure: every mesh axis wider than one stays so where it can.

[Note: how axes are shrunk]
Ranks count through the levels of the cluster, fastest first, and through the axes of the mesh, last first; so every
axis is a product of factors, each within one level. A rehearsal gives each factor the size 2, drops factors while the
product is more than the processes allowed (an axis loses its slower factors first, and only then vanishes whole), and
grows what is left towards four processes. Four tell apart what two cannot (the first shard, the last one and those
between), and more than four prove nothing new about one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod

from shardwright.schemas.cluster import ClusterSpec, LevelSpec
from shardwright.schemas.plan import Mesh

_ENOUGH = 4


@dataclass(frozen=True, slots=True)
class Factor:
    """The part of one axis that lies in one level of the cluster."""

    axis: str
    level: int
    size: int


@dataclass(frozen=True, slots=True)
class SmallMesh:
    """A mesh for few processes, and the levels of a cluster for it."""

    axes: dict[str, int]
    """Size by axis; an axis that vanished has size 1."""
    levels: tuple[LevelSpec, ...]

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return prod(self.axes.values())


def shrink_mesh(mesh: Mesh, cluster: ClusterSpec, processes: int) -> SmallMesh:
    """The smallest mesh of the same structure on at most `processes` ([Note: how axes are shrunk])."""
    kept = _grown(_few(factors(mesh, cluster), processes), min(processes, _ENOUGH))
    sizes = {str(axis.name): prod(small for factor, small in kept if factor.axis == axis.name) for axis in mesh.axes}
    widths = [prod(small for factor, small in kept if factor.level == n) for n in range(len(cluster.levels))]
    levels = [
        level.model_copy(update={"size": width})
        for level, width in zip(cluster.levels, widths, strict=True)
        if width > 1
    ]
    return SmallMesh(sizes, tuple(levels) or (cluster.levels[0].model_copy(update={"size": 1}),))


def factors(mesh: Mesh, cluster: ClusterSpec) -> list[Factor]:
    """The axes as products of parts of levels, fastest first; parts of size 1 are left out."""
    found: list[Factor] = []
    room = [level.size for level in cluster.levels]
    for axis in reversed(mesh.axes):
        left = axis.size
        for number in range(len(room)):
            size = gcd(left, room[number])
            if size > 1:
                found.append(Factor(axis.name, number, size))
            left, room[number] = left // size, room[number] // size
            if room[number] > 1:
                break
        if left > 1:  # the axis does not divide the levels evenly: what is left counts to the slowest
            found.append(Factor(axis.name, len(room) - 1, left))
    return found


def _few(found: Sequence[Factor], processes: int) -> list[Factor]:
    """As many factors as fit when each has size 2."""
    kept = list(found)
    while 2 ** len(kept) > processes:
        axes = [factor.axis for factor in kept]
        split = [number for number, axis in enumerate(axes) if axes.count(axis) > 1]
        del kept[split[-1] if split else -1]
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
