"""A pipeline of few ranks: the same schedule, placement and chunks, over the blocks that a small model has.

[Note: how a pipeline is shrunk]
Every rank of the small pipeline stands for one of the plan's: the first for the first, the last for the last, those
between spread evenly. Its stages keep what sets them apart from others: without blocks (the embedding or the head
alone) or with some, with more than the smallest stage or not, with none, some or all of their blocks recomputed.
Micro-batches stay as many as they are, but no more than two a rank, after which a schedule repeats itself. A memory
limit counts micro-batches' activations of a whole rank, of which schedules hold as many as there are ranks, give or
take a factor: it shrinks as the ranks do, and grows again as long as the family has no schedule within it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, pairwise
from math import ceil

from shardwright.planner.pipelines.costs import pipe_of
from shardwright.planner.pipelines.space import family_of, permitted_cuts
from shardwright.planner.predict import Predictor
from shardwright.planner.space import Pipe, Point, block_count, point_of
from shardwright.rehearse.report_types import Change
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Decision, Plan, StageTime
from shardwright.schemas.profile import ModelProfile

_STEADY = 2
"""Micro-batches a rank after which a schedule repeats itself."""
_FEW_STAGES = 4
"""Fewer stages than these get two blocks each at least, so that blocks have neighbours in their own stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallPipeline:
    """A pipeline for few processes, not yet cut ([Note: how a pipeline is shrunk])."""

    pipe: Pipe
    """The plan's, with few ranks; its cuts, recomputed blocks and limits are still to be found."""
    blocks: tuple[int, ...]
    """Of each stage, so many as let it keep its kind."""
    recomputed: tuple[float, ...]
    """Of each stage, the share of its blocks."""
    micro_batches: int
    limits: tuple[float, ...]
    """Of each rank, in micro-batches' activations of all its stages; empty without limits."""


def shrink_pipeline(plan: Plan, ranks: int) -> SmallPipeline | None:
    """The plan's pipeline over so many ranks; None where it has none."""
    full = point_of(plan.decision).pipe
    if full is None:
        return None
    # What is observed of a step that is done again would be observed twice, so all wait for the norm.
    small = replace(full, ranks=ranks, cuts=(), checkpointed=(), activation_limits=(), late_step=False)
    stands_for = [round(rank * (full.ranks - 1) / max(ranks - 1, 1)) for rank in range(ranks)]
    places = [small.layout.place(stage) for stage in range(small.layout.stages)]
    stages = [full.layout.stage(stands_for[rank], chunk) for rank, chunk in places]
    sizes = [len(full.blocks(stage, plan.decision.checkpointing.of)) for stage in stages]
    recomputed = [full.checkpointed[stage] for stage in stages]
    return SmallPipeline(
        pipe=small,
        blocks=_few_blocks(sizes, recomputed),
        recomputed=tuple(again / size if size else 0.0 for again, size in zip(recomputed, sizes, strict=True)),
        micro_batches=_micro_batches(small, plan.decision.accumulation),
        limits=_limits(plan, full, stands_for),
    )


def _few_blocks(sizes: Sequence[int], recomputed: Sequence[int]) -> tuple[int, ...]:
    least = 2 if len(sizes) < _FEW_STAGES else 1
    smallest = min((size for size in sizes if size), default=0)
    wanted = (
        max(least + (size > smallest), 2 if 0 < again < size else 1)
        for size, again in zip(sizes, recomputed, strict=True)
    )
    return tuple(map(min, sizes, wanted))


def _micro_batches(pipe: Pipe, micro_batches: int) -> int:
    least = min(micro_batches, _STEADY * pipe.ranks)
    return next(each for each in count(least) if not family_of(pipe).refuses(pipe.layout, each))


def _limits(plan: Plan, full: Pipe, stands_for: Sequence[int]) -> tuple[float, ...]:
    predicted = plan.prediction.pipeline
    if not full.activation_limits or predicted is None:
        return ()
    return tuple(
        full.activation_limits[rank] / _whole(predicted.stages, rank) * len(stands_for) / full.ranks
        for rank in stands_for
    )


def _whole(stages: Sequence[StageTime], rank: int) -> int:
    """Bytes of one micro-batch's activations of a whole rank, as schedules are made for: with no more after I."""
    own = (stage for stage in stages if stage.rank == rank)
    return max(1, sum(max(stage.activation_bytes, stage.held_by_weight_bytes) for stage in own))


