"""Checks of a decision that a person may have edited. What follows from the numbers (the levels of an axis) is not
checked but worked out again."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from shardwright.planner.engines import ENGINES
from shardwright.planner.explain import misses
from shardwright.planner.precisions import PRECISIONS, QUALITIES
from shardwright.planner.predict import Predictor
from shardwright.planner.search import measure
from shardwright.planner.space import Point, block_count, point_of, profiled, unshardable
from shardwright.schemas.checks import shard_degrees
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Decision
from shardwright.schemas.profile import ModelProfile


def checked_point(predictor: Predictor, decision: Decision) -> Point:
    """The point that a decision states. Raises InputError with a diagnostic for everything that is wrong with it."""
    job, profile = predictor.job, predictor.profile
    wrong = [
        *_mesh(job, decision),
        *_states(job, decision),
        *_engine(profile, decision),
        *_batch(job, decision),
        *_checkpointing(profile, decision),
        *_precision(job, profile, decision),
    ]
    if wrong:
        raise InputError(wrong)
    point = point_of(decision)
    candidate = measure(predictor, point)
    if not candidate.fits:
        message = f"the edited decision does not fit: it {misses(predictor, candidate)}"
        way = "checkpoint more blocks, shard wider, or take a smaller micro-batch"
        raise InputError(_wrong("", message, way))
    return point


def _mesh(job: JobSpec, decision: Decision) -> Iterator[Diagnostic]:
    mesh, world = decision.mesh, job.cluster.world_size
    if mesh.world_size != world:
        yield _wrong("mesh.world_size", f"{mesh.world_size} processes on {world} devices", f"write {world}")
        return
    sizes = prod(axis.size for axis in mesh.axes)
    if sizes != world:
        yield _wrong(
            "mesh.axes",
            f"the axes multiply to {sizes}, not to the world size {world}",
            "give dp_replicate and dp_shard sizes whose product is the world size",
        )
    names = [axis.name for axis in mesh.axes]
    wanted = _axis_names(decision)
    if names != wanted:
        said = "no axes" if not wanted else " and then ".join(wanted)
        yield _wrong("mesh.axes", f"this layout on `{decision.engine.name}` has {said}", f"write {said}")


def _axis_names(decision: Decision) -> list[str]:
    world, shard = decision.mesh.world_size, decision.states.parameters.degree
    if not ENGINES[decision.engine.name].shards:
        return ["dp_replicate"] if world > 1 else []
    return ["dp_shard"] if shard >= world else ["dp_replicate", "dp_shard"]


def _states(job: JobSpec, decision: Decision) -> Iterator[Diagnostic]:
    states = decision.states
    shard = states.parameters.degree
    valid = shard_degrees(job.cluster)
    axis = next((axis.size for axis in decision.mesh.axes if axis.name == "dp_shard"), 1)
    if shard not in valid:
        choices = ", ".join(map(str, valid))
        message = f"{shard} devices do not fill the levels of the cluster evenly, fastest first"
        yield _wrong("states.parameters.degree", message, f"write one of {choices}")
    elif shard != axis:
        message = f"parameters are spread over {shard} devices, but the axis dp_shard has {axis}"
        yield _wrong("states.parameters.degree", message, f"make both {shard} or both {axis}")
    if states.optimizer_states.degree != shard:
        message = f"`{decision.engine.name}` shards optimizer states as it shards parameters"
        yield _wrong("states.optimizer_states.degree", message, f"write {shard}")
    gradients = states.gradients.degree
    if gradients == 1 != shard and decision.accumulation == 1:
        message = "whole gradients accumulate over several micro-batches only, and there is one"
        yield _wrong("states.gradients.degree", message, f"write {shard}")
    elif gradients not in (1, shard):
        message = f"gradients accumulate whole or as parameters are sharded, not over {gradients} devices"
        yield _wrong("states.gradients.degree", message, f"write {shard} or 1")


def _engine(profile: ModelProfile, decision: Decision) -> Iterator[Diagnostic]:
    engine = decision.engine
    traits = ENGINES[engine.name]
    layout = {"world": decision.mesh.world_size, "degree": decision.states.parameters.degree}
    if not traits.runs(**layout, precision=decision.precision):
        able = [name for name, each in ENGINES.items() if each.runs(**layout, precision=decision.precision)]
        message = (
            f"`{engine.name}` does not run {decision.precision} on {layout['world']} devices with parameters over "
            f"{layout['degree']}"
        )
        yield _wrong("engine.name", message, f"write {' or '.join(able)}" if able else "")
    if traits.shards and engine.reshard_after_forward is None:
        message = "it must say whether gathered parameters are freed after forward"
        yield _wrong("engine.reshard_after_forward", message, "write true or false")
    if not traits.shards and engine.reshard_after_forward is not None:
        message = f"`{engine.name}` gathers no parameters"
        yield _wrong("engine.reshard_after_forward", message, "write null")
    if traits.shards and unshardable(profile):
        yield _wrong("engine.name", unshardable(profile))


def _batch(job: JobSpec, decision: Decision) -> Iterator[Diagnostic]:
    batch = job.train.global_batch_sequences
    made = decision.micro_batch * decision.accumulation * job.cluster.world_size
    if made == batch:
        return
    count, rest = divmod(batch, decision.micro_batch * job.cluster.world_size)
    way = f"write accumulation {count}" if not rest else "take a micro-batch that divides a device's share"
    message = (
        f"{decision.micro_batch} sequences x {decision.accumulation} x {job.cluster.world_size} devices are {made}, "
        f"but the global batch is {batch}"
    )
    yield _wrong("micro_batch" if rest else "accumulation", message, way)


def _checkpointing(profile: ModelProfile, decision: Decision) -> Iterator[Diagnostic]:
    checkpointing, blocks = decision.checkpointing, block_count(profile)
    if checkpointing.of != blocks:
        yield _wrong("checkpointing.of", f"the model has {blocks} blocks", f"write {blocks}")
    if checkpointing.blocks > blocks:
        message = f"{checkpointing.blocks} blocks are to be recomputed, and there are {blocks}"
        yield _wrong("checkpointing.blocks", message, f"write at most {blocks}")
    if (checkpointing.policy == "none") != (checkpointing.blocks == 0):
        wanted = "full" if checkpointing.blocks else "none"
        message = f"the policy is `{checkpointing.policy}` for {checkpointing.blocks} blocks"
        yield _wrong("checkpointing.policy", message, f"write {wanted}")


def _precision(job: JobSpec, profile: ModelProfile, decision: Decision) -> Iterator[Diagnostic]:
    traits = PRECISIONS[decision.precision]
    if traits.hardware not in job.cluster.device.peak:
        yield _wrong("precision", f"`{job.cluster.device.name}` cannot compute in {traits.hardware}")
    elif QUALITIES.index(job.quality) < QUALITIES.index(traits.quality):
        message = f"`quality: {job.quality}` does not permit {decision.precision}"
        yield _wrong("precision", message, f"set `quality: {traits.quality}` in the job")
    elif not profiled(profile, decision.precision):
        yield _wrong("precision", f"the model was not profiled in {traits.compute}", "profile it in that dtype too")


def _wrong(key: str, message: str, suggestion: str = "") -> Diagnostic:
    return Diagnostic(key=f"decision.{key}" if key else "decision", message=message, suggestion=suggestion)
