"""Everything that is predicted of one point, from the one memory model and the one time model."""

from __future__ import annotations

from functools import cached_property

from shardwright.planner.collectives import step_collectives
from shardwright.planner.compute import model_flops
from shardwright.planner.constants import device_budget
from shardwright.planner.divided import divided
from shardwright.planner.exchanges import ALONE, Around
from shardwright.planner.groups import Groups
from shardwright.planner.memory import MemoryModel, Phase
from shardwright.planner.parallel import WHOLE, Parallel
from shardwright.planner.pipelines.prediction import Pipelines
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.space import Point, exchange_links, exchange_size, spanned_levels
from shardwright.planner.timing import Step, TimeModel
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Collective, Prediction
from shardwright.schemas.profile import ModelProfile, ParallelAxis

_AXES: tuple[ParallelAxis, ...] = ("tp", "cp", "ep")


class Predictor:
    """Predictions of one job on one profile.

    Its models are of processes that have whole layers, sequences and expert stacks; for points that share these it
    hands on to a predictor of their own, of the job and the profile as one such process sees them ([Note: divided
    jobs]).
    """

    def __init__(self, job: JobSpec, profile: ModelProfile, around: Around = ALONE, parallel: Parallel = WHOLE) -> None:
        """The last two: of a divided job, what it was divided from, and how."""
        self.job, self.profile, self.parallel, self._around = job, profile, parallel, around
        self.groups = Groups(profile)
        self.memory = MemoryModel(job, profile, self.groups, around)
        self.time = TimeModel(job, profile, self.groups, around)
        self._divided: dict[Parallel, Predictor] = {parallel: self}

    def of(self, parallel: Parallel) -> Predictor:
        """That of the points which share a copy of the model this way."""
        if parallel not in self._divided:
            around = around_of(self.job, self.profile, parallel)
            self._divided[parallel] = Predictor(*divided(self.job, self.profile, parallel), around, parallel)
        return self._divided[parallel]

    def of_rank(self, parallel: Parallel, tensor_rank: int) -> Predictor:
        """The same, for one of the processes that share each layer: the last ones may have fewer rows of a vocabulary.
        What it says of seconds and peaks is of the fullest one all the same."""
        own = self.of(parallel)
        job, profile = divided(self.job, self.profile, parallel, tensor_rank)
        if profile.parameters == own.profile.parameters:
            return own
        return Predictor(job, profile, around_of(self.job, self.profile, parallel), parallel)

    @cached_property
    def device_budget(self) -> int:
        """Bytes that the allocator may reserve on one device."""
        return device_budget(self.job.cluster, self.job.budget.device_memory)

    @cached_property
    def pipelines(self) -> Pipelines:
        """The models of pipelines. Raises ValueError for a model without blocks, which cannot be cut."""
        return Pipelines(self.job, self.profile, self.groups, self._around)

    def step(self, point: Point) -> Step:
        """Time of one step, with or without a pipeline."""
        own = self.of(point.parallel)
        return own.time.step(point) if point.pipe is None else own.pipelines.time.step(point)

    def peak(self, point: Point) -> Phase:
        """The largest phase of the fullest device, with or without a pipeline."""
        own = self.of(point.parallel)
        return own.memory.peak(point) if point.pipe is None else own.pipelines.memory.peak(point)

    def prediction(self, point: Point) -> Prediction:
        """The plan's prediction of a point. Work and tokens are those of the whole model on all devices."""
        step, own = self.step(point), self.of(point.parallel)
        traits = PRECISIONS[point.precision]
        device = self.job.cluster.device
        rounds = point.accumulation * point.copies // point.parallel.cp
        flops = model_flops(self.profile, traits.compute, point.micro_batch) * rounds
        peak = device.peak[traits.hardware]
        return Prediction(
            step_time_s=step.seconds,
            time=step.parts,
            tokens_per_s=self.job.train.global_batch_sequences * self.profile.sequence_length / step.seconds,
            mfu=flops / (point.devices * peak * step.seconds),
            mfu_formula=(
                "FLOPs of forward, input gradients and weight gradients of the traced model, nothing recomputed, of "
                "fused causal attention the unmasked half / (devices x "
                f"{peak / 1e12:g} TFLOP/s {traits.hardware} peak x step time)"
            ),
            model_flops_per_step=float(flops),
            memory=own.memory.prediction(point) if point.pipe is None else own.pipelines.memory.prediction(point),
            collectives=own.collectives(point),
            pipeline=None if point.pipe is None else own.pipelines.prediction(point),
        )

    def collectives(self, point: Point) -> tuple[Collective, ...]:
        """Of the rank of the pipeline that needs most memory, where there is one."""
        if point.pipe is None:
            return step_collectives(point, self.groups)
        peaks = [phase.total for phase in self.pipelines.memory.peaks(point)]
        return self.pipelines.collectives(point, peaks.index(max(peaks)))


def around_of(job: JobSpec, profile: ModelProfile, parallel: Parallel) -> Around:
    """What a divided job and profile were divided from."""
    cluster = job.cluster
    return Around(
        links={axis: exchange_links(cluster, parallel, axis) for axis in _AXES if exchange_size(parallel, axis) > 1},
        world=spanned_levels(cluster, 1, cluster.world_size),
        whole=profile,
        per_node=cluster.devices_per_node,
        ring=parallel.method == "ring",
    )
