"""The emitting halves of the planner's `ENGINES`: what each adds to a script. Its code is in `templates/engines/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from shardwright.backends.pytorch.parallel_constants import data_processes
from shardwright.backends.pytorch.text import assignment
from shardwright.planner.engines import DDP_BUCKET_CAP_MIB
from shardwright.planner.schedules.timetable import Layout
from shardwright.schemas.plan import Decision


class Flag(NamedTuple):
    """A setting of FSDP2 that says, at each micro-batch, whether it is the step's last."""

    call: str
    comment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEmitter:
    """One engine's share of a script."""

    grouped: bool
    """Whether it needs a process group, also for one process."""
    constants: Callable[[Decision], str]
    """Its constants, with the mesh."""
    shards_blocks: bool
    """Whether it names the blocks."""


def micro_batch_flags(decision: Decision) -> tuple[Flag, ...]:
    """What must be set per micro-batch so that FSDP2 moves exactly what the plan says.

    `set_requires_gradient_sync(False)` adds whole gradients up (gradient degree 1); `set_requires_all_reduce(False)`
    adds up shards inside `dp_shard` and leaves the copies apart until the last micro-batch;
    `set_reshard_after_backward(False)` keeps gathered parameters from one micro-batch to the next. See
    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
    """
    if decision.engine.name != "fsdp2" or decision.accumulation == 1:
        return ()
    sizes = {axis.name: axis.size for axis in decision.mesh.axes}
    flags = []
    if decision.states.gradients.degree == 1:
        flags.append(Flag("set_requires_gradient_sync", "whole gradients add up; the last micro-batch reduces them"))
    elif sizes.get("dp_replicate", 1) > 1:
        flags.append(Flag("set_requires_all_reduce", "copies of the shards add up on their own until the last one"))
    if not decision.engine.reshard_after_forward:
        flags.append(Flag("set_reshard_after_backward", "parameters stay gathered from one micro-batch to the next"))
    return tuple(flags)


def _mesh(decision: Decision, comment: str = "") -> str:
    axes = decision.mesh.axes
    return "\n".join(
        [
            assignment("MESH_SHAPE", tuple(axis.size for axis in axes), comment),
            assignment("MESH_AXES", tuple(axis.name for axis in axes)),
        ]
    )


def pipeline_constants(decision: Decision) -> str:
    """Where the stages of a pipeline are."""
    pipeline = decision.pipeline
    layout = Layout(pipeline.ranks, pipeline.chunks, pipeline.placement)
    ranks = tuple(layout.place(stage)[0] for stage in range(layout.stages))
    lines = [
        assignment("STAGE_RANKS", ranks, "of each stage of the model, its place on the axis pp"),
        assignment("STAGE_CUTS", pipeline.cuts, "of each stage but the last, how many of BLOCKS lie before its end"),
    ]
    copies = data_processes(decision)
    if copies > 1:
        own = ", each with its own samples" if decision.context_parallel.degree == 1 else ""
        parts = " and parts of layers" if decision.tensor_parallel.degree > 1 else ""
        lines.append(assignment("COPIES", copies, f"processes that have the same stages{parts}{own}"))
    return "\n".join(lines)


def _states(decision: Decision) -> str:
    """The mesh, over how many neighbouring devices one copy of each state is spread, and what travels in fewer bits."""
    states = decision.states
    of = "dp ones" if decision.tensor_parallel.degree > 1 else "ones"
    lines = [
        _mesh(decision, f"slowest first; each number of shards is a product of the last {of}"),
        assignment("PARAMETER_SHARDS", states.parameters.degree, "devices that share one copy of the parameters"),
        assignment("GRADIENT_SHARDS", states.gradients.degree, "of the gradients, from one micro-batch to the next"),
        assignment("OPTIMIZER_SHARDS", states.optimizer_states.degree, "of the optimizer's states and its fp32 values"),
    ]
    if states.secondary is not None:
        comment = "of a second copy of a block's parameters, which its backward gathers instead"
        lines.append(assignment("SECONDARY_SHARDS", states.secondary.degree, comment))
    gathers, reductions = decision.communication.int8_gathers, decision.communication.int4_reductions
    if gathers:
        lines.append(assignment("INT8_GATHERS", gathers, "axes that parameters are gathered over in 8 bits, rounded"))
    if reductions:
        lines.append(assignment("INT4_REDUCTIONS", reductions, "axes that gradients are sent over in 4 bits, rounded"))
    return "\n".join(lines)


def _bucket(decision: Decision) -> str:
    bucket = assignment("BUCKET_MIB", DDP_BUCKET_CAP_MIB, "gradients are all-reduced in buckets of this size")
    return "\n".join([*_single(decision).splitlines(), bucket])


def _single(decision: Decision) -> str:
    """The mesh, where layers are divided; else there is none."""
    return _mesh(decision) if decision.tensor_parallel.degree > 1 else ""


ENGINES: Mapping[str, EngineEmitter] = MappingProxyType(
    {
        "single": EngineEmitter(grouped=False, constants=_single, shards_blocks=False),
        "ddp": EngineEmitter(grouped=True, constants=_bucket, shards_blocks=False),
        "fsdp2": EngineEmitter(grouped=True, constants=_mesh, shards_blocks=True),
        "amsp": EngineEmitter(grouped=True, constants=_states, shards_blocks=True),
    }
)
