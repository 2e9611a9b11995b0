"""Bytes alive on the fullest device by phase of the step and category, and bytes at rest: the only place that does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from shardwright.planner.activations import ActivationBytes, Moment
from shardwright.planner.constants import device_constants
from shardwright.planner.engines import ENGINES
from shardwright.planner.groups import Groups
from shardwright.planner.holdings import Holdings, holdings
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.sharding import at_rest_bytes
from shardwright.planner.space import Point, decide
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
the gather's buffer; buffers of reductions; activations kept for backward; what a block or the embedding needs while it
runs; what head and loss need, logits above all; the batch; the model's own buffers."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes alive at the worst moment of one phase, by category; zeros are left out."""

    name: str
    bytes: dict[str, int]
    total: int
    recomputes: bool = False
    """Whether it is the backward of a checkpointed block, which more checkpointing does not make smaller."""


class MemoryModel:
    """Memory of every point of one job."""

    def __init__(self, job: JobSpec, profile: ModelProfile, groups: Groups) -> None:
        self._job, self._profile, self._groups = job, profile, groups
        self._constants = device_constants(job.cluster.device)
        self._optimizer = OPTIMIZERS[job.train.optimizer.name]
        self._activations: Callable[[ComputeDtypeName, int], ActivationBytes] = lru_cache(maxsize=None)(
            lambda dtype, micro_batch: ActivationBytes.of(profile, dtype, micro_batch)
        )
        self._holdings: Callable[[Point], tuple[Holdings, ...]] = lru_cache(maxsize=None)(
            lambda point: holdings(point, groups)
        )

    def phases(self, point: Point) -> tuple[Phase, ...]:
        """The worst moment of every phase of a step, the start of the run included."""
        fixed = self._fixed(point)
        micro_batches = self._holdings(replace(point, checkpointed=0))
        activations = self._activations(PRECISIONS[point.precision].compute, point.micro_batch)
        worst: dict[str, Phase] = {}
        for moment, engine in product(activations.moments(point.checkpointed), micro_batches):
            held = engine.at(moment)
            if held is None:
                continue
            phase = _phase(moment.name, fixed | _activations(moment) | held, moment.recomputes)
            if moment.name not in worst or phase.total > worst[moment.name].total:
                worst[moment.name] = phase
        return (self._initialise(point, fixed), *worst.values(), self._step(point, fixed))

    def peak(self, point: Point) -> Phase:
        """The largest phase: what `allocated` bytes reach."""
        return max(self.phases(point), key=lambda phase: phase.total)

    def reserved(self, allocated: int) -> int:
        """Bytes that the allocator takes from the device for a peak of `allocated` bytes."""
        return round(allocated * (1 + self._constants.fragmentation.value))

    def host_bytes(self, point: Point, allocated: int) -> int:
        """Host memory of one node: every process, with the whole model where each builds it; CPU devices themselves."""
        cluster = self._job.cluster
        process = int(self._constants.host_bytes.value)
        if cluster.device.kind == "cpu":
            process += self.reserved(allocated)
        elif self._profile.init == "constructor":
            process += MASTER_BYTES * self._profile.numel + self._profile.buffer_bytes
        return process * min(cluster.devices_per_node, point.world)

    def prediction(self, point: Point) -> Memory:
        """The memory section of a plan."""
        phases = self.phases(point)
        peak = max(phases, key=lambda phase: phase.total)
        stage = StageMemory(
            stage=0,
            phases=tuple(MemoryPhase(name=each.name, bytes=each.bytes, total_bytes=each.total) for each in phases),
            peak_phase=peak.name,
            peak_allocated_bytes=peak.total,
            peak_reserved_bytes=self.reserved(peak.total),
        )
        decision = decide(point, self._job.cluster, len(self._groups.blocks))
        return Memory(
            peak_allocated_bytes=stage.peak_allocated_bytes,
            peak_reserved_bytes=stage.peak_reserved_bytes,
            stages=(stage,),
            at_rest=at_rest_bytes(decision, self._profile.parameters, self._job.train.optimizer, rank=0),
            host_bytes=self.host_bytes(point, peak.total),
        )

    def _fixed(self, point: Point) -> dict[str, int]:
        """Alive through every phase of every step but the first."""
        sizes = self._groups.sizes(point.shard)
        return {
            "parameters": MASTER_BYTES * (sum(sizes.blocks) + sizes.root) // point.shard,
            "optimizer_states": self._optimizer.state_bytes(self._job.train.optimizer, sizes.own, sizes.tensors),
            "inputs": self._profile.input_bytes.at(point.micro_batch) * point.accumulation,
            "buffers": self._profile.buffer_bytes,
        }

    def _initialise(self, point: Point, fixed: dict[str, int]) -> Phase:
        """The shards, and the largest group while it is whole; on CPU devices all of a constructor's model is."""
        whole = 0
        if ENGINES[point.engine].shards:
            everything = self._profile.init == "constructor" and self._job.cluster.device.kind == "cpu"
            whole = MASTER_BYTES * (self._profile.numel if everything else self._groups.largest)
        return _phase("initialise", {"parameters": fixed["parameters"] + whole, "buffers": fixed["buffers"]})

    def _step(self, point: Point, fixed: dict[str, int]) -> Phase:
        """Everything at rest, and the gradients twice where a foreach implementation copies them."""
        sizes = self._groups.sizes(point.shard)
        gradients = MASTER_BYTES * (sum(sizes.block_gradients) + sizes.root_gradients) // point.shard
        foreach = ENGINES[point.engine].dtensors and not self._optimizer.fused_on_dtensors
        copied = foreach and self._optimizer.foreach_copies_gradients(self._job.train.optimizer)
        return _phase("optimizer step", fixed | {"gradients": gradients * (2 if copied else 1)})


def _activations(moment: Moment) -> dict[str, int]:
    unit = "head_and_loss" if moment.name.startswith(("head", "loss")) else "activation_temporaries"
    return {"saved_activations": moment.saved, unit: moment.temporaries}


def _phase(name: str, held: dict[str, int], recomputes: bool = False) -> Phase:
    nonzero = {category: held[category] for category in CATEGORIES if held.get(category)}
    return Phase(name, nonzero, sum(nonzero.values()), recomputes)
