"""Everything that is predicted of one point, from the one memory model and the one time model."""

from __future__ import annotations

from functools import cached_property

from shardwright.planner.collectives import step_collectives
from shardwright.planner.compute import model_flops
from shardwright.planner.constants import device_budget
from shardwright.planner.groups import Groups
from shardwright.planner.memory import MemoryModel
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.space import Point
from shardwright.planner.timing import TimeModel
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Prediction
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

    def prediction(self, point: Point) -> Prediction:
        """The plan's prediction of a point."""
        step = self.time.step(point)
        traits = PRECISIONS[point.precision]
        device = self.job.cluster.device
        flops = model_flops(self.profile, traits.compute, point.micro_batch) * point.accumulation * point.world
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
            memory=self.memory.prediction(point),
            collectives=step_collectives(point, self.groups),
        )