def staged(small: SmallPipeline, uncut: Point, predictor: Predictor) -> Point:
    """A point of the shrunk job with the pipeline, cut to the blocks of the shrunk model.

    Raises InputError where the model has too few blocks, or too few places to cut it.
    """
    sizes = _sizes(small, predictor.profile)
    again = tuple(map(_recomputed, small.recomputed, sizes))
    cuts = tuple(accumulate(sizes))[:-1]
    point = replace(uncut, checkpointed=0, pipe=replace(small.pipe, cuts=cuts, checkpointed=again))
    return _limited(small, point, predictor) if small.limits else point


def _recomputed(share: float, size: int) -> int:
    """Of a stage's blocks: none, all, or some in about the same ratio."""
    if share in (0.0, 1.0) or size < 2:
        return size if share else 0
    return min(max(1, round(share * size)), size - 1)


def _limited(small: SmallPipeline, point: Point, predictor: Predictor) -> Point:
    """The point with the smallest limits, from the wanted ones on, within which its family has a schedule."""
    pipe, costs = pipe_of(point), predictor.pipelines.costs.costs(point)
    stages = [[pipe.layout.stage(rank, chunk) for chunk in range(pipe.chunks)] for rank in range(pipe.ranks)]
    whole = [sum(costs.activations[stage] for stage in own) for own in stages]
    for more in range(small.micro_batches + 1):
        limits = tuple(max(1, ceil((units + more) * each)) for units, each in zip(small.limits, whole, strict=True))
        limited = replace(point, pipe=replace(pipe, activation_limits=limits))
        try:
            predictor.pipelines.schedules.made(limited)
        except InputError:
            continue
        return limited
    return point


def _sizes(small: SmallPipeline, profile: ModelProfile) -> list[int]:
    """Blocks of each stage of the shrunk model, which may have more or fewer than were asked for."""
    blocks = block_count(profile)
    sizes = resized(small.blocks, blocks)
    ends = nearest(list(accumulate(sizes))[:-1], permitted_cuts(profile))
    return [end - begin for begin, end in pairwise((0, *ends, blocks))]


def resized(wanted: Sequence[int], blocks: int) -> list[int]:
    """More blocks go where there are fewest of those wanted, fewer are taken where there are most, the ends first."""
    sizes = list(wanted)
    inner = range(1, len(sizes) - 1)
    while sum(sizes) < blocks:
        sizes[min(range(len(sizes)), key=lambda at: sizes[at] / wanted[at] if wanted[at] else blocks)] += 1
    while sum(sizes) > blocks:
        largest = max(range(len(sizes)), key=lambda at: (sizes[at], at not in inner))
        if sizes[largest] <= 1 and largest in inner:
            raise _too_small(len(sizes), len(sizes) - 2, "blocks", blocks)
        sizes[largest] -= 1
    return sizes


def nearest(wanted: Sequence[int], permitted: Sequence[int]) -> list[int]:
    """Cuts at permitted places, each as near to the wanted one as the others leave room for."""
    if len(permitted) < len(wanted):
        raise _too_small(len(wanted) + 1, len(wanted), "places to cut", len(permitted))
    found: list[int] = []
    first = 0
    for number, cut in enumerate(wanted):
        room = permitted[first : len(permitted) - (len(wanted) - 1 - number)]
        found.append(min((abs(place - cut), place) for place in room)[1])
        first = permitted.index(found[-1]) + 1
    return found


def _too_small(stages: int, needed: int, what: str, found: int) -> InputError:
    message = f"{stages} pipeline stages need at least {needed} {what}, and the shrunk model has {found}"
    return InputError(Diagnostic(key="model.rehearse", message=message, suggestion="name a larger depth there"))


def pipeline_changes(before: Decision, after: Decision) -> tuple[Change, ...]:
    """How the shrunk pipeline was cut."""
    if before.pipeline.schedule == "none":
        return ()
    pairs = {name: (_listed(getattr(before.pipeline, name)), _listed(getattr(after.pipeline, name))) for name in _CUT}
    pairs["late_step"] = (_yes(before.pipeline.late_step), _yes(after.pipeline.late_step))
    return tuple(
        Change(key=f"decision.pipeline.{name}", before=old, after=new)
        for name, (old, new) in pairs.items()
        if old != new
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


_CUT = ("cuts", "checkpointed", "activation_limits")


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"
