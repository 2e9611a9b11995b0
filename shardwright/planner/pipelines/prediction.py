"""Everything that is predicted of a pipeline: for the plan, and for the search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from shardwright.planner.collectives import (
    COUNTS_BYTES,
    LOSS_BYTES,
    call_of,
    exchanged,
    load_calls,
    merged,
    metrics_calls,
    world_norm,
)
from shardwright.planner.exchanges import ALONE, Around, units_by_segment
from shardwright.planner.flat import Send, copy_sends, gather_sends, reduce_sends, trained_elements
from shardwright.planner.groups import Groups
from shardwright.planner.parts import Part, parts_of, spans_world
from shardwright.planner.pipelines.costs import PipelineCosts, pipe_of, recomputed_segments
from shardwright.planner.pipelines.memory import PipelineMemory
from shardwright.planner.pipelines.owners import stage_segments
from shardwright.planner.pipelines.schedule import Schedules
from shardwright.planner.pipelines.timing import PipelineTime
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.schedules.bounds import lower_bound
from shardwright.planner.schedules.text import to_text
from shardwright.planner.space import PIPELINE_AXIS, Point, axis_name
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Collective, PipelinePrediction, StageTime
from shardwright.schemas.profile import ModelProfile, Unit, UnitCost

COUNT_BYTES = 8
"""float64: learnt targets of the global batch."""
REQUESTS_BYTES = COUNTS_BYTES - COUNT_BYTES
"""float64: stop requested, save requested."""


def _exchanging(unit: Unit, *, whole: bool) -> Unit:
    """Embedding or head, with what it exchanges of whole sequences, or what is gathered at the ends of the blocks."""

    def of(cost: UnitCost) -> UnitCost:
        kinds = ("all_gather", "reduce_scatter")
        return replace(cost, exchanges=tuple(each for each in cost.exchanges if (each.kind not in kinds) is whole))

    return replace(unit, costs={dtype: of(cost) for dtype, cost in unit.costs.items()})


class Pipelines:
    """The models of all pipelines of one job. Raises ValueError for a model without blocks, which cannot be cut."""

    def __init__(self, job: JobSpec, profile: ModelProfile, groups: Groups, around: Around = ALONE) -> None:
        self.costs = PipelineCosts(job, profile, groups, around)
        self.schedules = Schedules(self.costs)
        self.memory = PipelineMemory(job, profile, groups, self.costs, self.schedules, around)
        self.time = PipelineTime(job, groups, self.costs, self.schedules, around)
        self._profile, self._units = profile, units_by_segment(profile)

    def prediction(self, point: Point) -> PipelinePrediction:
        """The pipeline section of a plan. The gap is to the bound under the point's activation limits, without any
        where its schedule was not searched under limits."""
        pipe, made = pipe_of(point), self.schedules.made(point)
        exact, span = self.costs.exact(point), made.simulation.span
        bound = lower_bound(made.layout, made.costs, point.accumulation, pipe.activation_limits or None)
        sends = [*made.costs.send, 0.0]
        return PipelinePrediction(
            stages=tuple(
                StageTime(
                    stage=stage,
                    rank=pipe.layout.place(stage)[0],
                    forward_s=exact.forward[stage],
                    input_gradient_s=exact.input_gradient[stage],
                    weight_gradient_s=exact.weight_gradient[stage],
                    send_s=sends[stage],
                    activation_bytes=round(exact.activations[stage]),
                    held_by_weight_bytes=round(exact.held_by_weight[stage]),
                )
                for stage in range(pipe.layout.stages)
            ),
            edges=self.costs.edges(point),
            timetable=tuple(to_text(made.timetable).splitlines()),
            makespan_s=made.simulation.makespan,
            bubble_rate=made.simulation.bubble_rate(),
            lower_bound_s=bound,
            gap=span / bound - 1.0 if bound > 0 else 0.0,
        )

    def collectives(self, point: Point, rank: int) -> tuple[Collective, ...]:
        """Every collective and message of one process with this rank's stages in one step, merged where equal."""
        late = pipe_of(point).late_step
        ends = self._late(point) if late else (*self._norm(point), *metrics_calls(point))
        states = [call for part in parts_of(point) for call in self._states(part, rank)]
        shared = exchanged(point, self._units_of(point, rank))
        ends = (*ends, *load_calls(point, self._layers_of_experts(point, rank)))
        return merged((*states, *shared, *self._messages(point, rank), *ends))

    def _units_of(self, point: Point, rank: int) -> Iterator[tuple[Unit, bool]]:
        """Units of the model that a rank runs, each with whether it is recomputed."""
        pipe, blocks = pipe_of(point), self.costs.blocks
        for chunk in range(pipe.chunks):
            stage = pipe.layout.stage(rank, chunk)
            again = recomputed_segments(pipe, stage, blocks)
            own = stage_segments(pipe, stage, blocks)
            yield from ((self._units[each], each in again) for each in own if 1 <= each <= blocks)
            # What leaves the blocks, or enters them, is gathered where the first or last of them is.
            for outside, nearest in ((0, 1), (blocks + 1, blocks)):
                unit = self._units[outside]
                yield from ((_exchanging(unit, whole=True), False),) if outside in own else ()
                yield from ((_exchanging(unit, whole=False), False),) if nearest in own else ()

    def _layers_of_experts(self, point: Point, rank: int) -> int:
        """How many of a rank's stages' layers have experts that can be shared."""
        pipe, paths = pipe_of(point), self._profile.block_paths
        stages = (pipe.layout.stage(rank, chunk) for chunk in range(pipe.chunks))
        own = tuple(f"{paths[block]}." for stage in stages for block in pipe.blocks(stage, self.costs.blocks))
        return sum(layer.path.startswith(own) for layer in self._profile.expert_layers)

    def _states(self, part: Part, rank: int) -> Iterator[tuple[Collective, int]]:
        """Parameters and gradients, as the rank's program has them, and the sums of tied gradients."""
        point = part.point
        pipe, layout = pipe_of(point), point.chain
        element = PRECISIONS[point.precision].compute_bytes
        units = self.costs.owners.units(pipe, rank)
        buckets = self.costs.owners.flat(pipe, rank, part)
        steps = Counter((step.kind, step.stage) for step in self.schedules.programs(point)[rank])
        for unit, of in zip(units, buckets, strict=True):
            gathers, reductions = (sum(steps[kind, stage] for stage in unit.stages) for kind in ("GATHER", "REDUCE"))
            for bucket in of:
                sends: Counter[Send] = Counter()
                for send in gather_sends(bucket, layout, layout.parameters, 0, element, point.int8_gathers):
                    sends[send] += gathers
                if bucket.trainable:
                    for send in reduce_sends(bucket, layout, 0, layout.gradients, point.int4_reductions):
                        sends[send] += reductions
                    for send in (
                        *reduce_sends(bucket, layout, layout.gradients, layout.optimizer_states, point.int4_reductions),
                        *copy_sends(bucket, layout),
                        *gather_sends(bucket, layout, layout.optimizer_states, layout.parameters, element),
                    ):
                        sends[send] += 1
                for send, count in sends.items():
                    size = layout.sizes[send.axis]
                    yield call_of(send.kind, part.axis(send.axis), size, send.bytes, send.purpose), count
            own = trained_elements(of) // point.optimizer_degree
            if len(unit.ranks) > 1:
                yield call_of("all_reduce", PIPELINE_AXIS, len(unit.ranks), MASTER_BYTES * own, "gradients"), 1

    def _messages(self, point: Point, rank: int) -> Iterator[tuple[Collective, int]]:
        sizes = self.costs.messages(point)
        for kind, stage, _, peer in self.schedules.programs(point)[rank]:
            if kind.startswith("SEND"):
                size = sizes[min(stage, peer), max(stage, peer)]
                yield call_of("send", PIPELINE_AXIS, pipe_of(point).ranks, size, "activations"), 1

    def _norm(self, point: Point) -> Iterator[tuple[Collective, int]]:
        layout = point.chain
        if spans_world(point):
            yield from world_norm(point)
            return
        for axis in range(layout.optimizer_states):
            yield call_of("all_reduce", axis_name(axis), layout.sizes[axis], MASTER_BYTES, "grad_norm"), 1
        yield call_of("all_reduce", PIPELINE_AXIS, pipe_of(point).ranks, MASTER_BYTES, "grad_norm"), 1

    def _late(self, point: Point) -> Iterator[tuple[Collective, int]]:
        """The norm and the metrics where nobody waits for them: what every process needs at once is summed among those
        with the same stages, all else over the world."""
        layout = point.chain
        for axis, size in enumerate(layout.sizes):
            yield call_of("all_reduce", axis_name(axis), size, COUNT_BYTES, "metrics"), 1
        for axis in range(0 if spans_world(point) else layout.optimizer_states):
            yield call_of("all_reduce", axis_name(axis), layout.sizes[axis], MASTER_BYTES, "grad_norm"), 1
        yield call_of("all_reduce", "world", point.devices, MASTER_BYTES, "grad_norm"), 1
        for size in (REQUESTS_BYTES, LOSS_BYTES):
            yield call_of("all_reduce", "world", point.devices, size, "metrics"), 1
