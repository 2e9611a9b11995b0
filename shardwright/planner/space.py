"""The points that a plan may be: which there are, and how each is written as a decision and read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from shardwright.planner.engines import ENGINES, EngineName
from shardwright.planner.precisions import PRECISIONS, Precision, permitted_precisions
from shardwright.schemas.base import permits
from shardwright.schemas.checks import divisors, shard_degrees
from shardwright.schemas.cluster import ClusterSpec, LevelSpec
from shardwright.schemas.job import Degree, JobSpec
from shardwright.schemas.plan import Checkpointing, Decision, Engine, Mesh, MeshAxis, States, StateSharding
from shardwright.schemas.profile import ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of the space: the decision vector without what follows from it."""

    engine: EngineName
    world: int
    shard: int
    """Devices that one copy of parameters and optimizer states is spread over."""
    kept: bool | None
    """fsdp2: whether gathered parameters stay from the first forward of a step to its last backward."""
    gradient_degree: int
    """Devices that gradients are spread over while they accumulate: `shard` or 1."""
    micro_batch: int
    accumulation: int
    checkpointed: int
    """The first blocks, whose forward is recomputed."""
    precision: Precision

    @property
    def replicas(self) -> int:
        """Copies of the sharded states."""
        return self.world // self.shard

    @property
    def gradients_wait(self) -> bool:
        """Whether whole gradients accumulate and are reduced on the last micro-batch only."""
        return self.accumulation > 1 and self.gradient_degree < self.shard


def level_degree(cluster: ClusterSpec, degree: Degree) -> int | None:
    """A degree as the job writes it, as a number: a level's name stands for all devices up to and including it, `all`
    for the world. None for a name that the cluster does not have."""
    if isinstance(degree, int):
        return degree
    if degree == "all":
        return cluster.world_size
    names = [level.name for level in cluster.levels]
    return prod(level.size for level in cluster.levels[: names.index(degree) + 1]) if degree in names else None


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


def permitted_degrees(job: JobSpec) -> tuple[int, ...]:
    """Shard degrees of parameters and optimizer states (equal, for every engine there is) that the job permits: they
    fill the fastest levels first (AMSP, arXiv 2311.00257, section 3.2: no node is left before it is used up)."""
    cluster, states = job.cluster, job.strategy.states
    return tuple(
        degree
        for degree in shard_degrees(cluster)
        if all(
            choice == "auto" or degree in {level_degree(cluster, value) for value in choice}
            for choice in (states.parameters, states.optimizer_states)
        )
    )


def micro_batches(job: JobSpec) -> tuple[int, ...]:
    """Micro-batch sizes that divide what one device trains on in a step, smallest first; none where devices would not
    train on equally much."""
    per_device, rest = divmod(job.train.global_batch_sequences, job.cluster.world_size)
    if rest:
        return ()
    return tuple(size for size in divisors(per_device) if permits(job.strategy.micro_batch, size))


def profiled(profile: ModelProfile, precision: Precision) -> bool:
    """Whether the profile holds costs for this precision's compute dtype."""
    return all(PRECISIONS[precision].compute in unit.costs for unit in profile.units)


def unshardable(profile: ModelProfile) -> str:
    """Why fully_shard refuses the model: a scalar parameter, or one tied across groups; empty when it does not."""
    scalar = next((parameter.name for parameter in profile.parameters if not parameter.shape), None)
    if scalar is not None:
        return f"the parameter {scalar} is a scalar, which has no dimension to shard; give it shape (1,)"
    for parameter in profile.parameters:
        names = (parameter.name, *parameter.also)
        owners = {next((path for path in profile.block_paths if name.startswith(path + ".")), "") for name in names}
        if len(owners) > 1:
            return f"the tied parameter {' = '.join(names)} belongs to several FSDP groups"
    return ""


