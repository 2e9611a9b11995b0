"""From a plan for a cluster to jobs that this machine can run: the same decision, smaller.

Nothing is left for the planner to choose: every decision is pinned to what the plan says, shrunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shardwright.planner.engines import ENGINES
from shardwright.planner.parallel import Parallel
from shardwright.planner.predict import Predictor
from shardwright.planner.space import TENSOR_AXIS, block_count, decide, point_of
from shardwright.rehearse.report_types import Change
from shardwright.rehearse.shrink_mesh import SmallMesh, shrink_mesh
from shardwright.rehearse.shrink_model import BLOCKS, SMALL_VOCABULARY, shrink_model
from shardwright.rehearse.shrink_pipeline import SmallPipeline, shrink_pipeline, staged
from shardwright.schemas.cluster import ClusterSpec, DeviceSpec
from shardwright.schemas.job import (
    DataSpec,
    JobSpec,
    OptimizerSpec,
    StatesSpec,
    StrategySpec,
    SyntheticSpec,
    TensorParallelSpec,
    TrainSpec,
)
from shardwright.schemas.job_files import expand
from shardwright.schemas.plan import Checkpointing, Communication, Decision, Plan
from shardwright.schemas.units import Amount

_SEQUENCE_LENGTH = 64
_MICRO_BATCH = 2
_ACCUMULATION = 3
"""A first micro-batch, a last one and one between: the flags of accumulation treat these differently."""

_PROCESS = DeviceSpec.model_validate(
    {
        "name": "cpu-process",
        "kind": "cpu",
        "memory": "1024TiB",
        "peak": {"fp32": "100GFLOP/s", "bf16": "100GFLOP/s"},
        "memory_bandwidth": "10GB/s",
        "source": "stands for whatever this machine is; the times predicted for a rehearsal mean nothing",
    }
)
"""More memory than there is, so that the limit never decides what is rehearsed."""

Precision = Literal["fp32", "bf16_mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallJob:
    """What is rehearsed: the job without its decisions, and the sizes that they take."""

    job: JobSpec
    """With every decision `auto`, for the model to be profiled."""
    mesh: SmallMesh
    micro_batch: int
    accumulation: int
    pipeline: SmallPipeline | None
    changes: tuple[Change, ...]


def shrink(plan: Plan, folder: Path, *, processes: int, steps: int) -> SmallJob:
    """Shrink a plan to at most `processes` processes. `folder`: where relative paths of the job start.

    Raises InputError if the model's configuration cannot be read.
    """
    job, decision = plan.job, plan.decision
    mesh = shrink_mesh(decision, job.cluster, processes)
    micro_batch = min(decision.micro_batch, _MICRO_BATCH)
    pipeline = shrink_pipeline(plan, mesh.ranks)
    accumulation = min(decision.accumulation, _ACCUMULATION) if pipeline is None else pipeline.micro_batches
    data, vocabulary, data_changes = _small_data(job.data, folder)
    model, model_changes = shrink_model(
        job.model,
        folder,
        vocabulary,
        max(BLOCKS, 0 if pipeline is None else sum(pipeline.blocks)),
        small_parallel(decision, mesh).tp * small_parallel(decision, mesh).cp,
    )
    parallel = small_parallel(decision, mesh)
    train = _small_train(job, steps, mesh.copies // parallel.cp * micro_batch * accumulation)
    cluster = _small_cluster(job.cluster, mesh)
    small = JobSpec(
        model=model.model_copy(update={"init": plan.model.init}),
        data=data,
        train=train,
        cluster=cluster,
        quality=job.quality,
        strategy=StrategySpec(tensor_parallel=TensorParallelSpec(overrides=job.strategy.tensor_parallel.overrides)),
    )
    sizes: list[tuple[str, Any, Any]] = [
        *_layout_changes(decision, mesh),
        *_second_change(decision, mesh),
        ("decision.context_parallel.degree", decision.context_parallel.degree, parallel.cp),
        ("decision.expert_parallel.degree", decision.expert_parallel.degree, parallel.ep),
        ("decision.micro_batch", decision.micro_batch, micro_batch),
        ("decision.accumulation", decision.accumulation, accumulation),
        ("train.sequence_length", job.train.sequence_length, train.sequence_length),
        ("train.steps", job.train.total_steps, steps),
        ("train.schedule.warmup", job.train.schedule.warmup, train.schedule.warmup),
        ("cluster.device", job.cluster.device.name, _PROCESS.name),
    ]
    changed = [Change(key=key, before=str(old), after=str(new)) for key, old, new in sizes if old != new]
    return SmallJob(
        job=small,
        mesh=mesh,
        micro_batch=micro_batch,
        accumulation=accumulation,
        pipeline=pipeline,
        changes=(*changed, *model_changes, *data_changes),
    )


def pinned(small: SmallJob, decision: Decision, optimizer: OptimizerSpec, precision: Precision, blocks: int) -> JobSpec:
    """The job whose only plan is `decision`, shrunk, but for its mesh (`exactly`). `blocks`: how many repeated blocks
    the small model has."""
    states, freed = decision.states, decision.engine.reshard_after_forward
    pipe = None if small.pipeline is None else small.pipeline.pipe
    parallel, own = small_parallel(decision, small.mesh), small.job.strategy.tensor_parallel
    strategy = StrategySpec(
        tp=(parallel.tp,),
        tensor_parallel=own.model_copy(update={"sequence": (parallel.sequence,) if parallel.tp > 1 else "auto"}),
        cp=(parallel.cp,),
        context_method="auto" if parallel.method == "none" else (parallel.method,),
        ep=(parallel.ep,),
        pp=(small.mesh.ranks,),
        schedule="auto" if pipe is None else (pipe.schedule,),
        chunks="auto" if pipe is None else (pipe.chunks,),
        states=StatesSpec(
            parameters=(small.mesh.degree(states.parameters.degree),),
            gradients=(small.mesh.degree(states.gradients.degree),),
            optimizer_states=(small.mesh.degree(states.optimizer_states.degree),),
            secondary=(_second(decision, small.mesh) or "none",),
        ),
        reshard_after_forward="auto" if freed is None else (freed,),
        int8_gathers=("none",),
        int4_reductions=("none",),
        micro_batch=(small.micro_batch,),
        checkpointing=(_fewer_checkpoints(decision.checkpointing, blocks),),
        precision=(precision,),
        engine=(decision.engine.name,),
    )
    return _with(small.job, optimizer, strategy)


def small_parallel(decision: Decision, mesh: SmallMesh) -> Parallel:
    """How the processes share one copy of the model: as in the plan, with groups of two where there is room."""
    tensor, context = decision.tensor_parallel, decision.context_parallel
    cp, tp = mesh.degree(context.degree), mesh.tensor_ranks
    return Parallel(
        tp=tp,
        sequence=tensor.sequence and tp > 1,
        cp=cp,
        method=context.method if cp > 1 else "none",
        ep=mesh.degree(decision.expert_parallel.degree),
    )


def exactly(small: SmallJob, decision: Decision, found: Decision, *, fewer_bits: bool) -> Decision:
    """What the planner has `found` for the pinned job, over all axes of `decision`, shrunk.

    `fewer_bits`: and sending in fewer bits what it sends so.
    """
    if not ENGINES[decision.engine.name].flat:
        return found
    axes = [(name, size) for name, size in reversed(small.mesh.axes.items()) if size > 1 and name != TENSOR_AXIS]
    names = [name for name, _ in axes]
    sent = decision.communication if fewer_bits else Communication()
    point = replace(
        point_of(found),
        axes=tuple(size for _, size in axes),
        int8_gathers=tuple(names.index(name) for name in sent.int8_gathers if name in names),
        int4_reductions=tuple(names.index(name) for name in sent.int4_reductions if name in names),
    )
    return decide(point, small.job.cluster, found.checkpointing.of)


def with_stages(
    small: SmallJob, pipeline: SmallPipeline, decision: Decision, predictor: Predictor, precision: Precision
) -> Decision:
    """The decision of a plan with pipeline stages, shrunk. `predictor`: of the shrunk job and model.

    Raises InputError where that model cannot be cut into so many stages.
    """
    mesh, point = small.mesh, point_of(decision)
    shard = mesh.degree(point.shard)
    uncut = replace(
        point,
        parallel=small_parallel(decision, mesh),
        world=mesh.world_size // mesh.tensor_ranks,
        shard=shard,
        optimizer_degree=mesh.degree(point.optimizer_degree),
        gradient_degree=mesh.degree(point.gradient_degree),
        axes=tuple(size for name, size in reversed(mesh.axes.items()) if size > 1 and name.startswith("dp_")),
        kept=point.kept if shard > 1 else None,
        micro_batch=small.micro_batch,
        accumulation=small.accumulation,
        precision=precision,
    )
    return decide(staged(pipeline, uncut, predictor), small.job.cluster, block_count(predictor.profile))


def reference(small: SmallJob, optimizer: OptimizerSpec, precision: Precision, micro_batch: int) -> JobSpec:
    """The same training on one process: nothing sharded, nothing recomputed."""
    cluster = small.job.cluster
    alone = cluster.model_copy(update={"levels": (cluster.levels[0].model_copy(update={"size": 1}),)})
    strategy = StrategySpec(
        micro_batch=(micro_batch,),
        checkpointing=("none",),
        precision=(precision,),
        engine=("single" if precision == "fp32" else "fsdp2",),
    )
    return _with(small.job.model_copy(update={"cluster": alone}), optimizer, strategy)


def _layout_changes(decision: Decision, mesh: SmallMesh) -> list[tuple[str, Any, Any]]:
    """Sizes before and after; amsp's axes are counted anew where one has vanished, so they are told together."""
    if not ENGINES[decision.engine.name].flat:
        return [(f"decision.mesh.{axis.name}", axis.size, mesh.axes[axis.name]) for axis in decision.mesh.axes]
    before, after = [axis.size for axis in decision.mesh.axes], [size for size in mesh.axes.values() if size > 1]
    states = {name: getattr(decision.states, name) for name in ("parameters", "gradients", "optimizer_states")}
    return [
        ("decision.mesh.axes", " x ".join(map(str, before)), " x ".join(map(str, after))),
        *(
            (f"decision.states.{name}.degree", state.degree, mesh.degree(state.degree))
            for name, state in states.items()
        ),
    ]


