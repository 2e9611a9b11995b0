"""Seconds of a step of a pipeline, and their parts.

The parts are those of the rank that is longest at work; what it spends neither working nor waiting for collectives is
the pipeline's bubble, and what the others take longer to end.

[Note: late steps in time]
Where steps are late, no rank waits for the others to end theirs, and a step takes as long as one iteration ends after
the one before (`steady_period`), what the busiest rank waits for collectives, and its own update; unless tied gradients
are summed, for which ranks wait. That is with no gradient clipped: how often they are is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from shardwright.planner.collectives import COUNTS_BYTES, LOSS_BYTES
from shardwright.planner.compute import KINDS, memory_rate
from shardwright.planner.constants import device_constants
from shardwright.planner.exchanges import ALONE, Around
from shardwright.planner.flat import trained_elements
from shardwright.planner.flat_timing import FlatTime, joined
from shardwright.planner.groups import Groups
from shardwright.planner.network import CollectiveKind, Links, collective_seconds
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.parts import Part, parts_of, spans_world
from shardwright.planner.pipelines.costs import PipelineCosts, pipe_of, recomputed_segments
from shardwright.planner.pipelines.owners import stage_segments
from shardwright.planner.pipelines.run import PipelineRun, RankLoad
from shardwright.planner.pipelines.schedule import Made, Schedules
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.schedules.bounds import lower_bound
from shardwright.planner.schedules.problem import TOLERANCE
from shardwright.planner.schedules.simulator import rank_work, steady_period
from shardwright.planner.space import Point, axis_links, spanned_levels
from shardwright.planner.timing import Step, exchange_parts, load_seconds, times, world_links
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import TimePart


class PipelineTime:
    """Step time of every pipeline of one job."""

    def __init__(
        self, job: JobSpec, groups: Groups, costs: PipelineCosts, schedules: Schedules, around: Around = ALONE
    ) -> None:
        self._job, self._costs, self._schedules, self._around = job, costs, schedules, around
        self._constants = device_constants(job.cluster.device)
        self._rate = memory_rate(job.cluster.device)
        self._flat = FlatTime(job.cluster, groups)
        self._bounds: Callable[[Point], float] = lru_cache(maxsize=100_000)(self._shortest)
        self._steps: Callable[[Point], Step] = lru_cache(maxsize=4096)(self._step)
        self._periods: Callable[[Point], float] = lru_cache(maxsize=4096)(self._period)

    def schedule(self, point: Point) -> Made:
        """Layout, costs, timetable and simulation of a point. Raises InputError where its family has no schedule."""
        return self._schedules.made(point)

    def step(self, point: Point) -> Step:
        """Predict one step ([Note: a pipeline in time]). Raises InputError as `schedule` does."""
        return self._steps(point)

    def least(self, point: Point) -> float:
        """A lower bound of the step, whatever its schedule: what no schedule of these stages is shorter than, however
        much memory it may take, and what follows the pipeline."""
        return self._bounds(point) + sum(seconds for _, seconds, _ in self._tail(point))

    def shortest(self, point: Point) -> float:
        """Of that, what no schedule of these stages is shorter than."""
        return self._bounds(point)

    def period(self, point: Point) -> float:
        """From one iteration to the next, without collectives and what follows it: the makespan, unless steps are late
        ([Note: late steps in time])."""
        return self._periods(point)

    def _period(self, point: Point) -> float:
        pipe, made = pipe_of(point), self.schedule(point)
        tied = any(len(unit.ranks) > 1 for rank in range(pipe.ranks) for unit in self._costs.owners.units(pipe, rank))
        if tied or not pipe.late_step:
            return made.simulation.makespan
        return steady_period(made.timetable, made.layout, made.costs)

    def _shortest(self, point: Point) -> float:
        layout, costs = pipe_of(point).layout, self._costs.costs(point)
        return lower_bound(layout, costs, point.accumulation, None) * (1 - TOLERANCE)

    def _step(self, point: Point) -> Step:
        pipe, made = pipe_of(point), self.schedule(point)
        work = rank_work(made.costs, pipe.layout, point.accumulation)
        busiest = work.index(max(work))
        run = PipelineRun(
            self._schedules.programs(point),
            made.costs,
            {edge: self._costs.send_seconds(point, edge) for edge in self._costs.edges(point)},
            [self._communications(point, rank) for rank in range(pipe.ranks)],
            wires=len(self._job.cluster.levels),
        )
        ranks = run.run()
        end, mine = max(rank.clock for rank in ranks), ranks[busiest]
        bubble = end - mine.busy - mine.gather_stall - mine.reduce_stall
        if pipe.late_step:
            bubble = min(bubble, self.period(point) - work[busiest])
        waits = [
            ("exposed gathers", mine.gather_stall, "compute waits for parameters"),
            ("exposed reductions", mine.reduce_stall, "compute waits for gradients to be reduced"),
            ("pipeline bubble", bubble, "waits for other stages"),
            *self._tail(point),
        ]
        extra = mine.busy - work[busiest]
        parts = (
            *self._compute_parts(point, busiest, extra),
            *(TimePart(name=name, seconds=seconds, note=note) for name, seconds, note in waits),
        )
        kept = tuple(part for part in parts if part.seconds > 0)
        return Step(sum(part.seconds for part in kept), kept)

    def _compute_parts(self, point: Point, rank: int, copies: float) -> list[TimePart]:
        """Compute of one rank by pass and kind of operator; `copies` are seconds of copies beyond those in W."""
        pipe, of, count = pipe_of(point), self._costs.segments(point.precision, point.micro_batch), self._costs.blocks
        stages = [pipe.layout.stage(rank, chunk) for chunk in range(pipe.chunks)]
        own = [segment for stage in stages for segment in stage_segments(pipe, stage, count)]
        passes = {
            "forward": [of.forward[segment] for segment in own],
            "backward": [works[segment] for works in (of.input_gradient, of.weight_gradient) for segment in own],
        }
        parts = []
        for name, works in passes.items():
            for index, kind in enumerate(KINDS):
                seconds = point.accumulation * sum(work.kinds[index] for work in works)
                parts.append(TimePart(name=f"{name} {kind}", seconds=seconds))
            launch = point.accumulation * sum(work.launch for work in works)
            parts.append(TimePart(name=f"{name} launch", seconds=launch, note="kernels wait for the host"))
        repeated = [segment for stage in stages for segment in recomputed_segments(pipe, stage, count)]
        again = sum(of.recompute[segment] - sum(of.exchanged_again[segment]) for segment in repeated)
        exchanged = [
            *(work.exchanges for works in passes.values() for work in works),
            *(of.exchanged_again[segment] for segment in repeated),
        ]
        copied = point.accumulation * sum(self._costs.gradient_copies(point, stage) for stage in stages) + copies
        return [
            *parts,
            TimePart(
                name="recompute", seconds=point.accumulation * again, note="forward of checkpointed blocks, again"
            ),
            TimePart(
                name="parameter and gradient copies", seconds=copied, note="in and out of the collectives' buffers"
            ),
            *exchange_parts(times(point.accumulation, seconds) for seconds in exchanged),
        ]

    def _communications(self, point: Point, rank: int) -> RankLoad:
        units = self._costs.owners.units(pipe_of(point), rank)
        made = [
            [
                self._flat.communication(part, of, point.axes)
                for of in self._costs.owners.flat(pipe_of(point), rank, part)
            ]
            for part in parts_of(point)
        ]
        return RankLoad(
            [joined(of_unit) for of_unit in zip(*made, strict=True)],
            [unit.stages for unit in units],
            adds=point.gradient_degree > 1,
        )

    # --- what follows the pipeline ----------------------------------------------------------------------------------

    def _tail(self, point: Point) -> list[tuple[str, float, str]]:
        pipe = pipe_of(point)
        own = max(self._own(point, rank) for rank in range(pipe.ranks))
        compute = PRECISIONS[point.precision].compute_bytes
        traffic = OPTIMIZERS[self._job.train.optimizer.name].traffic_bytes(self._job.train)
        traffic += MASTER_BYTES + compute if compute < MASTER_BYTES else 0
        waits = "read and reduced, not waited for" if pipe.late_step else "read, reduced, and the gradients scaled"
        return [
            ("tied gradients", self._ties(point), "summed over the ranks that have a copy"),
            ("gradient norm", self._norm(point, own), waits),
            ("copies of a late step", self._copies(point, own), "to step again if gradients have to be clipped"),
            ("optimizer", traffic * own / self._rate, "memory traffic of the update"),
            ("metrics", self._metrics(point), "two small all-reduces" if not pipe.late_step else "learnt targets"),
            ("host overhead", self._constants.step_overhead.value, "batches, logging, synchronisation"),
        ]

    def _own(self, point: Point, rank: int) -> int:
        """Elements that the optimizer of one process works on, padding included."""
        return sum(self._own_of(part, rank) for part in parts_of(point))

    def _own_of(self, part: Part, rank: int) -> int:
        units = self._costs.owners.flat(pipe_of(part.point), rank, part)
        return sum(map(trained_elements, units)) // part.point.optimizer_degree

    def _ties(self, point: Point) -> float:
        """One all-reduce of a process's part of the gradients for every set of ranks that have parameters in common,
        none of them experts, at most as many of them one after the other as a rank takes part in."""
        pipe, slowest = pipe_of(point), 0.0
        for rank in range(pipe.ranks):
            units = self._costs.owners.units(pipe, rank)
            buckets = self._costs.owners.flat(pipe, rank, parts_of(point)[0])
            seconds = 0.0
            for unit, of in zip(units, buckets, strict=True):
                if len(unit.ranks) > 1:
                    own = trained_elements(of) // point.optimizer_degree
                    seconds += self._seconds("all_reduce", self._over(point, len(unit.ranks)), MASTER_BYTES * own)
            slowest = max(slowest, seconds)
        return slowest

    def _over(self, point: Point, ranks: int) -> Links:
        """The slowest level that the pipeline spans, joining so many ranks."""
        levels = spanned_levels(self._job.cluster, point.copies, pipe_of(point).ranks)
        return ((levels[-1][0], ranks),) if levels else ()

    def _norm(self, point: Point, own: int) -> float:
        late = pipe_of(point).late_step
        scales = self._job.train.optimizer.clip_grad_norm is not None and not late
        axes: list[Links] = [
            *axis_links(self._job.cluster, point.axes)[: point.chain.optimizer_states],
            *([] if late else [spanned_levels(self._job.cluster, point.copies, pipe_of(point).ranks)]),
        ]
        if spans_world(point):  # of a late step nobody waits for it
            axes = [] if late else [world_links(self._job.cluster, point, self._around)]
        sums = sum(self._seconds("all_reduce", links, MASTER_BYTES) for links in axes)
        return MASTER_BYTES * own * (3 if scales else 1) / self._rate + sums

    def _copies(self, point: Point, own: int) -> float:
        """What is kept, read and written once."""
        train = self._job.train
        if not pipe_of(point).late_step or train.optimizer.clip_grad_norm is None:
            return 0.0
        kept = MASTER_BYTES * own + OPTIMIZERS[train.optimizer.name].state_bytes(train, own, 0)
        return 2 * kept / self._rate

    def _metrics(self, point: Point) -> float:
        load = load_seconds(point, self._costs.owners.profile, self._around, self._constants.links.value)
        return self._sums(point) + load

    def _sums(self, point: Point) -> float:
        if pipe_of(point).late_step:  # learnt targets, among those that have the same stages
            axes = axis_links(self._job.cluster, point.axes)
            return sum(self._seconds("all_reduce", links, LOSS_BYTES) for links in axes)
        world = world_links(self._job.cluster, point, self._around)
        return sum(self._seconds("all_reduce", world, size) for size in (COUNTS_BYTES, LOSS_BYTES))

    def _seconds(self, kind: CollectiveKind, links: Links, size: int) -> float:
        return collective_seconds(kind, links, size, self._constants.links.value)
