"""Which pipelines a plan may be: every one but for where the model is cut and what is recomputed.

[Note: which pipelines there are]
Stages lie on the slowest axis of the mesh, so that the devices with the same stages, the copies, are neighbours and
fill the fastest levels: their number is a shard degree of the cluster. The copies are a data-parallel job of their own
on a cluster cut down to them, and its layouts are those of `layouts.layouts` with what a pipeline's engine runs:
parameters whole (gathering them for every micro-batch is what a pipeline is there to avoid) unless the job asks for a
schedule whose units share a gather, or for sharded parameters; no second copy, nothing in fewer bits; gradients
accumulate whole or as optimizer states are sharded; and unless the job says otherwise, optimizer states fill whole
levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from shardwright.planner.engines import ENGINES, EngineName
from shardwright.planner.layouts import Layout, layouts, level_ends
from shardwright.planner.parallel import WHOLE, Parallel
from shardwright.planner.precisions import permitted_precisions
from shardwright.planner.schedules.families.family import Family
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.timetable import Placement
from shardwright.planner.space import Pipe, Point, block_count, laid_out, micro_batches, permitted_engines, profiled
from shardwright.schemas.base import permits
from shardwright.schemas.checks import divisors, pipeline_sizes
from shardwright.schemas.cluster import ClusterSpec, LevelSpec
from shardwright.schemas.job import JobSpec, ScheduleName
from shardwright.schemas.profile import ModelProfile

ENGINE: EngineName = "amsp"
"""What shards the states of a stage."""
IN_UNITS = ("zeropp",)
"""Schedules whose micro-batches share a gather of parameters."""
LEFT_OUT = ("zb-1p", "zb-2p", "hanayo")
"""Schedules that are only taken where the job names them: the search of `zb-auto` finds what the first two find, and
waves need more messages than other schedules of as many chunks for a larger bubble."""
MOST_PASSES = 2**15
"""Stages times micro-batches of the pipelines that are looked at where the job does not say how many devices they
have: more make a timetable too long to be looked at in passing."""
MOST_CHUNKS = 4
"""Of the schedules that take many; more only where the job says so, and in short steps."""
MOST_IN_SHORT_STEPS = 8
"""The same of SHORT_STEPS, where a rank has no more than SHORT micro-batches for each rank: there a bubble weighs most,
and twice as many chunks halve it. Llama 3 was trained like that (arXiv 2407.21783, section 3.3.2)."""
SHORT = 2
"""As above."""
SHORT_STEPS = ("interleaved-1f1b",)
"""Schedules whose memory does not grow with the number of micro-batches, and whose bubble falls with the chunks."""


def permitted_cuts(profile: ModelProfile) -> tuple[int, ...]:
    """Numbers of blocks after which the model can be cut, ascending; 0 after the embedding."""
    at = {path: index for index, path in enumerate(profile.block_paths, 1)} | {"embedding": 0}
    return tuple(sorted(at[cut.after] for cut in profile.cuts if cut.after in at and not cut.refused))


def refused_cuts(profile: ModelProfile) -> str:
    """Why the model cannot be cut at some place, for the first such place; empty where it can be cut everywhere."""
    return next((cut.refused for cut in profile.cuts if cut.refused), "")


def family_of(pipe: Pipe) -> Family:
    """The entry of the table for a pipeline's schedule."""
    return SCHEDULES[pipe.schedule]


def placement_of(family: Family, chunks: int) -> Placement:
    """Where a family's stages lie; one chunk a rank lies the same either way."""
    return "loop" if chunks == 1 else family.placement


def chunk_numbers(job: JobSpec, family: Family) -> tuple[int, ...]:
    """Chunks a rank of a family that the job permits, fewest first."""
    choice = job.strategy.chunks
    if choice != "auto":
        return tuple(each for each in sorted(set(choice)) if family.allowed_chunks(each))
    if family.tries is not None or family.name in job_schedules(job):
        return tuple(each for each in range(1, MOST_CHUNKS + 1) if family.allowed_chunks(each))
    most = MOST_IN_SHORT_STEPS if family.name in SHORT_STEPS else MOST_CHUNKS
    return tuple(each for each in divisors(most) if each >= family.chunks and family.allowed_chunks(each))


def _is_long(job: JobSpec, pipe: Pipe, accumulation: int) -> bool:
    """Whether a step has too many micro-batches for so many chunks."""
    free = job.strategy.chunks == "auto" and pipe.schedule not in job_schedules(job)
    return free and pipe.chunks > MOST_CHUNKS and accumulation > SHORT * pipe.ranks


