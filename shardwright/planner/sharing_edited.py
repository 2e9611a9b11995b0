"""Checks of how a decision that a person may have edited shares one copy of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shardwright.planner.layouts import level_ends
from shardwright.planner.parallel import Parallel
from shardwright.planner.parallels import parallels
from shardwright.planner.space import NO_EXPERTS, PIPELINE_AXIS, TENSOR_AXIS, parallel_of
from shardwright.schemas.checks import neighbours
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.expected import join
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Decision, MeshAxis
from shardwright.schemas.profile import ModelProfile


def processes(decision: Decision) -> int:
    """Of the mesh, every group that shares its layers counted once."""
    return max(1, decision.mesh.world_size // decision.tensor_parallel.degree)


def data_axes(decision: Decision) -> list[MeshAxis]:
    """Those that states are sharded over and copies lie along, fastest first."""
    return [axis for axis in reversed(decision.mesh.axes) if axis.name not in (PIPELINE_AXIS, TENSOR_AXIS)]


def mistakes(job: JobSpec, profile: ModelProfile, decision: Decision) -> Iterator[Diagnostic]:
    """A diagnostic for everything that is wrong with it. Degrees that `auto` leaves out may be written."""
    stated = parallel_of(decision)
    try:
        found = _possible(job, profile, stated)
    except InputError as error:
        yield from map(_of_decision, error.diagnostics)
        return
    wrong = [*_degrees(job, profile, stated, found), *_methods(stated, found), *_sequence(profile, stated)]
    yield from wrong
    if not wrong:
        yield from _axis(decision)
        yield from _groups(decision)


def _possible(job: JobSpec, profile: ModelProfile, parallel: Parallel) -> tuple[Parallel, ...]:
    """Ways to share the model of these degrees or none, whatever the job permits. Raises InputError where one of them
    is impossible by itself."""
    pinned = {"tp": (1, parallel.tp), "cp": (1, parallel.cp), "ep": (1, parallel.ep), "context_method": "auto"}
    strategy = job.strategy.model_copy(update=pinned)
    return parallels(job.model_copy(update={"strategy": strategy}), profile)


def _of_decision(diagnostic: Diagnostic) -> Diagnostic:
    """A diagnostic of the strategy, at the decision."""
    names = {"tp": "tensor_parallel", "cp": "context_parallel", "ep": "expert_parallel"}
    axis = diagnostic.key.split(".")[1]
    return _wrong(f"{names.get(axis, axis)}.degree", diagnostic.message, diagnostic.suggestion)


def _degrees(job: JobSpec, profile: ModelProfile, stated: Parallel, found: Iterable[Parallel]) -> Iterator[Diagnostic]:
    """All together."""
    if not any((each.tp, each.cp, each.ep) == (stated.tp, stated.cp, stated.ep) for each in found):
        message = (
            f"{job.cluster.world_size} devices and sequences of {profile.sequence_length} tokens do not divide among "
            f"{stated.tp} that share layers, {stated.cp} that share sequences and {stated.ep} that share experts"
        )
        yield _wrong("tensor_parallel.degree", message, "write smaller degrees")


def _methods(stated: Parallel, found: Iterable[Parallel]) -> Iterator[Diagnostic]:
    if (stated.cp == 1) != (stated.method == "none"):
        way = "write none" if stated.cp == 1 else "write ring, gather or ulysses"
        message = f"{stated.cp} processes share a sequence, but the method is `{stated.method}`"
        yield _wrong("context_parallel.method", message, way)
        return
    ways = {each.method for each in found if (each.tp, each.cp) == (stated.tp, stated.cp)}
    if ways and stated.method not in ways:
        message = f"`{stated.method}` cannot divide this model's heads or sequences among {stated.cp} processes"
        yield _wrong("context_parallel.method", message, f"write {join(sorted(ways), 'or')}")


def _sequence(profile: ModelProfile, stated: Parallel) -> Iterator[Diagnostic]:
    wanted = stated.tp > 1 and profile.tensor_parallelism.sequence
    if stated.sequence != wanted:
        why = profile.tensor_parallelism.sequence_reason if stated.tp > 1 else "no layer is divided"
        message = f"this model's costs are known {'with' if wanted else 'without'} divided sequences only"
        yield _wrong(
            "tensor_parallel.sequence", f"{message}{f': {why}' if why else ''}", f"write {str(wanted).lower()}"
        )


def _axis(decision: Decision) -> Iterator[Diagnostic]:
    """Tensors lie along the fastest axis."""
    degree = decision.tensor_parallel.degree
    sizes = [axis.size for axis in decision.mesh.axes if axis.name == TENSOR_AXIS]
    if degree > 1 and sizes and sizes[0] != degree:
        message = f"{degree} devices share each layer, but the axis tp has {sizes[0]}"
        yield _wrong("tensor_parallel.degree", message, f"make both {degree} or both {sizes[0]}")


def _groups(decision: Decision) -> Iterator[Diagnostic]:
    """Whole groups that share sequences or experts among the data processes, and states of experts that can be
    sharded."""
    stated = parallel_of(decision)
    data = processes(decision) // max(1, decision.pipeline.ranks)
    for name, degree in (("context_parallel", stated.cp), ("expert_parallel", stated.ep)):
        if data % degree:
            message = f"{data} data processes do not divide into groups of {degree}"
            yield _wrong(f"{name}.degree", message, f"write a divisor of {data}")
    if stated.ep == 1:
        return
    if decision.engine.name in NO_EXPERTS:
        message = f"`{decision.engine.name}` does not run expert parallelism"
        yield _wrong("expert_parallel.degree", message, "write 1, or choose `fsdp2` or `amsp`")
    states = decision.states
    for name in ("parameters", "gradients", "optimizer_states"):
        degree = getattr(states, name).degree
        if max(degree, stated.ep) % min(degree, stated.ep):
            message = f"{degree} devices and the {stated.ep} that share experts do not divide each other"
            yield _wrong(f"states.{name}.degree", message, f"write a multiple or a divisor of {stated.ep}")
    if states.secondary is not None:
        yield _wrong("states.secondary", "shared experts have no second copy", "write null")
    for name in ("int8_gathers", "int4_reductions"):
        if getattr(decision.communication, name):
            yield _wrong(f"communication.{name}", "with shared experts nothing travels in fewer bits", "leave it empty")
    ends = level_ends(tuple(axis.size for axis in data_axes(decision)))
    if decision.engine.name == "amsp" and stated.ep not in ends:
        near = join([str(each) for each in neighbours(ends, stated.ep)], "or")
        message = f"the {stated.ep} processes that share experts are no product of the fastest data axes"
        yield _wrong("expert_parallel.degree", message, f"write {near}, or cut the axes there")


def _wrong(key: str, message: str, suggestion: str = "") -> Diagnostic:
    return Diagnostic(key=f"decision.{key}", message=message, suggestion=suggestion)
