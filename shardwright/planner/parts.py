"""Parameters by the processes that their states are sharded over.

[Note: states of experts]
Where `ep` neighbouring processes share the experts of each layer, each of them has other ones, so that the states of
these are sharded over the processes that have the same: every `ep`-th. Each shard degree is divided by `ep`, down to 1.
fsdp2 has a group of their own for the experts of a block, along two axes of a mesh of its own; amsp has buckets of
their own, which go over the axes of its mesh that lie beyond `ep`. All that the planner knows of states it knows of a
point and of groups of parameters: the experts have a point with their own degrees, and groups with only them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from operator import mul

from shardwright.planner.groups import Groups, PartName
from shardwright.planner.space import Point, axis_name
from shardwright.schemas.profile import Parameter


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the parameters, and the point that their states are sharded as ([Note: states of experts])."""

    name: PartName
    point: Point
    inner: int = 1
    """Neighbouring processes that have different ones."""
    first_axis: int = 0
    """amsp: how many of the fastest axes these processes are."""

    def has(self, parameter: Parameter) -> bool:
        """Whether a parameter is one of them."""
        return self.name == "all" or (self.name == "experts") == (parameter.experts > 0)

    def groups(self, groups: Groups) -> Groups:
        """The groups with only these parameters, as many as of all of them."""
        return groups.part(self.name)

    def rank(self, rank: int) -> int:
        """Of a process of the point, its number among those that have the same parameters."""
        return rank // self.inner

    def axis(self, axis: int) -> str:
        """amsp: the name of one of the axes that these states go over."""
        return axis_name(self.first_axis + axis)

    @property
    def shard_axis(self) -> str:
        """fsdp2: the name of the axis that the states are sharded over."""
        return "expert_shard" if self.name == "experts" else "dp_shard"

    @property
    def replicate_axis(self) -> str:
        """fsdp2: the name of the axis that joins their copies."""
        return "expert_replicate" if self.name == "experts" else "dp_replicate"


def parts_of(point: Point) -> tuple[Part, ...]:
    """All parameters; where experts are shared, the others and these. Raises ValueError where shard degrees and the
    number of processes that share experts do not divide each other."""
    return (Part("all", point),) if point.parallel.ep == 1 else _divided(point, point.parallel.ep)


@lru_cache(maxsize=100_000)
def _divided(point: Point, shared: int) -> tuple[Part, ...]:
    dense = replace(point, parallel=replace(point.parallel, ep=1))
    first = _axes_of(point, shared) if point.axes else 0
    experts = replace(
        dense,
        world=point.world // shared,
        shard=_degree(point.shard, shared),
        gradient_degree=_degree(point.gradient_degree, shared),
        optimizer_degree=_degree(point.optimizer_degree, shared),
        secondary=None if point.secondary is None else _degree(point.secondary, shared),
        axes=point.axes[first:],
        int8_gathers=tuple(axis - first for axis in point.int8_gathers if axis >= first),
        int4_reductions=tuple(axis - first for axis in point.int4_reductions if axis >= first),
    )
    return Part("dense", dense), Part("experts", experts, shared, first)


def spans_world(point: Point) -> bool:
    """Whether the gradient norm is one sum over all processes, each of which counts its parts of what others have too
    as a share; otherwise it is summed over the axes that states are sharded over."""
    return point.parallel.tp > 1 or point.parallel.ep > 1


def _degree(degree: int, shared: int) -> int:
    wide, narrow = max(degree, shared), min(degree, shared)
    if wide % narrow:
        raise ValueError(
            f"a shard degree of {degree} and {shared} processes that share experts do not divide each other"
        )
    return max(1, degree // shared)


def _axes_of(point: Point, shared: int) -> int:
    ends = list(accumulate(point.axes, mul, initial=1))
    if shared not in ends:
        raise ValueError(f"{shared} processes that share experts are no product of the first of the axes {point.axes}")
    return ends.index(shared)
