"""Bytes alive on the fullest device by phase of the step and category, and bytes at rest: the only place that does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import add

from shardwright.planner.activations import ActivationBytes, Moment
from shardwright.planner.at_rest import at_rest_of
from shardwright.planner.constants import device_budget, device_constants
from shardwright.planner.engines import ENGINES
from shardwright.planner.exchanges import ALONE, Around
from shardwright.planner.groups import Groups, PartName
from shardwright.planner.holdings import Holdings, holdings, last_holdings
from shardwright.planner.model_states import StateBytes, state_bytes
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.parts import parts_of
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.space import Point
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Memory, MemoryPhase, StageMemory
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile

CATEGORIES = (
    "parameters",
    "gathered_parameters",
    "gradients",
    "communication_buffers",
    "optimizer_states",
    "saved_activations",
    "activation_temporaries",
    "head_and_loss",
    "inputs",
    "buffers",
)
"""Of a phase: parameters, gradients and optimizer states as this rank holds them; parameters gathered for compute, with
the gather's buffer; buffers of reductions, and of new values on their way; activations kept for backward; what a
block or the embedding needs while it runs; what head and loss need, logits above all; the batch; the model's own
buffers."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes alive at the worst moment of one phase, by category; zeros are left out."""

    name: str
    bytes: dict[str, int]
    total: int
    recomputes: bool = False
    """Whether it is the backward of a checkpointed block, which more checkpointing does not make smaller."""


class Reservation:
    """What a job's processes take of their devices and hosts for what they allocate."""

    def __init__(self, job: JobSpec, profile: ModelProfile, around: Around = ALONE) -> None:
        self._job, self._profile, self._around = job, profile, around
        self._constants = device_constants(job.cluster.device)

    def reserved(self, allocated: int) -> int:
        """Bytes that the allocator takes from the device for a peak of `allocated` bytes."""
        return round(allocated * (1 + self._constants.fragmentation.value))

    def host_bytes(self, point: Point, allocated: int) -> int:
        """Host memory of one node: every process, with the whole model where each builds it; CPU devices themselves."""
        cluster, around = self._job.cluster, self._around
        process = int(self._constants.host_bytes.value)
        if cluster.device.kind == "cpu":
            process += self.reserved(allocated)
        elif self._profile.init == "constructor":
            whole = around.whole or self._profile
            process += MASTER_BYTES * whole.numel + whole.buffer_bytes
        return process * min(around.per_node or cluster.devices_per_node, point.devices)

    def stage(self, stage: int, phases: Sequence[Phase]) -> StageMemory:
        """The phases of one stage as a plan has them."""
        peak = max(phases, key=lambda phase: phase.total)
        return StageMemory(
            stage=stage,
            phases=tuple(MemoryPhase(name=each.name, bytes=each.bytes, total_bytes=each.total) for each in phases),
            peak_phase=peak.name,
            peak_allocated_bytes=peak.total,
            peak_reserved_bytes=self.reserved(peak.total),
        )


