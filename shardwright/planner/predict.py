"""Everything that is predicted of one point, from the one memory model and the one time model."""

from __future__ import annotations

from functools import cached_property

from shardwright.planner.collectives import step_collectives
from shardwright.planner.compute import model_flops
from shardwright.planner.constants import device_budget
from shardwright.planner.groups import Groups
from shardwright.planner.memory import MemoryModel, Phase
from shardwright.planner.pipelines.prediction import Pipelines
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.space import Point
from shardwright.planner.timing import Step, TimeModel
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Collective, Prediction
from shardwright.schemas.profile import ModelProfile


class Predictor:
    """Predictions of one job on one profile."""

    def __init__(self, job: JobSpec, profile: ModelProfile) -> None:
        self.job, self.profile = job, profile
        self.groups = Groups(profile)
        self.memory = MemoryModel(job, profile, self.groups)
        self.time = TimeModel(job, profile, self.groups)

    @cached_property
    def device_budget(self) -> int:
        """Bytes that the allocator may reserve on one device."""
        return device_budget(self.job.cluster, self.job.budget.device_memory)

    @cached_property
    def pipelines(self) -> Pipelines:
        """The models of pipelines. Raises ValueError for a model without blocks, which cannot be cut."""
        return Pipelines(self.job, self.profile, self.groups)

    def step(self, point: Point) -> Step:
        """Time of one step, with or without a pipeline."""
        return self.time.step(point) if point.pipe is None else self.pipelines.time.step(point)

    def peak(self, point: Point) -> Phase:
        """The largest phase of the fullest device, with or without a pipeline."""
        return self.memory.peak(point) if point.pipe is None else self.pipelines.memory.peak(point)

    def prediction(self, point: Point) -> Prediction:
        """The plan's prediction of a point."""
        step = self.step(point)
        traits = PRECISIONS[point.precision]
        device = self.job.cluster.device
        flops = model_flops(self.profile, traits.compute, point.micro_batch) * point.accumulation * point.copies
        peak = device.peak[traits.hardware]
        return Prediction(
            step_time_s=step.seconds,
            time=step.parts,
            tokens_per_s=self.job.train.global_batch_sequences * self.profile.sequence_length / step.seconds,
            mfu=flops / (point.world * peak * step.seconds),
            mfu_formula=(
                "FLOPs of forward, input gradients and weight gradients of the traced model, nothing recomputed, of "
                "fused causal attention the unmasked half / (devices x "
                f"{peak / 1e12:g} TFLOP/s {traits.hardware} peak x step time)"
            ),
            model_flops_per_step=float(flops),
            memory=self.memory.prediction(point) if point.pipe is None else self.pipelines.memory.prediction(point),
            collectives=self._collectives(point),
            pipeline=None if point.pipe is None else self.pipelines.prediction(point),
        )

    def _collectives(self, point: Point) -> tuple[Collective, ...]:
        """Of the rank of the pipeline that needs most memory, where there is one."""
        if point.pipe is None:
            return step_collectives(point, self.groups)
        peaks = [phase.total for phase in self.pipelines.memory.peaks(point)]
        return self.pipelines.collectives(point, peaks.index(max(peaks)))