def _second_change(decision: Decision, mesh: SmallMesh) -> list[tuple[str, Any, Any]]:
    second = decision.states.secondary
    return [] if second is None else [("decision.states.secondary.degree", second.degree, _second(decision, mesh))]


def _second(decision: Decision, mesh: SmallMesh) -> int | None:
    """Degree of the second copy; None where there is none, or no room for one."""
    second = decision.states.secondary
    small = 1 if second is None else mesh.degree(second.degree)
    return small if 1 < small < mesh.degree(decision.states.parameters.degree) else None


def _with(job: JobSpec, optimizer: OptimizerSpec, strategy: StrategySpec) -> JobSpec:
    train = job.train.model_copy(update={"optimizer": optimizer})
    return job.model_copy(update={"train": train, "strategy": strategy})


def _fewer_checkpoints(checkpointing: Checkpointing, blocks: int) -> int | Literal["none", "full"]:
    """None and all stay what they are; some stay some, in about the same ratio."""
    if checkpointing.blocks == 0 or blocks == 0:
        return "none"
    if checkpointing.blocks >= checkpointing.of or blocks == 1:
        return "full"
    return min(max(1, round(checkpointing.blocks * blocks / checkpointing.of)), blocks - 1)


def _small_cluster(cluster: ClusterSpec, mesh: SmallMesh) -> ClusterSpec:
    return cluster.model_copy(
        update={"device": _PROCESS, "levels": mesh.levels, "host_memory": _PROCESS.memory, "launcher": "torchrun"}
    )


