"""What a pipeline adds to an emission: the program of each rank, out of the timetable that the plan states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.lowering import Gathers, Program, lower
from shardwright.planner.schedules.text import from_text
from shardwright.planner.schedules.timetable import Costs, Layout
from shardwright.planner.schedules.verification import verify
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Plan, StageTime

PROGRAM = "program.txt"


def programs(plan: Plan) -> tuple[Program, ...]:
    """Of every rank of the pipeline, proved to be right; empty without a pipeline.

    Gradients that are sharded more than whole are reduced after every micro-batch, parameters that rest sharded are
    gathered one action ahead. Raises InputError where the plan's timetable is broken or missing, and for a second copy
    of the parameters, which stages do not gather from.
    """
    decision, predicted = plan.decision, plan.prediction.pipeline
    if decision.pipeline.schedule == "none":
        return ()
    if predicted is None:
        raise InputError(Diagnostic(key="prediction.pipeline", message="a plan with a pipeline needs its timetable"))
    states, pipeline = decision.states, decision.pipeline
    if states.secondary is not None:
        message = "stages of a pipeline have no second copy of their parameters"
        raise InputError(Diagnostic(key="decision.states.secondary", message=message, suggestion="set it to null"))
    layout = Layout(pipeline.ranks, pipeline.chunks, pipeline.placement)
    gathers = Gathers(lead=1, gap=1) if states.parameters.degree > 1 else None
    try:
        lowered = lower(
            from_text("\n".join(predicted.timetable)),
            layout,
            edges=predicted.edges,
            costs=_costs(predicted.stages),
            reduce_every=1 if states.gradients.degree > 1 and decision.accumulation > 1 else None,
            gathers=gathers,
        )
        verify(lowered, layout, predicted.edges, sharded=gathers is not None)
    except (ScheduleError, ValueError, IndexError) as error:
        message = f"the timetable is not right: {error}"
        raise InputError(Diagnostic(key="prediction.pipeline.timetable", message=message)) from error
    return lowered


def pipeline_context(plan: Plan, lowered: Sequence[Program]) -> dict[str, Any]:
    """What the templates look up of a pipeline. `defers`: whether weight gradients come late; `late`: whether steps
    do."""
    on_device = "[to_device(batch, device) for batch in micro_batches]"
    return {
        "pipelined": bool(lowered),
        "defers": any(step.kind == "W" for program in lowered for step in program),
        "late": plan.decision.pipeline.late_step,
        "micro_batches_on_device": on_device if plan.job.cluster.device.kind == "cuda" else "micro_batches",
    }


def _costs(stages: Sequence[StageTime]) -> Costs:
    return Costs(
        forward=[stage.forward_s for stage in stages],
        input_gradient=[stage.input_gradient_s for stage in stages],
        weight_gradient=[stage.weight_gradient_s for stage in stages],
        send=[stage.send_s for stage in stages[:-1]],
        activations=[stage.activation_bytes for stage in stages],
        held_by_weight=[stage.held_by_weight_bytes for stage in stages],
    )