def job_schedules(job: JobSpec) -> tuple[ScheduleName, ...]:
    """Schedules that the job names; none where it leaves them to the planner."""
    return () if job.strategy.schedule == "auto" else job.strategy.schedule


def late_steps(job: JobSpec) -> tuple[bool, ...]:
    """Whether steps are late; only where the job says so, for clipped gradients make them slow."""
    choice = job.strategy.late_step
    return (False,) if choice == "auto" else tuple(sorted(set(choice)))


def schedules(job: JobSpec) -> tuple[Family, ...]:
    """Families that a plan of the job may have."""
    named = job_schedules(job)
    return tuple(each for name, each in SCHEDULES.items() if (name in named if named else name not in LEFT_OUT))


def copies_cluster(cluster: ClusterSpec, copies: int) -> ClusterSpec:
    """The levels of a cluster cut down to so many neighbouring devices."""
    levels: list[LevelSpec] = []
    left = copies
    for level in cluster.levels:
        size = min(level.size, left)
        if size > 1 or not levels:
            levels.append(level.model_copy(update={"size": size}))
        left //= size
    return cluster.model_copy(update={"levels": tuple(levels)})


def numbers_of_ranks(job: JobSpec, profile: ModelProfile) -> tuple[int, ...]:
    """Sizes of pipelines that the cluster, the model and the job permit, smallest first; 1 is none of them."""
    if ENGINE not in permitted_engines(job, profile) or not block_count(profile):
        return ()
    most = len(permitted_cuts(profile)) + 1
    return tuple(
        ranks for ranks in pipeline_sizes(job.cluster) if 1 < ranks <= most and permits(job.strategy.pp, ranks)
    )


def pipelines(job: JobSpec, profile: ModelProfile, parallel: Parallel = WHOLE) -> Iterator[Point]:
    """Every permitted pipeline, uncut and with nothing recomputed, in a fixed order ([Note: which pipelines there
    are]). Precisions that were not profiled are left out. `job` and `profile` as `divided` makes them."""
    world, batch = job.cluster.world_size, job.train.global_batch_sequences
    most = len(permitted_cuts(profile)) + 1
    precisions = [each for each in permitted_precisions(job) if profiled(profile, each)]
    for ranks in numbers_of_ranks(job, profile):
        copies = world // ranks
        if copies % parallel.cp or copies % parallel.ep:
            continue
        pipes = [
            Pipe(
                ranks=ranks,
                chunks=chunks,
                placement=placement_of(family, chunks),
                schedule=family.name,  # type: ignore[arg-type]
                cuts=(),
                checkpointed=(),
                late_step=late,
            )
            for family in schedules(job)
            for chunks in chunk_numbers(job, family)
            if ranks * chunks <= most
            for late in late_steps(job)
        ]
        of_copies = cache(lambda accumulation, copies=copies: tuple(_layouts(job, copies, accumulation, parallel)))
        for precision in precisions:
            for micro_batch in micro_batches(job, copies):
                accumulation = batch // (copies * micro_batch)
                for pipe in pipes:
                    too_long = pipe.layout.stages * accumulation > MOST_PASSES and job.strategy.pp == "auto"
                    if (
                        too_long
                        or _is_long(job, pipe, accumulation)
                        or family_of(pipe).refuses(pipe.layout, accumulation)
                    ):
                        continue
                    for layout in of_copies(min(accumulation, 2)):
                        if layout.parameters == 1 or _may_gather(job, pipe):
                            yield laid_out(ENGINE, world, layout, micro_batch, accumulation, precision, parallel, pipe)


def _may_gather(job: JobSpec, pipe: Pipe) -> bool:
    """A schedule in units has to be asked for, or gathering."""
    return job.strategy.states.parameters != "auto" or (
        pipe.schedule in IN_UNITS and pipe.schedule in job_schedules(job)
    )


def _layouts(job: JobSpec, copies: int, accumulation: int, parallel: Parallel) -> Iterator[Layout]:
    """Of the states among the copies ([Note: which pipelines there are])."""
    cluster = copies_cluster(job.cluster, copies)
    whole = level_ends(tuple(level.size for level in cluster.levels))
    pinned = job.strategy.states.optimizer_states != "auto"
    for layout in layouts(job.model_copy(update={"cluster": cluster}), ENGINES[ENGINE], accumulation, parallel.ep):
        if layout.quantized or layout.secondary is not None or layout.kept:
            continue
        if layout.gradients not in (1, layout.optimizer_states) or layout.gradients < layout.parameters:
            continue
        if pinned or layout.optimizer_states in whole:
            yield layout