def _small_train(job: JobSpec, steps: int, global_batch: int) -> TrainSpec:
    """A few steps, of which one at most is warm-up; nothing saved or evaluated on the way."""
    train = job.train
    own_length = job.data.dataset is not None
    warmup = Amount(min(int(train.schedule.warmup.value), 1), "steps")
    return TrainSpec(
        sequence_length=train.sequence_length if own_length else min(train.sequence_length, _SEQUENCE_LENGTH),
        global_batch=Amount(global_batch, "sequences"),
        steps=steps,
        optimizer=train.optimizer,
        ema=train.ema,
        schedule=train.schedule.model_copy(update={"warmup": warmup}),
        seed=train.seed,
    )


def _small_data(data: DataSpec, folder: Path) -> tuple[DataSpec, int | None, list[Change]]:
    """The data, the number of token ids a small model has to know (None: its own), and what was changed.

    Files are used where they exist; a plan can be rehearsed before its data are there.
    """
    held_out = {"validation": None, "validation_dataset": None}
    if data.dataset is not None:
        return data.model_copy(update=held_out), None, []
    if data.synthetic is not None:
        vocabulary = min(data.synthetic.vocabulary, SMALL_VOCABULARY)
        change = Change(key="data.synthetic.vocabulary", before=str(data.synthetic.vocabulary), after=str(vocabulary))
        small = DataSpec(synthetic=SyntheticSpec(vocabulary=vocabulary))
        return small, vocabulary, [change] if vocabulary != data.synthetic.vocabulary else []
    files = data.bytes or data.tokens or ()
    if all(expand((pattern,), folder) for pattern in (*files, *data.mask)):
        return data.model_copy(update=held_out), SMALL_VOCABULARY if data.bytes else None, []
    change = Change(
        key="data.bytes" if data.bytes else "data.tokens",
        before=", ".join(files),
        after=f"random ids below {SMALL_VOCABULARY}",
        because="the files are not there",
    )
    return DataSpec(synthetic=SyntheticSpec(vocabulary=SMALL_VOCABULARY)), SMALL_VOCABULARY, [change]
