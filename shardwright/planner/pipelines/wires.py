"""Bytes that go from stage to stage: the profile's edges between units as messages between stages.

A profile states edges in the dtypes that the model declares; floating-point activations travel in the compute dtype.
One that states none has each unit's output go to the next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from shardwright.planner.pipelines.owners import stage_segments
from shardwright.planner.schedules.lowering import Edge
from shardwright.planner.space import Pipe
from shardwright.schemas.profile import Affine, ComputeDtypeName, ModelProfile

_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


class Value(NamedTuple):
    """What one segment makes for another."""

    source: int
    target: int
    sizes: Mapping[ComputeDtypeName, Affine]


class Wires:
    """The values of one model that cross the cuts of its pipelines."""

    def __init__(self, profile: ModelProfile) -> None:
        self._blocks = len(profile.block_paths)
        self._values = tuple(_edges(profile) if profile.edges else _outputs(profile))
        targets: defaultdict[int, set[int]] = defaultdict(set)
        for value in self._values:
            targets[value.source].add(value.target)
        self._kept = [
            value for value in self._values if len(targets[value.source]) > 1 and value.target > value.source + 1
        ]

    def messages(self, pipe: Pipe, dtype: ComputeDtypeName, micro_batch: int) -> dict[Edge, int]:
        """Bytes of one micro-batch between any two stages, forward. What several units of a stage take of one unit is
        sent once: the most that it makes for any of them."""
        stages = [stage_segments(pipe, stage, self._blocks) for stage in range(pipe.layout.stages)]
        stage_of = {segment: stage for stage, own in enumerate(stages) for segment in own}
        most: dict[tuple[Edge, int], int] = {}
        for source, target, sizes in self._values:
            edge = stage_of[source], stage_of[target]
            if edge[0] != edge[1]:
                most[edge, source] = max(most.get((edge, source), 0), sizes[dtype].at(micro_batch))
        sent: dict[Edge, int] = {}
        for (edge, _), size in sorted(most.items()):
            sent[edge] = sent.get(edge, 0) + size
        return sent

    def kept(self, own: range, dtype: ComputeDtypeName, micro_batch: int) -> int:
        """Bytes that a stage of these segments keeps from F to I though no unit of it counts them: what a unit of
        another stage makes for several units, and counts itself ([Note: who counts a boundary])."""
        most: dict[int, int] = {}
        for source, target, sizes in self._kept:
            if source not in own and target in own:
                most[source] = max(most.get(source, 0), sizes[dtype].at(micro_batch))
        return sum(most.values())


def _edges(profile: ModelProfile) -> Iterator[Value]:
    paths = profile.block_paths
    segment = {"embedding": 0, "head": len(paths) + 1} | {path: index for index, path in enumerate(paths, 1)}
    declared = max((_ELEMENT.get(parameter.dtype, 4) for parameter in profile.parameters), default=4)
    for edge in profile.edges:
        sizes: dict[ComputeDtypeName, Affine] = {
            "fp32": Affine(0, edge.bytes),
            "bf16": Affine(0, edge.bytes * min(2, declared) // declared),
        }
        yield Value(segment[edge.source], segment[edge.target], sizes)


def _outputs(profile: ModelProfile) -> Iterator[Value]:
    """From each segment to the next."""
    outputs = [
        {dtype: cost.output for dtype, cost in unit.costs.items()}
        for unit in profile.units
        if unit.kind != "head"
        for _ in range(unit.count)
    ]
    for source, sizes in enumerate(outputs):
        yield Value(source, source + 1, sizes)
