"""Bytes alive on every rank of a pipeline by phase of the step, and what is left for activations in flight.

It is counted as [Note: memory of a rank] in walk.py has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from shardwright.planner.constants import device_budget
from shardwright.planner.exchanges import ALONE, Around
from shardwright.planner.flat import FlatAtRest
from shardwright.planner.groups import Groups
from shardwright.planner.memory import Phase, Reservation, phase_of
from shardwright.planner.pipelines.costs import WHOLE_BACKWARD, PipelineCosts, pipe_of, recomputed_segments
from shardwright.planner.pipelines.owners import placed, stage_segments, without_schedule
from shardwright.planner.pipelines.schedule import Schedules
from shardwright.planner.pipelines.states import RankStates, optimizer_bytes, rank_states
from shardwright.planner.pipelines.walk import IN_FLIGHT, Walk
from shardwright.planner.pipelines.working import Working, WorkingSets
from shardwright.planner.space import Point
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Memory
from shardwright.schemas.profile import ModelProfile

RECEIVED = 2
"""Messages over each edge that `room` leaves space for, each way; more may wait where a rank is late."""
_NAMES = {
    "F": "forward",
    "I": "input gradient",
    "W": "weight gradient",
    "B": "backward",
    "REDUCE": "gradient reduction",
}


class PipelineMemory(Reservation):
    """Memory of every pipeline of one job."""

    def __init__(
        self,
        job: JobSpec,
        profile: ModelProfile,
        groups: Groups,
        costs: PipelineCosts,
        schedules: Schedules,
        around: Around = ALONE,
    ) -> None:
        super().__init__(job, profile, around)
        self._costs, self._schedules = costs, schedules
        self._budget = device_budget(job.cluster, job.budget.device_memory)
        self._working_sets = WorkingSets(profile, groups)
        whole = None if around.whole is None else Groups(around.whole)
        self._states: Callable[[Point, int], RankStates] = lru_cache(maxsize=100_000)(
            lambda point, rank: rank_states(point, rank, job, costs.owners, groups, whole)
        )
        self._working: Callable[[Point, int, bool], dict[int, Working]] = lru_cache(maxsize=100_000)(
            self._working_of_rank
        )
        self._walked: Callable[[Point, int], tuple[Phase, ...]] = lru_cache(maxsize=4096)(self._phases)

    # --- what is asked ----------------------------------------------------------------------------------------------

    def phases(self, point: Point, rank: int) -> tuple[Phase, ...]:
        """The worst moment of every phase of a step of one rank of the pipeline, the start of the run included. Raises
        InputError where the point's schedule cannot be made."""
        return self._walked(point, rank)

    def peaks(self, point: Point) -> tuple[Phase, ...]:
        """The largest phase of every rank."""
        ranks = range(pipe_of(point).ranks)
        return tuple(max(self.phases(point, rank), key=lambda phase: phase.total) for rank in ranks)

    def peak(self, point: Point) -> Phase:
        """That of the fullest rank."""
        return max(self.peaks(point), key=lambda phase: phase.total)

    def kept(self, point: Point) -> tuple[int, ...]:
        """Of every rank what a late step keeps until the first backward of the next one, gradients included."""
        return tuple(sum(_kept(self._states(_states_of(point), rank)).values()) for rank in range(pipe_of(point).ranks))

    def at_rest(self, point: Point, rank: int) -> FlatAtRest:
        """The states of the fullest of the processes that have this rank's stages, after the optimizer's step."""
        return self._states(_states_of(point), rank).at_rest

    def room(self, point: Point, rank: int) -> int:
        """Bytes of the device budget that are left for the activations of micro-batches in flight, as `Costs` counts
        them, whatever the schedule; below 0 where not even the rest fits. With all gradients and all gathered
        parameters of the rank there at once, and RECEIVED messages waiting over each edge."""
        states, pipe = self._states(_states_of(point), rank), pipe_of(point)
        working = self._working(_working_of(point), rank, pipe.schedule not in WHOLE_BACKWARD)
        sizes = states.sizes
        written = max(sizes.gradients, default=0) if point.axes else 0
        needs = max(max(each.forward, each.backward, each.weight).bytes for each in working.values())
        rest = (
            sum(states.fixed.values())
            + sizes.gathered
            + max(
                sum(sizes.gradients) + (sizes.reduced if point.accumulation > 1 else 0) + written,
                sum(_kept(states).values()),
            )
            + needs
            + self._messages_at_most(point, rank)
        )
        allocated = int(self._budget / (1 + self._constants.fragmentation.value))
        floor = max(sum(states.initialise), sum(states.fixed.values()) + states.kept + states.publication)
        return min(allocated - rest, -1) if floor > allocated else allocated - rest

    def prediction(self, point: Point) -> Memory:
        """The memory section of a plan, with a stage for each rank."""
        stages = tuple(self.stage(rank, self.phases(point, rank)) for rank in range(pipe_of(point).ranks))
        fullest = max(stages, key=lambda stage: stage.peak_allocated_bytes)
        held = self.at_rest(point, fullest.stage)
        return Memory(
            peak_allocated_bytes=fullest.peak_allocated_bytes,
            peak_reserved_bytes=fullest.peak_reserved_bytes,
            stages=stages,
            at_rest={
                "parameters": held.parameters,
                "gradients": held.gradients,
                "optimizer_states": optimizer_bytes(self._job.train, held),
            },
            host_bytes=self.host_bytes(point, fullest.peak_allocated_bytes),
        )

    def at_rest_floor(self, point: Point) -> int:
        """Bytes that the fullest rank's peak is never below, at little cost: states at rest with whole gradients, and
        the activations of one micro-batch."""
        ranks = range(pipe_of(point).ranks)
        costs = self._costs.exact(point)
        return max(
            sum(states.fixed.values())
            + max(states.at_rest.gradients, *(round(costs.activations[stage]) for stage in states.sizes.of_stage))
            for states in (self._states(_states_of(point), rank) for rank in ranks)
        )

    # --- the parts ----------------------------------------------------------------------------------------------------

    def _working_of_rank(self, point: Point, rank: int, splits: bool) -> dict[int, Working]:
        pipe, blocks = pipe_of(point), self._costs.blocks
        units, sizes = self._costs.owners.units(pipe, rank), self._states(_states_of(point), rank).sizes
        made = {}
        for chunk in range(pipe.chunks):
            stage = pipe.layout.stage(rank, chunk)
            own = stage_segments(pipe, stage, blocks)
            buffers: dict[int, int] = {}
            for unit, size in zip(units, sizes.gradients, strict=True):
                if stage in unit.stages:
                    # What lies outside the blocks belongs to the embedding, or to what backward begins with.
                    at = unit.block + 1 if unit.block >= 0 else 0 if stage == 0 else own[-1]
                    buffers[at] = buffers.get(at, 0) + size
            made[stage] = self._working_sets.of(
                self._costs.segments(point.precision, point.micro_batch),
                own,
                recomputed_segments(pipe, stage, blocks),
                precision=point.precision,
                micro_batch=point.micro_batch,
                splits=splits,
                buffers=buffers,
            )
        return made

    def _messages_at_most(self, point: Point, rank: int) -> int:
        layout, messages = pipe_of(point).layout, self._costs.messages(point)
        sizes = [
            size
            for (source, target), size in messages.items()
            if rank in (layout.place(source)[0], layout.place(target)[0])
        ]
        return RECEIVED * sum(sizes) + IN_FLIGHT * max(sizes, default=0)

    # --- a step -----------------------------------------------------------------------------------------------------

    def _phases(self, point: Point, rank: int) -> tuple[Phase, ...]:
        states, pipe = self._states(_states_of(point), rank), pipe_of(point)
        walk = Walk(
            point,
            states.sizes,
            self._working(_working_of(point), rank, pipe.schedule not in WHOLE_BACKWARD),
            self._costs.exact(point),
            self._costs.messages(point),
            self._schedules.programs(point)[rank],
            _kept(states),
        )
        fixed = states.fixed
        parameters, masters = states.initialise
        stepping = fixed | {"optimizer_states": fixed["optimizer_states"] + states.kept}
        sent = [phase_of("publication", stepping | {"communication_buffers": states.publication})]
        return (
            phase_of(
                "initialise", {"parameters": parameters, "optimizer_states": masters, "buffers": fixed["buffers"]}
            ),
            *(
                phase_of(_NAMES[kind], Counter(fixed) + Counter(held), recomputes)
                for kind, (_, held, recomputes) in walk.run().items()
            ),
            phase_of("optimizer step", stepping | {"gradients": states.at_rest.gradients}),
            *(sent if states.publication else ()),
        )


def _kept(states: RankStates) -> dict[str, int]:
    """What a late step keeps until the first backward of the next one; nothing where no step is done again."""
    return {"optimizer_states": states.kept, "gradients": states.at_rest.gradients} if states.kept else {}


def _states_of(point: Point) -> Point:
    """The same for all points of which a rank has the same states."""
    return replace(point, pipe=placed(pipe_of(point)), kept=None, secondary=None)


def _working_of(point: Point) -> Point:
    """The same for all points whose actions need the same."""
    return replace(point, pipe=without_schedule(pipe_of(point)))
