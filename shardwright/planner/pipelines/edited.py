"""Checks of the pipeline of a decision that a person may have edited."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.planner.pipelines.space import family_of, permitted_cuts, placement_of, refused_cuts
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.space import Pipe, block_count, point_of
from shardwright.schemas.checks import neighbours, pipeline_sizes
from shardwright.schemas.diagnostics import Diagnostic
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Decision, Pipeline
from shardwright.schemas.profile import ModelProfile


def mistakes(job: JobSpec, profile: ModelProfile, decision: Decision) -> Iterator[Diagnostic]:
    """A diagnostic with a key `decision.pipeline....` for everything that is wrong with it by itself."""
    if decision.pipeline.schedule == "none":
        yield from _left_over(decision.pipeline)
        return
    pipe = point_of(decision).pipe
    assert pipe is not None, "a decision with a schedule has a pipeline"
    yield from _ranks(job, decision, pipe)
    yield from _schedule(decision, pipe)
    yield from _cuts(profile, pipe)
    yield from _checkpointed(profile, decision, pipe)
    yield from _limits(pipe)
    yield from _states(decision)


def _left_over(pipeline: Pipeline) -> Iterator[Diagnostic]:
    """Without a schedule nothing of a pipeline may be there."""
    plain = Pipeline()
    for name in ("ranks", "chunks", "placement", "cuts", "checkpointed", "activation_limits", "late_step"):
        value, none = getattr(pipeline, name), getattr(plain, name)
        if value != none:
            way = f"write {_shown(none)}, or choose a schedule"
            yield _wrong(name, f"without a schedule there is no pipeline, but `{name}` says {_shown(value)}", way)


def _ranks(job: JobSpec, decision: Decision, pipe: Pipe) -> Iterator[Diagnostic]:
    world = job.cluster.world_size
    valid = [size for size in pipeline_sizes(job.cluster) if size > 1]
    if pipe.ranks not in valid:
        message = (
            f"the cluster's {world} devices do not divide into pipelines of {pipe.ranks}, copies on fastest levels"
        )
        yield _wrong("ranks", message, f"write one of {', '.join(map(str, valid))}")
        return
    first = decision.mesh.axes[0] if decision.mesh.axes else None
    if first is not None and first.name == "pp" and first.size != pipe.ranks:
        message = f"the pipeline has {pipe.ranks} devices, but the axis pp has {first.size}"
        yield _wrong("ranks", message, f"make both {pipe.ranks} or both {first.size}")


def _schedule(decision: Decision, pipe: Pipe) -> Iterator[Diagnostic]:
    family = family_of(pipe)
    if not family.allowed_chunks(pipe.chunks):
        message = f"{family.name} has no schedule of {pipe.chunks} chunks a device"
        yield _wrong("chunks", message, f"write {family.chunks_in_words}")
        return
    placement = placement_of(family, pipe.chunks)
    if pipe.placement != placement:
        yield _wrong("placement", f"the stages of {family.name} lie on a {placement}", f"write {placement}")
        return
    refused = family.refuses(pipe.layout, decision.accumulation)
    if refused:
        others = [
            name
            for name, each in SCHEDULES.items()
            if each.allowed_chunks(pipe.chunks)
            and placement_of(each, pipe.chunks) == pipe.placement
            and not each.refuses(pipe.layout, decision.accumulation)
        ]
        yield _wrong("schedule", f"{family.name} refuses: {refused}", f"write one of {', '.join(others)}")


def _cuts(profile: ModelProfile, pipe: Pipe) -> Iterator[Diagnostic]:
    blocks, wanted = block_count(profile), pipe.layout.stages - 1
    if len(pipe.cuts) != wanted:
        message = f"{pipe.layout.stages} stages have {wanted} cuts between them, not {len(pipe.cuts)}"
        yield _wrong("cuts", message, f"write {wanted} numbers of blocks")
        return
    pairs = zip((-1, *pipe.cuts), (*pipe.cuts, blocks + 1), strict=True)
    if any(end <= begin for begin, end in pairs):
        message = f"cuts are numbers of blocks from 0 to {blocks}, each larger than the one before"
        yield _wrong("cuts", f"{message}, not {_shown(pipe.cuts)}", "write them in ascending order")
        return
    permitted = permitted_cuts(profile)
    for index, cut in enumerate(pipe.cuts):
        if cut not in permitted:
            why = refused_cuts(profile) or "the profile knows of no cut there"
            near = ", ".join(map(str, neighbours(permitted, cut)))
            yield _wrong(f"cuts.{index}", f"the model cannot be cut after {cut} blocks: {why}", f"write {near}")


def _checkpointed(profile: ModelProfile, decision: Decision, pipe: Pipe) -> Iterator[Diagnostic]:
    stages = pipe.layout.stages
    if len(pipe.checkpointed) != stages:
        message = f"there are {stages} stages, but {len(pipe.checkpointed)} numbers of checkpointed blocks"
        yield _wrong("checkpointed", message, f"write {stages} numbers")
        return
    if len(pipe.cuts) == stages - 1:
        sizes = pipe.sizes(block_count(profile))
        for stage, (count, size) in enumerate(zip(pipe.checkpointed, sizes, strict=True)):
            if not 0 <= count <= size:
                message = f"stage {stage} has {size} blocks, of which {count} are to be recomputed"
                yield _wrong(f"checkpointed.{stage}", message, f"write a number from 0 to {size}")
    if sum(pipe.checkpointed) != decision.checkpointing.blocks:
        message = f"the stages recompute {sum(pipe.checkpointed)} blocks, but `checkpointing` says otherwise"
        way = f"write {sum(pipe.checkpointed)}"
        yield Diagnostic(key="decision.checkpointing.blocks", message=message, suggestion=way)


def _limits(pipe: Pipe) -> Iterator[Diagnostic]:
    searches = family_of(pipe).searches
    if pipe.activation_limits and not searches:
        yield _wrong("activation_limits", f"{pipe.schedule} makes no use of memory limits", "write []")
    elif searches and len(pipe.activation_limits) not in (0, pipe.ranks):
        message = f"{len(pipe.activation_limits)} memory limits for {pipe.ranks} devices"
        yield _wrong("activation_limits", message, f"write {pipe.ranks} numbers of bytes, or []")
    elif any(limit <= 0 for limit in pipe.activation_limits):
        yield _wrong("activation_limits", "a memory limit has to be above zero", "write bytes of activations")


def _states(decision: Decision) -> Iterator[Diagnostic]:
    """What the space leaves out ([Note: which pipelines there are])."""
    if decision.states.secondary is not None:
        message = "with pipeline stages there is no second copy of the parameters"
        yield Diagnostic(key="decision.states.secondary", message=message, suggestion="write null")
    for name in ("int8_gathers", "int4_reductions"):
        if getattr(decision.communication, name):
            message = "with pipeline stages nothing travels in fewer bits"
            yield Diagnostic(key=f"decision.communication.{name}", message=message, suggestion="leave it empty")
    gradients, widest = decision.states.gradients.degree, decision.states.optimizer_states.degree
    if gradients not in (1, widest):
        message = (
            f"with pipeline stages gradients accumulate whole or as optimizer states are sharded, not over {gradients}"
        )
        yield Diagnostic(key="decision.states.gradients.degree", message=message, suggestion=f"write {widest} or 1")
    if decision.engine.reshard_after_forward is False:
        message = "with pipeline stages gathered parameters are freed after each run of a stage"
        yield Diagnostic(key="decision.engine.reshard_after_forward", message=message, suggestion="write true")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _wrong(key: str, message: str, suggestion: str = "") -> Diagnostic:
    return Diagnostic(key=f"decision.pipeline.{key}", message=message, suggestion=suggestion)
