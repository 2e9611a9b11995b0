"""Every collective of one optimizer step, exactly: kind, group, bytes and count.

[Note: what each engine communicates]
fsdp2, per parameter group (each block, and the root): one all-gather of the padded group in the compute dtype before
its forward and, where it is freed after forward, one before its backward; the root is gathered once a micro-batch.
Parameters kept for the step are gathered once; a block's second copy is gathered for backward over the devices that it
is spread over (torch 2.13, _fsdp_param.py, `to_sharded_post_forward`). One reduce-scatter of the padded gradients in
float32 per group and micro-batch, or once per step where whole gradients accumulate. On a 2-D mesh one all-reduce of
the reduce-scatter's output per group and step. Over a shard group of one there is neither gather nor reduce-scatter.
ddp: one all-reduce per bucket and step. Buckets are filled in the order in which gradients become ready and closed as
soon as they hold the cap (torch 2.13, reducer.cpp, `compute_bucket_assignment_by_size`); that order is taken to be the
reverse of registration, so above one cap's worth of gradients the sizes (not their sum) may differ.
amsp: one chain of collectives per bucket, one collective an axis (planner/flat.py).
The experts' parameters have groups, or buckets, and axes of their own ([Note: states of experts] in parts.py).
The gradient norm of DTensors is one all-reduce over dp_shard of one float32 per gradient, that of flat buckets one of
one float32 an axis. Where tensors or experts are divided it is one of one float32 over the world.
What processes that share one copy of the model exchange, the profile says.
All of it was counted in running processes on torch 2.13 (tests/planner).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from shardwright.planner.engines import DDP_BUCKET_CAP_MIB, ENGINES
from shardwright.planner.exchanges import exchange_calls, units_by_segment
from shardwright.planner.flat import step_sends
from shardwright.planner.groups import Groups, Sizes
from shardwright.planner.parallel import WHOLE
from shardwright.planner.parts import Part, parts_of, spans_world
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.space import Point
from shardwright.schemas.plan import Collective
from shardwright.schemas.profile import Parameter, Unit

COUNTS_BYTES = 24
"""float64: tokens of the global batch, stop requested, save requested."""
LOSS_BYTES = 8
"""float64: sum of the loss."""
ROWS_BYTES = 8
"""int64: rows that a layer of experts computed."""


def step_collectives(point: Point, groups: Groups, bucket_cap_bytes: int | None = None) -> tuple[Collective, ...]:
    """Collectives of one rank in one optimizer step ([Note: what each engine communicates]), merged where equal.

    `bucket_cap_bytes` replaces ddp's cap.
    """
    cap = DDP_BUCKET_CAP_MIB * 2**20 if bucket_cap_bytes is None else bucket_cap_bytes
    ends = (*world_norm(point), *metrics_calls(point), *load_calls(point, len(groups.profile.expert_layers)))
    return merged((*_states(point, groups, cap), *exchanged(point, _units(point, groups)), *ends))


def merged(each: Iterable[tuple[Collective, int]]) -> tuple[Collective, ...]:
    """Collectives and how often each is called, those that are equal together, without those that move nothing."""
    calls: Counter[Collective] = Counter()
    for call, count in each:
        if call.bytes and call.group_size > 1:
            calls[call] += count
    return tuple(call.model_copy(update={"count": count}) for call, count in calls.items())


def ddp_buckets(parameters: Sequence[Parameter], cap_bytes: int) -> list[int]:
    """Bytes of DistributedDataParallel's buckets in the order of their all-reduces."""
    buckets, filled = [], 0
    for parameter in reversed(parameters):
        filled += MASTER_BYTES * parameter.numel if parameter.trainable else 0
        if filled >= cap_bytes:
            buckets.append(filled)
            filled = 0
    return [*buckets, filled] if filled else buckets


def gradient_reductions(point: Point) -> int:
    """Reduce-scatters per step of one group."""
    return 1 if point.gradients_wait else point.accumulation


