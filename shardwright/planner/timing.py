"""Seconds of a step and their parts: the only place that predicts time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate

from shardwright.planner.collectives import load_bytes, metrics_sizes
from shardwright.planner.compute import KINDS, UnitWork, memory_rate, model_work
from shardwright.planner.constants import device_constants
from shardwright.planner.engines import DDP_BUCKET_CAP_MIB, ENGINES
from shardwright.planner.exchanges import ALONE, AXES, NOTHING, Around, ByAxis, Wiring
from shardwright.planner.flat_lanes import FlatStep, run_flat
from shardwright.planner.flat_timing import FlatTime
from shardwright.planner.groups import Groups, Sizes
from shardwright.planner.lanes import Load, StepLoad, least_lane_seconds, run_lanes
from shardwright.planner.network import CollectiveKind, Links, collective_seconds
from shardwright.planner.optimizers import OPTIMIZERS
from shardwright.planner.parts import Part, parts_of, spans_world
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS, Precision
from shardwright.planner.space import Point, spanned_levels
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import TimePart
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile, UnitKind


@dataclass(frozen=True, slots=True)
class Step:
    """Time of one optimizer step."""

    seconds: float
    parts: tuple[TimePart, ...]
    """They add up to `seconds`."""


class TimeModel:
    """Step time of every point of one job."""

    def __init__(self, job: JobSpec, profile: ModelProfile, groups: Groups, around: Around = ALONE) -> None:
        self._job, self._groups, self._around = job, groups, around
        device, wiring = job.cluster.device, Wiring.of(job, around)
        self._constants = device_constants(device)
        self._memory_rate = memory_rate(device)
        self._flat = FlatTime(job.cluster, groups)
        self._work: Callable[[ComputeDtypeName, int, bool], list[UnitWork]] = lru_cache(maxsize=None)(
            lambda dtype, micro_batch, hooked: model_work(profile, dtype, micro_batch, device, hooked, wiring)
        )
        self._passes: Callable[[ComputeDtypeName, int], tuple[float, list[float]]] = lru_cache(maxsize=None)(
            lambda dtype, micro_batch: _totals(self._work(dtype, micro_batch, True))
        )

    def step(self, point: Point) -> Step:
        """Predict one step: the lanes ([Note: lanes], [Note: wires]), then what follows them."""
        work = self._point_work(point)
        lanes = run_flat(self._flat_load(point, work)) if _is_flat(point) else run_lanes(self._load(point, work))
        waits = [
            ("parameter and gradient copies", lanes.copies, "in and out of the collectives' buffers"),
            ("exposed gathers", lanes.gather_stall, "compute waits for parameters"),
            ("exposed reductions", lanes.reduce_stall, "compute waits for gradients to be reduced"),
            *self._tail(point),
        ]
        parts = (*_compute_parts(point, work), *(TimePart(name=n, seconds=s, note=note) for n, s, note in waits))
        kept = tuple(part for part in parts if part.seconds > 0)
        return Step(sum(part.seconds for part in kept), kept)

    def least(self, point: Point) -> float:
        """A lower bound of the step: whatever the order, all compute has to be done and every link carries its load."""
        if _is_flat(point):
            dtype = PRECISIONS[point.precision].compute
            passes, recomputed = self._passes(dtype, point.micro_batch)
            lanes = self._flat.least(point, passes + recomputed[point.checkpointed])
        else:
            lanes = least_lane_seconds(self._load(point, self._point_work(point)))
        return lanes + sum(seconds for _, seconds, _ in self._tail(point))

    def work_seconds(self, precision: Precision, micro_batch: int) -> float:
        """Forward and backward of one micro-batch, exchanges included, with nothing recomputed."""
        return self._passes(PRECISIONS[precision].compute, micro_batch)[0]

    def _point_work(self, point: Point) -> list[UnitWork]:
        return self._work(PRECISIONS[point.precision].compute, point.micro_batch, ENGINES[point.engine].shards)

    def _tail(self, point: Point) -> list[tuple[str, float, str]]:
        """What follows forward and backward."""
        own = self._flat.own(point) if _is_flat(point) else sum(sizes.own for _, sizes in self._sizes(point))
        traffic = OPTIMIZERS[self._job.train.optimizer.name].traffic_bytes(self._job.train)
        if _is_flat(point) and PRECISIONS[point.precision].compute_bytes < MASTER_BYTES:
            traffic += MASTER_BYTES + PRECISIONS[point.precision].compute_bytes
        return [
            ("gradient norm", self._norm(point, own), "read, reduced, and the gradients scaled"),
            ("optimizer", traffic * own / self._memory_rate, "memory traffic of the update"),
            ("metrics", self._metrics(point), "two small all-reduces"),
            ("host overhead", self._constants.step_overhead.value, "batches, logging, synchronisation"),
        ]

    def _flat_load(self, point: Point, work: list[UnitWork]) -> FlatStep:
        return self._flat.step(point, _block_passes(point, work), _passes(work, "embedding"), _passes(work, "head"))

    def _load(self, point: Point, work: list[UnitWork]) -> StepLoad:
        compute = _block_passes(point, work)
        groups = self._sharded(point, compute) if ENGINES[point.engine].shards else self._replicated(point, compute)
        return StepLoad(
            blocks=groups[:-1],
            root=groups[-1],
            embedding=_passes(work, "embedding"),
            head=_passes(work, "head"),
            micro_batches=point.accumulation,
            kept=bool(point.kept),
            waits=point.gradients_wait,
            shared=self._shares_links(point),
        )

    def _shares_links(self, point: Point) -> bool:
        """Whether both axes of the mesh, of the experts' too, are bound by the same level ([Note: lanes])."""
        return any(self._is_shared(part) for part in parts_of(point))

    def _is_shared(self, part: Part) -> bool:
        levels = [self._shard_links(part, part.point.shard), self._replicate_links(part)]
        return all(levels) and levels[0][-1][0] == levels[1][-1][0]

    def _sizes(self, point: Point) -> list[tuple[Part, Sizes]]:
        return [(part, part.groups(self._groups).sizes(part.point.shard)) for part in parts_of(point)]

    def _sharded(self, point: Point, compute: list[tuple[float, float]]) -> list[Load]:
        """fsdp2: every group on every lane; the experts' of a block follow its others on the same ones."""
        moved = [self._moved(*each) for each in self._sizes(point)]
        return [
            Load(*passes, *(sum(seconds) for seconds in zip(*of_group, strict=True)))
            for passes, of_group in zip((*compute, (0.0, 0.0)), zip(*moved, strict=True), strict=True)
        ]

    def _moved(self, part: Part, sizes: Sizes) -> list[tuple[float, ...]]:
        """What the groups of a part take on each lane. Equal groups are worked out once."""
        point, element = part.point, PRECISIONS[part.point.precision].compute_bytes
        shard = self._shard_links(part, point.shard)
        again = self._shard_links(part, point.shard if point.secondary is None else point.secondary)
        copies = self._replicate_links(part)

        @cache
        def communication(gathered: int, reduced: int) -> tuple[float, ...]:
            copied = (element if point.shard > 1 else MASTER_BYTES) + element
            handed = element + MASTER_BYTES * (1 if point.shard > 1 else 3)
            return (
                self._seconds("all_gather", shard, element * gathered),
                self._seconds("all_gather", again, element * gathered),
                copied * gathered / self._memory_rate,
                handed * reduced / self._memory_rate,
                self._seconds("reduce_scatter", shard, MASTER_BYTES * reduced),
                self._seconds("all_reduce", copies, MASTER_BYTES * reduced // point.shard),
            )

        groups = zip((*sizes.blocks, sizes.root), (*sizes.block_gradients, sizes.root_gradients), strict=True)
        return [communication(*group) for group in groups]

    def _replicated(self, point: Point, compute: list[tuple[float, float]]) -> list[Load]:
        """single and ddp: buckets are all-reduced when the backward of the block that fills them has ended."""
        sizes = self._groups.sizes(1)
        cap = DDP_BUCKET_CAP_MIB * 2**20
        pending = MASTER_BYTES * sizes.head_numel
        reductions = []
        for numel in reversed(sizes.block_numels):
            pending += MASTER_BYTES * numel
            buckets = pending // cap
            reductions.append(buckets * self._replicate_seconds(point, pending // buckets) if buckets else 0.0)
            pending = 0 if buckets else pending
        rest = pending + MASTER_BYTES * (sizes.root_numel - sizes.head_numel)
        reductions = [*reversed(reductions), self._replicate_seconds(point, rest)]
        return [
            Load(*passes, gather=0.0, again=0.0, copy=0.0, hand_over=0.0, reduce=0.0, all_reduce=seconds)
            for passes, seconds in zip((*compute, (0.0, 0.0)), reductions, strict=True)
        ]

    def _norm(self, point: Point, own: int) -> float:
        clips = self._job.train.optimizer.clip_grad_norm is not None
        traffic = MASTER_BYTES * own * (3 if clips else 1) / self._memory_rate
        if spans_world(point):
            return traffic + self._seconds("all_reduce", self._world(point), MASTER_BYTES)
        if _is_flat(point):
            return traffic + self._flat.norm(point)
        scalars = MASTER_BYTES * self._groups.sizes(point.shard).tensors
        return traffic + self._seconds("all_reduce", self._shard_links(parts_of(point)[0], point.shard), scalars)

    def _metrics(self, point: Point) -> float:
        sums = sum(self._seconds("all_reduce", self._world(point), size) for size in metrics_sizes(point))
        return sums + load_seconds(point, self._groups.profile, self._around, self._constants.links.value)

    def _world(self, point: Point) -> Links:
        return world_links(self._job.cluster, point, self._around)

    def _shard_links(self, part: Part, degree: int) -> Links:
        return spanned_levels(self._job.cluster, part.inner, degree)

    def _replicate_links(self, part: Part) -> Links:
        return spanned_levels(self._job.cluster, part.inner * part.point.shard, part.point.replicas)

    def _replicate_seconds(self, point: Point, size: int) -> float:
        return self._seconds("all_reduce", self._replicate_links(parts_of(point)[0]), size)

    def _seconds(self, kind: CollectiveKind, links: Links, size: int) -> float:
        return collective_seconds(kind, links, size, self._constants.links.value)


def world_links(cluster: ClusterSpec, point: Point, around: Around) -> Links:
    """Of all processes of a point."""
    return spanned_levels(cluster, 1, point.world) if around.world is None else around.world


def load_seconds(point: Point, profile: ModelProfile, around: Around, efficiency: float) -> float:
    """Of telling how many rows each process's experts had."""
    if point.parallel.ep == 1:
        return 0.0
    return collective_seconds(
        "all_gather", around.links["ep"], load_bytes(point, len(profile.expert_layers)), efficiency
    )


def exchange_parts(seconds: Iterable[ByAxis]) -> list[TimePart]:
    """What processes that share one copy of the model exchange, by axis."""
    sums = [sum(of_axis) for of_axis in zip(NOTHING, *seconds, strict=True)]
    return [
        TimePart(name=name, seconds=of_axis, note="compute waits for what processes exchange")
        for name, of_axis in zip(AXES.values(), sums, strict=True)
    ]


def _compute_parts(point: Point, work: list[UnitWork]) -> list[TimePart]:
    """Compute by pass and kind of operator."""
    parts = []
    for name in ("forward", "backward"):
        passes = [(unit.count, unit.forward if name == "forward" else unit.backward) for unit in work]
        for index, kind in enumerate(KINDS):
            seconds = point.accumulation * sum(count * each.kinds[index] for count, each in passes)
            parts.append(TimePart(name=f"{name} {kind}", seconds=seconds))
        launch = point.accumulation * sum(count * each.launch for count, each in passes)
        parts.append(TimePart(name=f"{name} launch", seconds=launch, note="kernels wait for the host"))
    blocks = [unit for unit in work if unit.kind == "block" for _ in range(unit.count)][: point.checkpointed]
    recomputed = point.accumulation * sum(unit.recompute - sum(unit.exchanged_again) for unit in blocks)
    exchanged = [
        *((unit.count, each.exchanges) for unit in work for each in (unit.forward, unit.backward)),
        *((1, unit.exchanged_again) for unit in blocks),
    ]
    return [
        *parts,
        TimePart(name="recompute", seconds=recomputed, note="forward of checkpointed blocks, again"),
        *exchange_parts(times(point.accumulation * count, seconds) for count, seconds in exchanged),
    ]


def times(count: int, seconds: ByAxis) -> ByAxis:
    """So many times as many seconds."""
    tensor, context, expert = seconds
    return count * tensor, count * context, count * expert


def _is_flat(point: Point) -> bool:
    return ENGINES[point.engine].flat


def _block_passes(point: Point, work: list[UnitWork]) -> list[tuple[float, float]]:
    """Seconds of forward and backward of each block; a checkpointed one's backward recomputes."""
    blocks = [unit for unit in work if unit.kind == "block" for _ in range(unit.count)]
    return [
        (unit.forward.seconds, unit.backward.seconds + (unit.recompute if index < point.checkpointed else 0.0))
        for index, unit in enumerate(blocks)
    ]


def _totals(work: list[UnitWork]) -> tuple[float, list[float]]:
    """Seconds of a micro-batch with nothing recomputed, and what recomputing the first 0, 1, 2, ... blocks adds."""
    plain = sum(unit.count * (unit.forward.seconds + unit.backward.seconds) for unit in work)
    blocks = [unit.recompute for unit in work if unit.kind == "block" for _ in range(unit.count)]
    return plain, [0.0, *accumulate(blocks)]


def _passes(work: list[UnitWork], kind: UnitKind) -> tuple[float, float]:
    units = [unit for unit in work if unit.kind == kind]
    return sum(unit.forward.seconds for unit in units), sum(unit.backward.seconds for unit in units)
