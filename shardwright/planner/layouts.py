"""The ways to spread the model states over a cluster that an engine can run and a job permits.

[Note: which layouts there are]
A shard degree fills the levels of the cluster fastest first: no node is left before it is used up (AMSP, arXiv
2311.00257, section 4.2). Optimizer states are spread at least as wide as parameters and gradients (section 3.2); these
two do not depend on each other. With one micro-batch a step no gradient accumulates, so it has no degree of its own. A
second copy of the parameters (hpZ of ZeRO++, arXiv 2306.10209) lies on fewer devices than they do, and only where they
are freed after forward; unless the job names others, over whole levels. amsp's mesh has one axis from each degree to
the next, and is cut once more at the levels of the cluster where a layout is hierarchical. Fewer bits travel over an
axis and all slower ones: a slower link never gains less by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product
from operator import mul
from typing import Literal

from shardwright.planner.engines import EngineTraits
from shardwright.schemas.base import permits
from shardwright.schemas.checks import level_degree, shard_degrees
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import Degree, JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Shard degrees of the states and what else says where they lie; the fields are those of `Point`."""

    parameters: int
    gradients: int
    optimizer_states: int
    kept: bool | None
    secondary: int | None = None
    axes: tuple[int, ...] = ()
    int8_gathers: tuple[int, ...] = ()
    int4_reductions: tuple[int, ...] = ()

    @property
    def states(self) -> tuple[object, ...]:
        """Where the states lie, whatever engine puts them there."""
        return self.parameters, self.gradients, self.optimizer_states, self.secondary, bool(self.kept)

    @property
    def quantized(self) -> bool:
        """Whether anything travels in fewer bits."""
        return bool(self.int8_gathers or self.int4_reductions)


