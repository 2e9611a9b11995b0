"""The points that a plan may be: which there are, and how each is written as a decision and read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache

from shardwright.planner.engines import ENGINES, EngineName
from shardwright.planner.flat import ALIGNMENT, Chain
from shardwright.planner.layouts import Layout, layouts, level_ends
from shardwright.planner.network import Links
from shardwright.planner.parallel import WHOLE, Parallel
from shardwright.planner.precisions import PRECISIONS, Precision, permitted_precisions
from shardwright.planner.quantized import BLOCK
from shardwright.planner.schedules.timetable import Layout as StageLayout
from shardwright.planner.schedules.timetable import Placement
from shardwright.schemas.base import permits
from shardwright.schemas.checks import divisors, permits_no_pipeline
from shardwright.schemas.cluster import ClusterSpec, LevelSpec
from shardwright.schemas.job import STOCK_ENGINES, JobSpec, ScheduleName
from shardwright.schemas.plan import (
    Checkpointing,
    Communication,
    ContextParallel,
    Decision,
    Engine,
    ExpertParallel,
    Mesh,
    MeshAxis,
    Pipeline,
    States,
    StateSharding,
    TensorParallel,
)
from shardwright.schemas.profile import ModelProfile, ParallelAxis

PIPELINE_AXIS = "pp"
TENSOR_AXIS = "tp"
NO_EXPERTS: frozenset[EngineName] = frozenset({"single", "ddp"})
"""Engines that do not run expert parallelism: they hold every state on all processes alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipe:
    """The pipeline of a point: see `schemas.plan.Pipeline`."""

    ranks: int
    chunks: int
    placement: Placement
    schedule: ScheduleName
    cuts: tuple[int, ...]
    """Blocks before the end of each stage but the last."""
    checkpointed: tuple[int, ...]
    """Of each stage, its first blocks, whose forward is recomputed."""
    activation_limits: tuple[int, ...] = ()
    """Of each rank, in bytes, for schedules that are searched."""
    late_step: bool = False
    """Whether steps are late ([Note: late steps] in the runtime's late.py)."""

    @property
    def layout(self) -> StageLayout:
        """Which rank has which stages."""
        return StageLayout(self.ranks, self.chunks, self.placement)

    def blocks(self, stage: int, of: int) -> range:
        """The blocks of a stage, of a model of so many."""
        ends = (0, *self.cuts, of)
        return range(ends[stage], ends[stage + 1])

    def sizes(self, of: int) -> tuple[int, ...]:
        """How many blocks each stage has."""
        return tuple(len(self.blocks(stage, of)) for stage in range(self.layout.stages))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of the space: the decision vector without what follows from it."""

    engine: EngineName
    parallel: Parallel = WHOLE
    """How processes share one copy; everything else here is of one process of each `parallel.tp`."""
    world: int
    """Devices, those of all pipeline stages together, every `parallel.tp` of them counted once."""
    pipe: Pipe | None = None
    """None without pipeline stages; with them, `shard` and the other degrees, `axes` and `micro_batch` are those of
    the processes that have the same stages."""
    shard: int
    """Devices that parameters at rest are spread over."""
    optimizer_degree: int
    """Devices that optimizer states are spread over: for the stock engines `shard`."""
    gradient_degree: int
    """Devices that gradients are spread over while they accumulate: for fsdp2 `shard` or 1."""
    secondary: int | None = None
    """Devices that the second copy of the parameters for backward is spread over; None without one."""
    axes: tuple[int, ...] = ()
    """amsp: sizes of the mesh's axes, fastest first."""
    int8_gathers: tuple[int, ...] = ()
    """amsp: axes, counted from the fastest, over which parameters are gathered in int8."""
    int4_reductions: tuple[int, ...] = ()
    """amsp: axes over which gradients are exchanged in int4."""
    kept: bool | None
    """Whether gathered parameters stay from the first forward of a step to its last backward; None where none are
    gathered."""
    micro_batch: int
    accumulation: int
    checkpointed: int
    """The first blocks, whose forward is recomputed."""
    precision: Precision

    @property
    def devices(self) -> int:
        """All devices of the plan."""
        return self.world * self.parallel.tp

    @property
    def copies(self) -> int:
        """Processes that have the same stages, and the same part of their layers."""
        return self.world if self.pipe is None else self.world // self.pipe.ranks

    @property
    def replicas(self) -> int:
        """Copies of the sharded parameters."""
        return self.copies // self.shard

    @property
    def recomputed(self) -> int:
        """Blocks whose forward is recomputed, of all stages together."""
        return self.checkpointed if self.pipe is None else sum(self.pipe.checkpointed)

    @property
    def gradients_wait(self) -> bool:
        """Whether whole gradients accumulate and are reduced on the last micro-batch only."""
        return self.accumulation > 1 and self.gradient_degree == 1 < self.optimizer_degree

    @property
    def chain(self) -> Chain:
        """amsp: the axes and the level of each state on them."""
        return Chain.of(
            self.axes,
            self.shard,
            self.gradient_degree,
            self.optimizer_degree,
            self.secondary,
            alignment=BLOCK if self.int8_gathers or self.int4_reductions else ALIGNMENT,
        )


