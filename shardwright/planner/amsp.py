"""The cost model of AMSP as published, to compare our own with: a plain sum of communication times, nothing overlapped.

AMSP (arXiv 2311.00257v2) spreads each model state over a mesh of s0 devices of a node and s1 nodes, and looks up how
fast a collective is on a mesh in a measured table. Its choices come from that table, so with another table they differ.
Nothing of ours is planned with this; `memory` and `timing` are what plans rest on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from shardwright.schemas.checks import divisors

Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast"]


@dataclass(frozen=True, slots=True, order=True)
class Spread:
    """Devices that one copy of a state is spread over."""

    nodes: int
    per_node: int

    @property
    def size(self) -> int:
        """Their number."""
        return self.nodes * self.per_node

    def contains(self, other: Spread) -> bool:
        """Whether it is at least as wide in each dimension."""
        return self.nodes >= other.nodes and self.per_node >= other.per_node

    def within(self, outer: Spread) -> Spread:
        """The mesh over which the copies of this one lie in a wider one."""
        return Spread(outer.nodes // self.nodes, outer.per_node // self.per_node)


Seconds = Callable[[Operation, float, Spread], float]
"""Time of one collective of so many bytes on a mesh: the measured table."""


@dataclass(frozen=True, slots=True)
class Shards:
    """A point of the space (section 3.1)."""

    parameters: Spread
    gradients: Spread
    optimizer_states: Spread


def spreads(cluster: Spread) -> tuple[Spread, ...]:
    """Every mesh that divides a cluster and uses a node up before it takes another (section 4.2), smallest first."""
    sizes = product(divisors(cluster.nodes), divisors(cluster.per_node))
    return tuple(Spread(s1, s0) for s1, s0 in sizes if s1 == 1 or s0 == cluster.per_node)


def points(cluster: Spread) -> Iterator[Shards]:
    """Every point that keeps the dependency rule: optimizer states at least as wide as gradients, these as parameters,
    and gradients as wide as one of the two."""
    every = spreads(cluster)
    for parameters, states in product(every, every):
        if states.contains(parameters):
            for gradients in sorted({parameters, states}):
                yield Shards(parameters, gradients, states)


def state_bytes(numel: int, shards: Shards) -> float:
    """Bytes of the model states on one device with Adam in mixed precision: 2 for a parameter, 2 for its gradient, 12
    for fp32 master and moments."""
    return (
        2 * numel / shards.parameters.size
        + 2 * numel / shards.gradients.size
        + 12 * numel / shards.optimizer_states.size
    )


def communication_seconds(
    modules: Sequence[int], shards: Shards, cluster: Spread, *, micro_batches: int, bucket: float, seconds: Seconds
) -> float:
    """T_comm of one step: the sum of what parameters, gradients and optimizer states send.

    `modules` are the elements of each module of the model, `bucket` the bytes of a bucket of gradients.
    """
    numel, parameters, states = sum(modules), shards.parameters, shards.optimizer_states
    total = 0.0
    if parameters.size > 1:
        for module in modules:
            gathers = 2 * seconds("all_gather", 2 * module, parameters)
            total += micro_batches * (gathers + seconds("reduce_scatter", 2 * module, parameters))
    buckets = 2 * numel / (bucket * parameters.size)
    if shards.gradients != parameters:
        over = parameters.within(shards.gradients)
        total += (micro_batches - 1) * buckets * seconds("all_reduce", bucket, over)
    total += buckets * seconds("all_reduce", bucket, parameters.within(cluster))
    if states != parameters:
        over = parameters.within(states)
        total += over.size * seconds("broadcast", 2 * numel / states.size, over)
    return total