class MemoryModel(Reservation):
    """Memory of every point of one job."""

    def __init__(self, job: JobSpec, profile: ModelProfile, groups: Groups, around: Around = ALONE) -> None:
        super().__init__(job, profile, around)
        self._groups = groups
        whole = None if around.whole is None else Groups(around.whole)
        self._activations: Callable[[ComputeDtypeName, int], ActivationBytes] = lru_cache(maxsize=None)(
            lambda dtype, micro_batch: ActivationBytes.of(profile, dtype, micro_batch)
        )
        self._holdings: Callable[[Point], tuple[Holdings, ...]] = lru_cache(maxsize=10_000)(
            lambda point: holdings(point, groups)
        )
        self._budget = device_budget(job.cluster, job.budget.device_memory)
        self._trained_of: Callable[[PartName], int] = lru_cache(maxsize=None)(
            lambda name: sum(each.numel for each in groups.part(name).profile.parameters if each.trainable)
        )
        self._trainable = sum(each.numel for each in profile.parameters if each.trainable)
        self._states: Callable[[Point], StateBytes] = lru_cache(maxsize=100_000)(
            lambda point: state_bytes(point, groups, job, whole)
        )
        self._floors: Callable[[Point], int] = lru_cache(maxsize=100_000)(self._floor)
        self._held_at_head: Callable[[Point, ComputeDtypeName], list[int]] = lru_cache(maxsize=100_000)(
            self._engine_at_head
        )
        self._alive_at_head: Callable[[ComputeDtypeName, int], list[list[int]]] = lru_cache(maxsize=None)(
            lambda dtype, micro_batch: [
                [moment.saved + moment.temporaries for moment in activations.head_moments(blocks)]
                for activations in (self._activations(dtype, micro_batch),)
                for blocks in range(len(groups.blocks) + 1)
            ]
        )

    def phases(self, point: Point) -> tuple[Phase, ...]:
        """The worst moment of every phase of a step, the start of the run included."""
        fixed, states = self._fixed(point), self._states(_states_of(point))
        at_rest = sum(fixed.values())
        worst: dict[str, tuple[int, Moment, dict[str, int]]] = {}
        activations = self._activations(PRECISIONS[point.precision].compute, point.micro_batch)
        micro_batches = self._holdings(_layout_of(point))
        for moment in activations.moments(point.checkpointed, ends=max(2, len(point.axes) + 1)):
            for engine in micro_batches:
                held = engine.at(moment)
                if held is not None:
                    total = at_rest + moment.saved + moment.temporaries + sum(held.values())
                    if moment.name not in worst or total > worst[moment.name][0]:
                        worst[moment.name] = total, moment, held
        parameters, masters = states.initialise
        initialise = {"parameters": parameters, "optimizer_states": masters, "buffers": fixed["buffers"]}
        sent = [phase_of("publication", fixed | {"communication_buffers": states.publication})]
        return (
            phase_of("initialise", initialise),
            *(
                phase_of(name, fixed | _activations(moment) | held, moment.recomputes)
                for name, (_, moment, held) in worst.items()
            ),
            phase_of("optimizer step", fixed | {"gradients": states.step}),
            *(sent if states.publication else ()),
        )

    def peak(self, point: Point) -> Phase:
        """The largest phase: what `allocated` bytes reach."""
        return max(self.phases(point), key=lambda phase: phase.total)

    def prediction(self, point: Point) -> Memory:
        """The memory section of a plan."""
        stage = self.stage(0, self.phases(point))
        return Memory(
            peak_allocated_bytes=stage.peak_allocated_bytes,
            peak_reserved_bytes=stage.peak_reserved_bytes,
            stages=(stage,),
            at_rest=at_rest_of(point, self._groups, self._job.train, rank=0),
            host_bytes=self.host_bytes(point, stage.peak_allocated_bytes),
        )

    def at_rest_floor(self, point: Point) -> int:
        """Bytes that `peak` is never below, at little cost: the states at rest, and with them either the gradients when
        the optimizer steps, or those that accumulate beside what is gathered at once. Checkpointing makes no difference
        to it."""
        alike = replace(point, micro_batch=0, checkpointed=0, accumulation=min(point.accumulation, 2))
        return self._floors(alike) + self._inputs(point)

    def _floor(self, point: Point) -> int:
        least = self._least_states(point) if ENGINES[point.engine].flat else 0
        if self.reserved(least) > self._budget:
            return least
        states, element = self._states(_states_of(point)), PRECISIONS[point.precision].compute_bytes
        accumulated = MASTER_BYTES * self._trainable // point.gradient_degree if point.accumulation > 1 else 0
        sharded = [part.groups(self._groups).numel for part in parts_of(point) if part.point.shard > 1]
        kept = element * sum(sharded) if point.kept else 0
        gathered = max(states.gathered, kept)
        at_rest = states.parameters + states.optimizer_states + self._profile.buffer_bytes
        return at_rest + max(states.step, gathered + accumulated)

    def fewest_blocks(self, point: Point, budget: int) -> int | None:
        """Blocks that have to be checkpointed for the peak not to exceed `budget` reserved bytes: with fewer, what is
        alive in forward or backward of the head does. With so many the rest of the step may. None where no number
        does."""
        dtype = PRECISIONS[point.precision].compute
        rest, held = sum(self._fixed(point).values()), self._held_at_head(_layout_of(point), dtype)
        for blocks, alive in enumerate(self._alive_at_head(dtype, point.micro_batch)):
            if self.reserved(rest + max(map(add, alive, held), default=0)) <= budget:
                return blocks
        return None

    def _engine_at_head(self, point: Point, dtype: ComputeDtypeName) -> list[int]:
        """What the engine holds at each moment of the head in the last micro-batch."""
        engine = last_holdings(point, self._groups)
        moments = self._activations(dtype, 1).head_moments(0)
        return [sum((engine.at(moment) or {}).values()) for moment in moments]

    def _fixed(self, point: Point) -> dict[str, int]:
        """Alive through every phase of every step but the first."""
        states = self._states(_states_of(point))
        return {
            "parameters": states.parameters,
            "optimizer_states": states.optimizer_states,
            "inputs": self._inputs(point),
            "buffers": self._profile.buffer_bytes,
        }

    def _least_states(self, point: Point) -> int:
        """Of a flat engine, parameters and optimizer states without padding: what rules most layouts out at once."""
        compute = PRECISIONS[point.precision].compute_bytes
        masters = MASTER_BYTES if compute < MASTER_BYTES else 0
        state = OPTIMIZERS[self._job.train.optimizer.name].state_bytes(self._job.train, elements=1, tensors=0)
        found = 0.0
        for part in parts_of(point):
            trained = self._trained_of(part.name)
            found += trained * (compute / part.point.shard + (masters + state) / part.point.optimizer_degree)
        return int(found)

    def _inputs(self, point: Point) -> int:
        return self._profile.input_bytes.at(point.micro_batch) * point.accumulation


def _states_of(point: Point) -> Point:
    """The same for all points that hold the same outside forward and backward."""
    return replace(_layout_of(point), accumulation=1, kept=None, secondary=None, gradient_degree=point.optimizer_degree)


def _layout_of(point: Point) -> Point:
    """The same for all points whose engines hold the same."""
    return replace(point, micro_batch=1, checkpointed=0, accumulation=min(point.accumulation, 3))


def _activations(moment: Moment) -> dict[str, int]:
    unit = "head_and_loss" if moment.name.startswith(("head", "loss")) else "activation_temporaries"
    return {"saved_activations": moment.saved, unit: moment.temporaries}


def phase_of(name: str, held: Mapping[str, int], recomputes: bool = False) -> Phase:
    """A phase with the bytes that it holds of each category."""
    nonzero = {category: held[category] for category in CATEGORIES if held.get(category)}
    return Phase(name, nonzero, sum(nonzero.values()), recomputes)