def configurations(job: JobSpec, profile: ModelProfile) -> Iterator[Point]:
    """Every permitted point with nothing checkpointed, in a fixed order; the search adds checkpointing."""
    world = job.cluster.world_size
    refused = {"fsdp2"} if unshardable(profile) else set()
    names = [name for name in ENGINES if permits(job.strategy.engine, name) and name not in refused]
    for precision in permitted_precisions(job):
        if not profiled(profile, precision):
            continue
        for name in names:
            for shard in permitted_degrees(job):
                if not ENGINES[name].runs(world=world, degree=shard, precision=precision):
                    continue
                for micro_batch in micro_batches(job):
                    accumulation = job.train.global_batch_sequences // (world * micro_batch)
                    for degree in _gradient_degrees(job, shard, accumulation):
                        for kept in _kept(job, name):
                            yield Point(
                                engine=name,
                                world=world,
                                shard=shard,
                                kept=kept,
                                gradient_degree=degree,
                                micro_batch=micro_batch,
                                accumulation=accumulation,
                                checkpointed=0,
                                precision=precision,
                            )


def decide(point: Point, cluster: ClusterSpec, blocks: int) -> Decision:
    """The point as a plan states it."""
    return Decision(
        mesh=Mesh(world_size=point.world, axes=_axes(point, cluster)),
        states=States(
            parameters=_sharding(cluster, point.shard),
            gradients=_sharding(cluster, point.gradient_degree),
            optimizer_states=_sharding(cluster, point.shard),
        ),
        micro_batch=point.micro_batch,
        accumulation=point.accumulation,
        checkpointing=Checkpointing(
            policy="full" if point.checkpointed else "none", blocks=point.checkpointed, of=blocks
        ),
        precision=point.precision,
        engine=Engine(name=point.engine, reshard_after_forward=None if point.kept is None else not point.kept),
    )


def point_of(decision: Decision) -> Point:
    """The point that a decision states; the inverse of `decide`, without its checks."""
    reshard = decision.engine.reshard_after_forward
    return Point(
        engine=decision.engine.name,
        world=decision.mesh.world_size,
        shard=decision.states.parameters.degree,
        kept=None if reshard is None else not reshard,
        gradient_degree=decision.states.gradients.degree,
        micro_batch=decision.micro_batch,
        accumulation=decision.accumulation,
        checkpointed=decision.checkpointing.blocks,
        precision=decision.precision,
    )


def _axes(point: Point, cluster: ClusterSpec) -> tuple[MeshAxis, ...]:
    """Slowest first. `single` has no mesh, `ddp` the replicas alone, fsdp2 no replicas where there is one copy."""

    def levels(inner: int, size: int) -> tuple[str, ...]:
        return tuple(level.name for level, _ in spanned_levels(cluster, inner, size))

    replicate = MeshAxis(name="dp_replicate", size=point.replicas, levels=levels(point.shard, point.replicas))
    shard = MeshAxis(name="dp_shard", size=point.shard, levels=levels(1, point.shard))
    if not ENGINES[point.engine].shards:
        return (replicate,) if point.world > 1 else ()
    return (replicate, shard) if point.replicas > 1 else (shard,)


def _sharding(cluster: ClusterSpec, degree: int) -> StateSharding:
    return StateSharding(degree=degree, levels=tuple(level.name for level, _ in spanned_levels(cluster, 1, degree)))


def _gradient_degrees(job: JobSpec, shard: int, accumulation: int) -> tuple[int, ...]:
    """`shard`, and 1 where there is something to accumulate, as far as the job permits. Without accumulation a
    gradient waits for nothing, so whole gradients are no choice of their own."""
    choice = job.strategy.states.gradients
    possible = (shard,) if accumulation == 1 or shard == 1 else (shard, 1)
    return tuple(
        degree
        for degree in possible
        if choice == "auto" or degree in {level_degree(job.cluster, value) for value in choice}
    )


def _kept(job: JobSpec, engine: EngineName) -> tuple[bool | None, ...]:
    if not ENGINES[engine].shards:
        return (None,)
    return tuple(kept for kept in (False, True) if permits(job.strategy.reshard_after_forward, not kept))
