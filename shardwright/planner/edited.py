"""Checks of a decision that a person may have edited. What follows from the numbers (the levels of an axis) is not
checked but worked out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from shardwright.planner.candidates import measure
from shardwright.planner.engines import ENGINES
from shardwright.planner.explain import misses
from shardwright.planner.layouts import level_ends
from shardwright.planner.parallel import WHOLE
from shardwright.planner.pipelines.edited import mistakes as pipeline_mistakes
from shardwright.planner.pipelines.space import ENGINE as PIPELINE_ENGINE
from shardwright.planner.precisions import PRECISIONS, QUALITIES
from shardwright.planner.predict import Predictor
from shardwright.planner.sharing_edited import data_axes, processes
from shardwright.planner.sharing_edited import mistakes as sharing_mistakes
from shardwright.planner.space import (
    PIPELINE_AXIS,
    TENSOR_AXIS,
    Point,
    axis_name,
    block_count,
    parallel_of,
    point_of,
    profiled,
    unshardable,
)
from shardwright.schemas.checks import divisors, shard_degrees
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Decision
from shardwright.schemas.profile import ModelProfile


def checked_point(predictor: Predictor, decision: Decision) -> Point:
    """The point that a decision states. Raises InputError with a diagnostic for everything that is wrong with it."""
    shared = list(sharing_mistakes(predictor.job, predictor.profile, decision))
    if shared:
        raise InputError(shared)
    own = predictor.of(parallel_of(decision))
    job, profile = own.job, own.profile
    flat = ENGINES[decision.engine.name].flat
    wrong = [
        *_mesh(predictor.job, decision),
        *(_flat_states(job, decision) if flat else _states(job, decision)),
        *pipeline_mistakes(job, profile, decision),
        *_secondary(decision),
        *_communication(job, decision),
        *_engine(profile, decision),
        *_batch(job, decision),
        *_checkpointing(profile, decision),
        *_precision(job, profile, decision),
    ]
    if wrong:
        raise InputError(wrong)
    point = point_of(decision)
    try:
        candidate = measure(predictor, point)
    except InputError as error:
        raise InputError([_of_schedule(each) for each in error.diagnostics]) from error
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
            "give the axes sizes whose product is the world size",
        )
    names = [axis.name for axis in mesh.axes]
    wanted = _axis_names(decision)
    if names != wanted:
        said = "no axes" if not wanted else " and then ".join(wanted)
        yield _wrong("mesh.axes", f"this layout on `{decision.engine.name}` has {said}", f"write {said}")


def _axis_names(decision: Decision) -> list[str]:
    tensor = [TENSOR_AXIS] if decision.tensor_parallel.degree > 1 else []
    return [*_axes_without_tensors(decision, len(decision.mesh.axes) - len(tensor)), *tensor]


def _axes_without_tensors(decision: Decision, count: int) -> list[str]:
    """Names of so many axes: of stages and data."""
    world, shard = processes(decision), decision.states.parameters.degree
    if decision.pipeline.schedule != "none":
        return [PIPELINE_AXIS, *(axis_name(index) for index in reversed(range(count - 1)))]
    if ENGINES[decision.engine.name].flat:
        return [axis_name(index) for index in reversed(range(count))]
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


def _flat_states(job: JobSpec, decision: Decision) -> Iterator[Diagnostic]:
    """amsp: every degree a product of the fastest axes, and optimizer states the widest."""
    states = decision.states
    axes = tuple(axis.size for axis in data_axes(decision))
    ends = level_ends(axes)
    named = {
        "parameters": states.parameters,
        "gradients": states.gradients,
        "optimizer_states": states.optimizer_states,
    }
    if states.secondary is not None:
        named["secondary"] = states.secondary
    valid = [each for each in shard_degrees(job.cluster) if each in ends]
    for name, state in named.items():
        if state.degree not in valid:
            message = f"{state.degree} devices are no product of the fastest axes {axes} that fills the levels evenly"
            yield _wrong(f"states.{name}.degree", message, f"write one of {', '.join(map(str, valid))}")
    widest = states.optimizer_states.degree
    for name in ("parameters", "gradients"):
        if named[name].degree > widest:
            message = f"optimizer states over {widest} devices are sharded less than {name} over {named[name].degree}"
            yield _wrong(f"states.{name}.degree", message, f"write at most {widest}")
    if decision.accumulation == 1 and states.gradients.degree != widest:
        message = "gradients accumulate over several micro-batches only, and there is one"
        yield _wrong("states.gradients.degree", message, f"write {widest}")


def _secondary(decision: Decision) -> Iterator[Diagnostic]:
    """A second copy has to be narrower than what it is a copy of, and there while the block is not gathered."""
    second, parameters = decision.states.secondary, decision.states.parameters.degree
    if second is None:
        return
    if not 1 < second.degree < parameters or parameters % second.degree:
        message = f"a second copy over {second.degree} devices of parameters over {parameters}"
        between = [each for each in divisors(parameters) if 1 < each < parameters]
        way = f"write one of {', '.join(map(str, between))}" if between else "write null"
        yield _wrong("states.secondary.degree", message, way)
    if not decision.engine.reshard_after_forward:
        message = "a second copy is for parameters that are freed after forward"
        yield _wrong("states.secondary", message, "write null, or `reshard_after_forward: true`")


def _communication(job: JobSpec, decision: Decision) -> Iterator[Diagnostic]:
    """Fewer bits only over axes that carry such a collective, and where the job permits it."""
    axes = data_axes(decision)
    ends = level_ends(tuple(axis.size for axis in axes))
    limits = {
        "int8_gathers": decision.states.parameters.degree,
        "int4_reductions": decision.states.optimizer_states.degree,
    }
    for name, limit in limits.items():
        named = getattr(decision.communication, name)
        usable = [axis.name for index, axis in enumerate(axes) if ends[index] < limit]
        if not ENGINES[decision.engine.name].flat:
            usable = []
        for axis in named:
            if axis not in usable:
                way = f"write some of {', '.join(usable)}" if usable else "leave it empty"
                yield _wrong(f"communication.{name}", f"nothing of that kind goes over `{axis}`", way)
        if named and job.quality != "lossy":
            message = f"`quality: {job.quality}` does not permit it"
            yield _wrong(f"communication.{name}", message, "set `quality: lossy` in the job")


def _engine(profile: ModelProfile, decision: Decision) -> Iterator[Diagnostic]:
    engine = decision.engine
    traits = ENGINES[engine.name]
    layout = {"world": processes(decision), "degree": decision.states.parameters.degree}
    if decision.pipeline.schedule != "none" and engine.name != PIPELINE_ENGINE:
        yield _wrong("engine.name", "only `amsp` runs pipeline stages", "write amsp")
        return
    if not traits.runs(**layout, precision=decision.precision):
        able = [name for name, each in ENGINES.items() if each.runs(**layout, precision=decision.precision)]
        message = (
            f"`{engine.name}` does not run {decision.precision} on {layout['world']} devices with parameters over "
            f"{layout['degree']}"
        )
        yield _wrong("engine.name", message, f"write {' or '.join(able)}" if able else "")
    gathers = traits.shards and not (traits.flat and layout["degree"] == 1)
    if gathers and engine.reshard_after_forward is None:
        message = "it must say whether gathered parameters are freed after forward"
        yield _wrong("engine.reshard_after_forward", message, "write true or false")
    if not gathers and engine.reshard_after_forward is not None:
        message = f"`{engine.name}` gathers no parameters here"
        yield _wrong("engine.reshard_after_forward", message, "write null")
    if unshardable(profile, engine.name):
        yield _wrong("engine.name", unshardable(profile, engine.name))


def _batch(job: JobSpec, decision: Decision) -> Iterator[Diagnostic]:
    parts = decision.context_parallel.degree
    batch, piped = job.train.global_batch_sequences // parts, decision.pipeline.ranks > 1
    copies = max(1, job.cluster.world_size // decision.pipeline.ranks // parts)
    made = decision.micro_batch * decision.accumulation * copies
    if made == batch:
        return
    count, rest = divmod(batch, decision.micro_batch * copies)
    shared = piped or parallel_of(decision) != WHOLE
    share = "the share of a copy of the model" if shared else "a device's share"
    way = f"write accumulation {count}" if not rest else f"take a micro-batch that divides {share}"
    message = (
        f"{decision.micro_batch} sequences x {decision.accumulation} x {copies} {'copies' if shared else 'devices'} "
        f"are {made}, but the global batch is {batch}"
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


def _of_schedule(diagnostic: Diagnostic) -> Diagnostic:
    """A diagnostic of the schedule, at the schedule of the decision."""
    return replace(diagnostic, key="decision.pipeline.schedule")


def _wrong(key: str, message: str, suggestion: str = "") -> Diagnostic:
    return Diagnostic(key=f"decision.{key}" if key else "decision", message=message, suggestion=suggestion)
