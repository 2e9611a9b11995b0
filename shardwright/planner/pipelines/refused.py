"""Why a job that asks for pipeline stages gets none ([Note: which pipelines there are])."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.planner.pipelines.space import (
    chunk_numbers,
    job_schedules,
    numbers_of_ranks,
    permitted_cuts,
    pipelines,
    placement_of,
    refused_cuts,
)
from shardwright.planner.relax import pins, without
from shardwright.planner.schedules.families.family import Family
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.timetable import Layout
from shardwright.planner.space import micro_batches
from shardwright.schemas.checks import permits_no_pipeline
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ModelProfile


def no_pipeline(job: JobSpec, profile: ModelProfile) -> str:
    """The reason, of the model, of the degree of gradients or of a schedule that the job names; empty where none is."""
    if permits_no_pipeline(job) or job.cluster.world_size == 1:
        return ""
    if not numbers_of_ranks(without(job, *pins(job)), profile):
        return refused_cuts(profile) or "the model has no repeated blocks to cut it at"
    if not _any_pipeline(job, profile) and _any_pipeline(without(job, "strategy.states.gradients"), profile):
        return "the gradients of a pipeline are whole, or sharded as its optimizer states are, while they accumulate"
    return "; ".join(_reason(job, profile, SCHEDULES[name]) for name in job_schedules(job))


def _any_pipeline(job: JobSpec, profile: ModelProfile) -> bool:
    return next(pipelines(job, profile), None) is not None


def _reason(job: JobSpec, profile: ModelProfile, family: Family) -> str:
    chunks = chunk_numbers(job, family)
    if not chunks:
        return f"{family.name} has stages a rank: {family.chunks_in_words}"
    most = len(permitted_cuts(profile)) + 1
    layouts = [
        Layout(ranks, each, placement_of(family, each)) for ranks in numbers_of_ranks(job, profile) for each in chunks
    ]
    if layouts and all(layout.stages > most for layout in layouts):
        least = min(layout.stages for layout in layouts)
        return f"{family.name} needs {least} stages or more, and the model can be cut into {most}"
    return next(_refusals(job, family, layouts), f"{family.name} has no schedule for it")


def _refusals(job: JobSpec, family: Family, layouts: list[Layout]) -> Iterator[str]:
    for layout in layouts:
        copies = job.cluster.world_size // layout.ranks
        for size in micro_batches(job, copies):
            count = job.train.global_batch_sequences // (copies * size)
            reason = family.refuses(layout, count)
            if reason:
                yield f"{family.name} on {layout.ranks} ranks with {count} micro-batches: {reason}"
