"""What the processes that share one copy of the model tell one another: its seconds, and its calls of a step.

They share every layer (`tp`), every sequence (`cp`), or the experts of a layer (`ep`). The profile of one of them says
what it exchanges (`UnitCost.exchanges`). The compute waits for all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

from shardwright.planner.network import Links, collective_seconds
from shardwright.planner.parallel import Parallel
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ComputeDtypeName, Exchange, ModelProfile, ParallelAxis, Unit, UnitCost

AXES: Mapping[ParallelAxis, str] = MappingProxyType(
    {"tp": "tensor parallel", "cp": "context parallel", "ep": "expert parallel"}
)
"""What the parts of a step's time are called."""
ByAxis = tuple[float, float, float]
"""Seconds, in the order of `AXES`."""
NOTHING: ByAxis = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What the job and the profile of one process of each `tp` (planner/divided.py) do not say of the real ones."""

    links: Mapping[ParallelAxis, Links] = field(default_factory=dict)
    """Of the processes that share one copy, by axis."""
    world: Links | None = None
    """Of all processes; None where the job's own cluster says it."""
    whole: ModelProfile | None = None
    """The model before it was divided; None where it is not."""
    ring: bool = False
    """Whether what goes over `cp` in an all-to-all goes to one neighbour as a whole, no part of it staying."""
    per_node: int | None = None
    """Devices of one host; None where the job's own cluster says it."""


ALONE = Around()
"""Every process has a whole copy, and the job is the real one."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """Seconds of a unit's exchanges in one micro-batch."""

    forward: ByAxis = NOTHING
    backward: ByAxis = NOTHING
    again: ByAxis = NOTHING
    """Of those of forward that a checkpointed block makes again."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What prices exchanges."""

    links: Mapping[ParallelAxis, Links] = field(default_factory=dict)
    imbalance: float = 1.0
    """Of what experts are sent: of the fullest process, as a multiple of the mean, which the profile states."""
    ring: bool = False
    """As of `Around`."""

    @classmethod
    def of(cls, job: JobSpec, around: Around) -> Wiring:
        """Of one job."""
        return cls(around.links, job.strategy.expert_imbalance, around.ring)

    def seconds(self, cost: UnitCost, micro_batch: int, efficiency: float) -> Exchanged:
        """Of the exchanges of one unit. Raises KeyError for an axis that `links` does not have."""
        if not cost.exchanges:
            return Exchanged()

        def of(some: Iterable[Exchange]) -> ByAxis:
            seconds = dict.fromkeys(AXES, 0.0)
            for each in some:
                seconds[each.axis] += each.count * self._one(each, each.bytes.at(micro_batch), efficiency)
            return seconds["tp"], seconds["cp"], seconds["ep"]

        forward = [each for each in cost.exchanges if each.phase == "forward"]
        return Exchanged(
            forward=of(forward),
            backward=of(each for each in cost.exchanges if each.phase == "backward"),
            again=of(each for each in forward if each.again),
        )

    def _one(self, exchange: Exchange, size: int, efficiency: float) -> float:
        links = self.links[exchange.axis]
        seconds = collective_seconds(exchange.kind, links, size, efficiency)
        if exchange.axis == "ep":
            return self.imbalance * seconds
        if exchange.axis == "cp" and exchange.kind == "all_to_all" and self.ring:
            processes = prod(part for _, part in links)
            return seconds * processes / max(1, processes - 1)
        return seconds


UNWIRED = Wiring()
"""Nothing is exchanged."""


def units_by_segment(profile: ModelProfile) -> list[Unit]:
    """The unit of every segment ([Note: segments] in pipelines/costs.py)."""
    return [unit for unit in profile.units for _ in range(unit.count)]


def exchange_calls(
    units: Iterable[tuple[Unit, bool]], dtype: ComputeDtypeName, micro_batch: int, parallel: Parallel
) -> Iterator[tuple[Exchange, int, int, int]]:
    """Exchanges of these units in one micro-batch: each with the size of its group, its bytes, and how often it is
    called. A unit comes with whether it is recomputed."""
    sizes: dict[ParallelAxis, int] = {"tp": parallel.tp, "cp": parallel.cp, "ep": parallel.ep}
    for unit, recomputed in units:
        for each in unit.costs[dtype].exchanges:
            twice = recomputed and each.again and each.phase == "forward"
            yield each, sizes[each.axis], each.bytes.at(micro_batch), each.count * (2 if twice else 1)
