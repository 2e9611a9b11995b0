"""What is said when no point fits: needed against available, the nearest miss, and changes of the job that fit."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.planner.candidates import Candidate
from shardwright.planner.constants import device_constants
from shardwright.planner.explain import Explainer
from shardwright.planner.names import summary
from shardwright.planner.predict import Predictor
from shardwright.planner.relax import larger_clusters, pins, with_budget, with_memory, without
from shardwright.planner.search import Search
from shardwright.planner.space import block_count, profiled
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Infeasible
from shardwright.schemas.profile import ModelProfile
from shardwright.schemas.units import human_bytes

_GIB = 2**30
_MIB = 2**20


def infeasible(predictor: Predictor, found: Search, nearest: Candidate) -> Infeasible:
    """The result when nothing fits; `nearest` comes closest."""
    on_device = nearest.reserved > predictor.device_budget
    limit = predictor.device_budget if on_device else predictor.job.host_memory_limit
    return Infeasible(
        needed_bytes=nearest.reserved if on_device else nearest.host,
        available_bytes=limit,
        nearest=Explainer(predictor, found, nearest, None).alternative(nearest),
        by_category=nearest.peak.bytes,
        changes=tuple(changes(predictor.job, predictor.profile, nearest)),
        considered=found.considered,
    )


def changes(job: JobSpec, profile: ModelProfile, nearest: Candidate) -> Iterator[str]:
    """Changes that would fit, cheapest first. Each was planned: what it says is what would be planned."""
    for change, changed in (*_permissions(job, profile), *_memory(job, nearest)):
        best = _best(changed, profile)
        if best:
            yield f"{change}: {best}"
    for changed in larger_clusters(job):
        best = _best(changed, profile)
        if best:
            yield f"use {changed.cluster.world_size} devices instead of {job.cluster.world_size}: {best}"
            return


def _permissions(job: JobSpec, profile: ModelProfile) -> Iterator[tuple[str, JobSpec]]:
    """Restrictions lifted one at a time, then all at once."""
    pinned = pins(job)
    for key in pinned:
        yield f"leave `{key}` to the planner (auto)", without(job, key)
    if len(pinned) > 1:
        yield "leave all of `strategy` to the planner (auto)", without(job, *pinned)
    if job.quality == "exact" and profiled(profile, "bf16_mixed"):
        relaxed = without(job, "strategy.precision").model_copy(update={"quality": "standard"})
        yield "permit bf16 compute (`quality: standard`)", relaxed


def _memory(job: JobSpec, nearest: Candidate) -> Iterator[tuple[str, JobSpec]]:
    """More of the device's memory, or a device with more."""
    context = int(device_constants(job.cluster.device).context_bytes.value)
    if job.budget.device_memory is not None and nearest.reserved + context <= job.cluster.device.memory:
        unit = _GIB if nearest.reserved > _GIB else _MIB
        enough = -(-nearest.reserved // unit) * unit
        enough = min(enough, job.cluster.device.memory - context)
        yield f"raise `budget.device_memory` to {human_bytes(enough)}", with_budget(job, enough)
        return
    enough = -(-(nearest.reserved + context) // _GIB) * _GIB
    if enough > job.cluster.device.memory:
        yield f"use devices with {enough // _GIB} GiB of memory", with_memory(job, enough)


def _best(job: JobSpec, profile: ModelProfile) -> str:
    found = Search(Predictor(job, profile)).chosen()
    return "" if found is None else summary(found.point, block_count(profile))