def level_ends(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Devices inside of each axis, and all: products of the first 0, 1, 2, ... sizes."""
    return tuple(accumulate(sizes, mul, initial=1))


def layouts(job: JobSpec, engine: EngineTraits, accumulation: int, experts: int = 1) -> Iterator[Layout]:
    """Every layout of an engine that the job permits, in a fixed order ([Note: which layouts there are]); so many
    processes share the experts."""
    if engine.flat:
        yield from _flat(job, accumulation, experts)
        return
    for layout in (_dimension_0 if engine.shards else _replicated)(job, accumulation):
        if runs_experts(layout, experts):
            yield layout


def runs_experts(layout: Layout, experts: int) -> bool:
    """Whether so many processes may share the experts. The states of experts are sharded over the processes that have
    the same ones, so that every degree has to be a multiple or a part of `experts`; they have no second copy, and
    travel in whole numbers."""
    degrees = (layout.parameters, layout.gradients, layout.optimizer_states)
    nested = all(_nested(*sorted((degree, experts))) for degree in degrees)
    return experts == 1 or (nested and layout.secondary is None and not layout.quantized)


def _replicated(job: JobSpec, accumulation: int) -> Iterator[Layout]:
    layout = Layout(parameters=1, gradients=1, optimizer_states=1, kept=None)
    if _permits_states(job, layout, accumulation):
        yield layout


def _dimension_0(job: JobSpec, accumulation: int) -> Iterator[Layout]:
    """fully_shard: optimizer states as parameters, gradients too or whole; `reshard_after_forward` may be a number."""
    degrees = shard_degrees(job.cluster)
    for degree in degrees:
        for gradients in dict.fromkeys((degree, degree if accumulation == 1 else 1)):
            for kept, secondary in _copies(job, degree, degrees):
                layout = Layout(
                    parameters=degree, gradients=gradients, optimizer_states=degree, kept=kept, secondary=secondary
                )
                if _permits_states(job, layout, accumulation):
                    yield layout


def _flat(job: JobSpec, accumulation: int, experts: int) -> Iterator[Layout]:
    degrees = shard_degrees(job.cluster)
    for optimizer_states, parameters in product(degrees, degrees):
        if not _nested(parameters, optimizer_states):
            continue
        for gradients in degrees if accumulation > 1 else (optimizer_states,):
            if not _nested(gradients, optimizer_states) or not _nested(*sorted((gradients, parameters))):
                continue
            for kept, secondary in _copies(job, parameters, degrees) if parameters > 1 else ((None, None),):
                layout = Layout(
                    parameters=parameters,
                    gradients=gradients,
                    optimizer_states=optimizer_states,
                    kept=kept,
                    secondary=secondary,
                )
                if _permits_states(job, layout, accumulation) and runs_experts(layout, experts):
                    yield from (each for each in _over_axes(job, layout, experts) if runs_experts(each, experts))


def _copies(job: JobSpec, degree: int, degrees: tuple[int, ...]) -> Iterator[tuple[bool, int | None]]:
    """Whether parameters stay gathered, and where not, the degrees of a second copy: whole levels, or those named."""
    pinned = job.strategy.states.secondary
    second = degrees if pinned != "auto" else level_ends(tuple(level.size for level in job.cluster.levels))
    for kept in (False, True):
        if permits(job.strategy.reshard_after_forward, not kept):
            yield kept, None
            if not kept:
                yield from ((kept, each) for each in second if 1 < each < degree and _nested(each, degree))


def _permits_states(job: JobSpec, layout: Layout, accumulation: int) -> bool:
    """What the job says of gradients means nothing where none accumulate."""
    states, cluster = job.strategy.states, job.cluster
    return (
        _permits_degree(cluster, states.parameters, layout.parameters)
        and (accumulation == 1 or _permits_degree(cluster, states.gradients, layout.gradients))
        and _permits_degree(cluster, states.optimizer_states, layout.optimizer_states)
        and _permits_degree(cluster, states.secondary, layout.secondary)
    )


def _permits_degree(cluster: ClusterSpec, choice: Literal["auto"] | tuple[Degree, ...], degree: int | None) -> bool:
    return choice == "auto" or degree in {level_degree(cluster, value) for value in choice}


def _over_axes(job: JobSpec, layout: Layout, experts: int) -> Iterator[Layout]:
    """The layout on the fewest axes, some of the fastest being those of the processes that share experts, and where
    that is another mesh, cut at every level of the cluster; each with every permitted use of fewer bits."""
    world = job.cluster.world_size
    states = (layout.parameters, layout.gradients, layout.optimizer_states, layout.secondary or 1)
    needed = sorted({1, *states, experts, world})
    hierarchical = sorted({*needed, *level_ends(tuple(level.size for level in job.cluster.levels))})
    for ends in (needed, hierarchical) if hierarchical != needed else (needed,):
        if any(wide % narrow for narrow, wide in pairwise(ends)):
            continue
        axes = tuple(wide // narrow for narrow, wide in pairwise(ends))
        gathered = _axes_below(axes, layout.parameters)
        reduced = _axes_below(axes, layout.optimizer_states)
        for gathers in _fewer_bits(job, job.strategy.int8_gathers, axes, gathered):
            for reductions in _fewer_bits(job, job.strategy.int4_reductions, axes, reduced):
                yield replace(layout, axes=axes, int8_gathers=gathers, int4_reductions=reductions)


def _axes_below(axes: tuple[int, ...], degree: int) -> int:
    """How many of the fastest axes a state of this degree is spread over."""
    return level_ends(axes).index(degree)


def _fewer_bits(
    job: JobSpec, choice: Literal["auto"] | tuple[str, ...], axes: tuple[int, ...], used: int
) -> tuple[tuple[int, ...], ...]:
    """Sets of axes, of the first `used`, over which fewer bits may travel; exact first."""
    allowed = ("none",) if choice == "auto" and job.quality != "lossy" else None if choice == "auto" else choice
    found: dict[tuple[int, ...], None] = {}
    if allowed is None or "none" in allowed:
        found[()] = None
    below = 1
    starts = []
    for level in job.cluster.levels:
        if allowed is None or level.name in allowed:
            starts.append(below)
        below *= level.size
    ends = level_ends(axes)
    for start in sorted(starts, reverse=True):
        over = tuple(index for index in range(used) if ends[index + 1] > start)
        if over:
            found[over] = None
    return tuple(found)


def _nested(narrow: int, wide: int) -> bool:
    return wide % narrow == 0
