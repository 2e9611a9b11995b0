"""A plan's pipeline as the other drawings need it: which stage has what of the model, and its timetable simulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from shardwright.planner.pipelines.cutting import Held, in_flight
from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.simulator import Simulation, simulate
from shardwright.planner.schedules.text import from_text
from shardwright.planner.schedules.timetable import Costs, Layout
from shardwright.report.layout import plural
from shardwright.report.memory import common_unit
from shardwright.report.schedule import Measures, Schedule
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Decision, PipelinePrediction, Plan

_MILLISECONDS = 1e3


@dataclass(frozen=True)
class Piped:
    """A plan with pipeline stages. Raises InputError where its parts do not belong together, as after an edit."""

    plan: Plan
    prediction: PipelinePrediction

    def __post_init__(self) -> None:
        pipeline, stages = self.plan.decision.pipeline, self.layout.stages
        counts = {len(pipeline.cuts) + 1, len(pipeline.checkpointed), len(self.prediction.stages)}
        if counts != {stages} or len(self.plan.prediction.memory.stages) != pipeline.ranks:
            raise _stale(f"the pipeline has {stages} stages on {pipeline.ranks} ranks, and the prediction others")

    @cached_property
    def layout(self) -> Layout:
        """Stages on ranks."""
        pipeline = self.plan.decision.pipeline
        return Layout(pipeline.ranks, pipeline.chunks, pipeline.placement)

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """What each stage has: `embedding, blocks 0-2`."""
        ends = (0, *self.plan.decision.pipeline.cuts, self.plan.decision.checkpointing.of)
        return tuple(self._content(stage, *blocks) for stage, blocks in enumerate(pairwise(ends)))

    def _content(self, stage: int, first: int, end: int) -> str:
        parts = ["embedding"] if stage == 0 else []
        if end > first:
            parts.append(f"block {first}" if end == first + 1 else f"blocks {first}-{end - 1}")
        return ", ".join([*parts, "head"] if stage == self.layout.stages - 1 else parts)

    @cached_property
    def memory_unit(self) -> tuple[str, int]:
        """That of all activations, so that they can be compared: that of the most that one rank holds."""
        return common_unit(round(max(self._simulated(1).peak_memory)))

    @cached_property
    def simulation(self) -> Simulation:
        """In milliseconds and `memory_unit`."""
        return self._simulated(self.memory_unit[1])

    def _simulated(self, scale: int) -> Simulation:
        stages = self.prediction.stages
        costs = Costs(
            forward=[_MILLISECONDS * each.forward_s for each in stages],
            input_gradient=[_MILLISECONDS * each.input_gradient_s for each in stages],
            weight_gradient=[_MILLISECONDS * each.weight_gradient_s for each in stages],
            send=[_MILLISECONDS * each.send_s for each in stages[:-1]],
            activations=[each.activation_bytes / scale for each in stages],
            held_by_weight=[each.held_by_weight_bytes / scale for each in stages],
        )
        try:
            timetable = from_text("\n".join(self.prediction.timetable))
            return simulate(timetable, self.layout, costs)
        except (ScheduleError, ValueError) as error:
            raise _stale(f"the timetable is not one of these stages: {error}") from error

    @cached_property
    def schedule(self) -> Schedule:
        """As `schedule` draws it."""
        simulation, unit = self.simulation, self.memory_unit[0]
        return Schedule(
            family=self.plan.decision.pipeline.schedule,
            simulation=simulation,
            lower_bound=_MILLISECONDS * self.prediction.lower_bound_s,
            measures=Measures(time=" ms", memory=unit, held=f"{unit} of activations", traced="predicted time"),
            plan=self.plan.name,
            contents=self.contents,
        )

    def most_at_once(self, stage: int) -> tuple[int, int]:
        """Micro-batches between their F and their I, and between their I and their W."""
        rank, chunk = self.layout.place(stage)
        moments = self._held[rank]
        active = max((held.active[chunk] for held in moments), default=0)
        return active, max((held.waiting[chunk] for held in moments), default=0)

    @cached_property
    def _held(self) -> tuple[tuple[Held, ...], ...]:
        return in_flight(self.simulation.timetable, self.layout)

    def title(self) -> str:
        """`8 stages on 4 ranks (2 chunks each, a V), 16 micro-batches`."""
        layout = self.layout
        placed = ", back and forth" if layout.placement == "wave" and layout.chunks > 1 else ""
        chunks = f" ({layout.chunks} each{placed})" if layout.chunks > 1 else ""
        batches = plural(self.plan.decision.accumulation, "micro-batch", "micro-batches")
        return f"{plural(layout.stages, 'stage')} on {plural(layout.ranks, 'rank')}{chunks}, {batches}"

    def stages_of(self, rank: int) -> Iterator[int]:
        """The stages of a rank, in the order of the model."""
        return (self.layout.stage(rank, chunk) for chunk in range(self.layout.chunks))


def piped(plan: Plan) -> Piped | None:
    """None for a plan without pipeline stages, or without a prediction of them."""
    if plan.decision.pipeline.schedule == "none" or plan.prediction.pipeline is None:
        return None
    return Piped(plan, plan.prediction.pipeline)


def schedule_of(plan: Plan) -> Schedule:
    """The plan's pipeline as `schedule_svg` and `schedule_trace` take it, in milliseconds. Raises InputError."""
    found = piped(plan)
    if found is None:
        message = "the plan has no pipeline stages, so there is no schedule to draw"
        raise InputError(Diagnostic(key="decision.pipeline", message=message, suggestion="leave --svg and --trace out"))
    return found.schedule


def copies_of(decision: Decision) -> int:
    """Devices that have the same part of every layer and the same stages; all without parallelism of the model."""
    return decision.mesh.world_size // (decision.pipeline.ranks * decision.tensor_parallel.degree)


def _stale(message: str) -> InputError:
    way_out = "the plan was edited: `inspect --set` and `compile` predict it again"
    return InputError(Diagnostic(key="prediction.pipeline", message=message, suggestion=way_out))