def _states(point: Point, groups: Groups, cap: int) -> Iterator[tuple[Collective, int]]:
    if ENGINES[point.engine].flat:
        for part in parts_of(point):
            yield from _flat(part, part.groups(groups), norm=not spans_world(point))
        return
    if not ENGINES[point.engine].shards:
        for size in ddp_buckets(groups.profile.parameters, cap):
            yield call_of("all_reduce", "dp_replicate", point.world, size, "gradients"), 1
        return
    for part in parts_of(point):
        yield from _dimension_0(part, part.groups(groups).sizes(part.point.shard))
    if not spans_world(point):
        scalars = MASTER_BYTES * groups.sizes(point.shard).tensors
        yield call_of("all_reduce", "dp_shard", point.shard, scalars, "grad_norm"), 1


def _dimension_0(part: Part, sizes: Sizes) -> Iterator[tuple[Collective, int]]:
    point, axis = part.point, part.shard_axis
    compute = PRECISIONS[point.precision].compute_bytes
    once = 1 if point.kept else point.accumulation
    for elements in (*sizes.blocks, sizes.root):
        yield call_of("all_gather", axis, point.shard, compute * elements, "parameters"), once
    for elements in () if point.kept else sizes.blocks:
        again = point.secondary or point.shard
        yield call_of("all_gather", axis, again, compute * elements, "parameters"), point.accumulation
    for elements in (*sizes.block_gradients, sizes.root_gradients):
        size = MASTER_BYTES * elements
        yield call_of("reduce_scatter", axis, point.shard, size, "gradients"), gradient_reductions(point)
        yield call_of("all_reduce", part.replicate_axis, point.replicas, size // point.shard, "gradients"), 1


def _flat(part: Part, groups: Groups, *, norm: bool) -> Iterator[tuple[Collective, int]]:
    point = part.point
    layout = point.chain
    sends = step_sends(
        layout,
        groups.flat(layout),
        element=PRECISIONS[point.precision].compute_bytes,
        accumulation=point.accumulation,
        kept=bool(point.kept),
        int8_gathers=point.int8_gathers,
        int4_reductions=point.int4_reductions,
        norm=norm,
    )
    for send, count in sends.items():
        size = layout.sizes[send.axis]
        yield call_of(send.kind, part.axis(send.axis), size, send.bytes, send.purpose), count


def _units(point: Point, groups: Groups) -> Iterator[tuple[Unit, bool]]:
    """The units of the model in order, each with whether it is recomputed."""
    blocks = 0
    for unit in units_by_segment(groups.profile):
        blocks += unit.kind == "block"
        yield unit, unit.kind == "block" and blocks <= point.checkpointed


def exchanged(point: Point, units: Iterable[tuple[Unit, bool]]) -> Iterator[tuple[Collective, int]]:
    """What the processes that share these units tell one another in a step; a unit comes with whether it is
    recomputed."""
    if point.parallel == WHOLE:
        return
    compute = PRECISIONS[point.precision].compute
    for each, group, size, count in exchange_calls(units, compute, point.micro_batch, point.parallel):
        yield call_of(each.kind, each.axis, group, size, "activations"), point.accumulation * count


def world_norm(point: Point) -> Iterator[tuple[Collective, int]]:
    """The gradient norm where it is summed over all processes at once."""
    if spans_world(point):
        yield call_of("all_reduce", "world", point.devices, MASTER_BYTES, "grad_norm"), 1


def metrics_sizes(point: Point) -> tuple[int, ...]:
    """Bytes of what all processes sum up for the log. Where all that they share is layers, they have the same loss."""
    return (COUNTS_BYTES, LOSS_BYTES) if point.world > 1 else (COUNTS_BYTES,)


def metrics_calls(point: Point) -> Iterator[tuple[Collective, int]]:
    """These sums, each once a step."""
    for size in metrics_sizes(point):
        yield call_of("all_reduce", "world", point.devices, size, "metrics"), 1


def load_bytes(point: Point, layers: int) -> int:
    """Of what processes that share experts tell one another for the log: int64 rows of so many layers of each."""
    return ROWS_BYTES * layers * point.parallel.ep


def load_calls(point: Point, layers: int) -> Iterator[tuple[Collective, int]]:
    """How many rows the experts of each process had in each of so many layers, once a step."""
    yield call_of("all_gather", "ep", point.parallel.ep, load_bytes(point, layers), "metrics"), 1


def call_of(kind: str, axis: str, group_size: int, size: int, purpose: str) -> Collective:
    """One call."""
    return Collective.model_validate(
        {"kind": kind, "axis": axis, "group_size": group_size, "bytes": size, "count": 1, "purpose": purpose}
    )