def spanned_levels(cluster: ClusterSpec, inner: int, size: int) -> tuple[tuple[LevelSpec, int], ...]:
    """Levels that a mesh axis of `size` devices spans, fastest first, with how many groups of each it joins, when
    `inner` neighbouring devices belong to faster axes."""
    spanned, below = [], 1
    for level in cluster.levels:
        taken = min(level.size, max(1, inner // below))
        part = min(level.size // taken, size)
        if part > 1:
            spanned.append((level, part))
        size //= max(part, 1)
        below *= level.size
    return tuple(spanned)


def exchange_size(parallel: Parallel, axis: ParallelAxis) -> int:
    """Processes of one group of an axis."""
    return {"tp": parallel.tp, "cp": parallel.cp, "ep": parallel.ep}[axis]


def exchange_links(cluster: ClusterSpec, parallel: Parallel, axis: ParallelAxis) -> Links:
    """The levels of the whole cluster that a group of an axis spans, as `spanned_levels` has them: the processes that
    share a layer are neighbours, those that share sequences or experts the nearest behind them."""
    return spanned_levels(cluster, 1 if axis == "tp" else parallel.tp, exchange_size(parallel, axis))


def block_count(profile: ModelProfile) -> int:
    """Blocks that checkpointing may recompute."""
    return len(profile.block_paths)


def permitted_blocks(job: JobSpec, blocks: int) -> tuple[int, ...]:
    """Numbers of checkpointed blocks that the job permits, fewest first."""
    choice = job.strategy.checkpointing
    if choice == "auto":
        return tuple(range(blocks + 1))
    named = {"none": 0, "full": blocks}
    wanted = {named[value] if isinstance(value, str) else value for value in choice}
    return tuple(sorted(value for value in wanted if value <= blocks))


def micro_batches(job: JobSpec, copies: int) -> tuple[int, ...]:
    """Micro-batch sizes that divide what one of so many copies of the model trains on in a step, smallest first; none
    where they would not train on equally much."""
    share, rest = divmod(job.train.global_batch_sequences, copies)
    if rest:
        return ()
    return tuple(size for size in divisors(share) if permits(job.strategy.micro_batch, size))


def profiled(profile: ModelProfile, precision: Precision) -> bool:
    """Whether the profile holds costs for this precision's compute dtype."""
    return all(PRECISIONS[precision].compute in unit.costs for unit in profile.units)


def unshardable(profile: ModelProfile, engine: EngineName) -> str:
    """Why an engine that shards refuses the model: for fully_shard a scalar parameter, for all one tied across groups;
    empty where it does not."""
    if not ENGINES[engine].shards:
        return ""
    scalar = next((parameter.name for parameter in profile.parameters if not parameter.shape), None)
    if scalar is not None and not ENGINES[engine].flat:
        return f"the parameter {scalar} is a scalar, which has no dimension to shard; give it shape (1,)"
    for parameter in profile.parameters:
        names = (parameter.name, *parameter.also)
        owners = {next((path for path in profile.block_paths if name.startswith(path + ".")), "") for name in names}
        if len(owners) > 1:
            return f"the tied parameter {' = '.join(names)} belongs to several groups of parameters"
    return ""


def permitted_engines(job: JobSpec, profile: ModelProfile, parallel: Parallel = WHOLE) -> tuple[EngineName, ...]:
    """Engines that the job permits, that can hold the model, and that run it shared this way."""
    choice = job.strategy.engine
    names = None if choice == "auto" else {*choice, *(STOCK_ENGINES if "stock" in choice else ())}
    return tuple(
        name
        for name in ENGINES
        if (names is None or name in names)
        and not unshardable(profile, name)
        and (parallel.ep == 1 or name not in NO_EXPERTS)
    )


def configurations(job: JobSpec, profile: ModelProfile, parallel: Parallel = WHOLE) -> Iterator[Point]:
    """Every permitted point without pipeline stages and with nothing checkpointed, in a fixed order; the search adds
    checkpointing. `job` and `profile` as `divided` makes them for `parallel`.

    What a permitted stock engine can run is not offered as `amsp` as well.
    """
    world = job.cluster.world_size
    if not permits_no_pipeline(job) or world % parallel.cp or world % parallel.ep:
        return
    engines = permitted_engines(job, profile, parallel)
    # Whether micro-batches accumulate matters to a layout, how many do not.
    layouts_of = cache(lambda name, accumulation: tuple(layouts(job, ENGINES[name], accumulation, parallel.ep)))
    for precision in permitted_precisions(job):
        if not profiled(profile, precision):
            continue
        for micro_batch in micro_batches(job, world):
            accumulation = job.train.global_batch_sequences // (world * micro_batch)
            stock: set[tuple[object, ...]] = set()
            for name in engines:
                for layout in layouts_of(name, min(accumulation, 2)):
                    if not ENGINES[name].runs(world=world, degree=layout.parameters, precision=precision):
                        continue
                    if not ENGINES[name].flat:
                        stock.add(layout.states)
                    elif layout.states in stock and not layout.quantized:
                        continue
                    yield laid_out(name, world, layout, micro_batch, accumulation, precision, parallel)


def laid_out(
    name: EngineName,
    world: int,
    layout: Layout,
    micro_batch: int,
    accumulation: int,
    precision: Precision,
    parallel: Parallel,
    pipe: Pipe | None = None,
) -> Point:
    """The point with a layout, nothing checkpointed."""
    return Point(
        engine=name,
        parallel=parallel,
        world=world,
        pipe=pipe,
        shard=layout.parameters,
        optimizer_degree=layout.optimizer_states,
        gradient_degree=layout.gradients,
        secondary=layout.secondary,
        axes=layout.axes,
        int8_gathers=layout.int8_gathers,
        int4_reductions=layout.int4_reductions,
        kept=layout.kept,
        micro_batch=micro_batch,
        accumulation=accumulation,
        checkpointed=0,
        precision=precision,
    )


def decide(point: Point, cluster: ClusterSpec, blocks: int) -> Decision:
    """The point as a plan states it; `cluster` is the whole one."""
    recomputed, parallel = point.recomputed, point.parallel

    def sharding(degree: int) -> StateSharding:
        levels = spanned_levels(cluster, parallel.tp, degree)
        return StateSharding(degree=degree, levels=tuple(level.name for level, _ in levels))

    return Decision(
        mesh=Mesh(world_size=point.devices, axes=_axes(point, cluster)),
        states=States(
            parameters=sharding(point.shard),
            gradients=sharding(point.gradient_degree),
            optimizer_states=sharding(point.optimizer_degree),
            secondary=None if point.secondary is None else sharding(point.secondary),
        ),
        micro_batch=point.micro_batch,
        accumulation=point.accumulation,
        checkpointing=Checkpointing(policy="full" if recomputed else "none", blocks=recomputed, of=blocks),
        precision=point.precision,
        pipeline=Pipeline() if point.pipe is None else Pipeline(**asdict(point.pipe)),
        tensor_parallel=TensorParallel(degree=parallel.tp, sequence=parallel.sequence),
        context_parallel=ContextParallel(degree=parallel.cp, method=parallel.method),
        expert_parallel=ExpertParallel(degree=parallel.ep),
        communication=Communication(
            int8_gathers=tuple(axis_name(axis) for axis in point.int8_gathers),
            int4_reductions=tuple(axis_name(axis) for axis in point.int4_reductions),
        ),
        engine=Engine(name=point.engine, reshard_after_forward=None if point.kept is None else not point.kept),
    )


def point_of(decision: Decision) -> Point:
    """The point that a decision states; the inverse of `decide`, without its checks."""
    reshard, states = decision.engine.reshard_after_forward, decision.states
    names = [axis.name for axis in reversed(decision.mesh.axes) if axis.name != TENSOR_AXIS]
    parallel = parallel_of(decision)
    flat, pipeline = ENGINES[decision.engine.name].flat, decision.pipeline
    pipe = None
    if pipeline.schedule != "none":
        pipe = Pipe(**dict(pipeline))
        names = [name for name in names if name != PIPELINE_AXIS]
    return Point(
        engine=decision.engine.name,
        parallel=parallel,
        world=decision.mesh.world_size // parallel.tp,
        pipe=pipe,
        shard=states.parameters.degree,
        optimizer_degree=states.optimizer_states.degree,
        gradient_degree=states.gradients.degree,
        secondary=None if states.secondary is None else states.secondary.degree,
        axes=tuple(axis.size for axis in reversed(decision.mesh.axes) if axis.name in names) if flat else (),
        int8_gathers=tuple(names.index(name) for name in decision.communication.int8_gathers),
        int4_reductions=tuple(names.index(name) for name in decision.communication.int4_reductions),
        kept=None if reshard is None else not reshard,
        micro_batch=decision.micro_batch,
        accumulation=decision.accumulation,
        checkpointed=decision.checkpointing.blocks if pipe is None else 0,
        precision=decision.precision,
    )


def parallel_of(decision: Decision) -> Parallel:
    """How processes share one copy of the model, as a decision states it."""
    tensor, context = decision.tensor_parallel, decision.context_parallel
    return Parallel(
        tp=tensor.degree,
        sequence=tensor.sequence,
        cp=context.degree,
        method=context.method,
        ep=decision.expert_parallel.degree,
    )


def axis_name(axis: int) -> str:
    """The name of amsp's axis, counted from the fastest."""
    return f"dp_{axis + 1}"


def axis_links(cluster: ClusterSpec, axes: tuple[int, ...]) -> tuple[tuple[tuple[LevelSpec, int], ...], ...]:
    """For each of amsp's axes the levels that it spans, as `spanned_levels` has them."""
    return tuple(spanned_levels(cluster, inner, size) for inner, size in zip(level_ends(axes)[:-1], axes, strict=True))


def _axes(point: Point, cluster: ClusterSpec) -> tuple[MeshAxis, ...]:
    """Slowest first: of the stages, of the data ([Note: processes]), of the tensors; the first and the last of them
    only where there are several processes on it."""
    inner = point.parallel.tp

    def axis(name: str, inside: int, size: int) -> MeshAxis:
        levels = tuple(level.name for level, _ in spanned_levels(cluster, inside, size))
        return MeshAxis(name=name, size=size, levels=levels)

    made = [axis(name, inner * inside, size) for name, inside, size in _data_axes(point)]
    if point.pipe is not None:
        made.insert(0, axis(PIPELINE_AXIS, inner * point.copies, point.pipe.ranks))
    return (*made, axis(TENSOR_AXIS, 1, inner)) if inner > 1 else tuple(made)


def _data_axes(point: Point) -> list[tuple[str, int, int]]:
    """Name, processes inside, and size, slowest first. `single` has none, `ddp` the replicas alone, fsdp2 no replicas
    where there is one copy."""
    if ENGINES[point.engine].flat:
        inners = level_ends(point.axes)
        return [(axis_name(at), inners[at], size) for at, size in reversed(list(enumerate(point.axes)))]
    replicate, shard = ("dp_replicate", point.shard, point.replicas), ("dp_shard", 1, point.shard)
    if not ENGINES[point.engine].shards:
        return [replicate] if point.world > 1 else []
    return [replicate, shard] if point.replicas > 1 else [shard]
