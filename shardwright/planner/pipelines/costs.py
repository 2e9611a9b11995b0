"""What the stages of a pipeline cost for one micro-batch: seconds of F, I and W, bytes kept, bytes sent.

[Note: segments]
A model of n blocks is n + 2 segments: 0 is what runs before the first block, k the k-th block with what runs between
the one before and it, n + 1 what runs after the last one, the loss included. A stage is consecutive segments.

[Note: what W is]
Weight gradients of linear layers are made in W ([Note: deferred weight gradients] in the runtime's deferred.py): the
matrix products of that phase. Those of other layers, and the sums for biases, are made while I runs. W also puts the
gradients into the fp32 buffers.

[Note: what a pending weight gradient holds]
Inputs and gradients of outputs of the linear layers. In a checkpointed block these were recomputed in I, so that more
may be held after I than before. A profile that does not state it is taken to hold all that backward needs.
Schedules, and the bounds on them, are made for stages that hold no more after I than before: where a stage of a
schedule that cuts backward in two would, `costs` says that as much is kept before as after, which is never too little.
`exact` says what is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from shardwright.planner.compute import Work, memory_rate, model_work
from shardwright.planner.constants import device_constants
from shardwright.planner.exchanges import ALONE, NOTHING, UNWIRED, Around, ByAxis, Wiring
from shardwright.planner.groups import Groups
from shardwright.planner.pipelines.owners import Owners, stage_segments, without_schedule
from shardwright.planner.pipelines.wires import Wires
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS, Precision
from shardwright.planner.schedules.lowering import Edge
from shardwright.planner.schedules.timetable import Costs
from shardwright.planner.space import Pipe, Point, block_count
from shardwright.schemas.cluster import ClusterSpec, DeviceSpec, LevelSpec
from shardwright.schemas.job import JobSpec, ScheduleName
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile, Operator, Unit, UnitCost

WHOLE_BACKWARD: frozenset[ScheduleName] = frozenset({"gpipe", "1f1b", "interleaved-1f1b", "breadth-first", "hanayo"})
"""Schedules that never cut backward in two, so that nothing waits for W."""
_OTHERS = ("conv", "bmm", "grouped")
"""Parts of the names of matrix products whose weight gradients are those of other layers than linear ones: of
convolutions, of stacks of experts."""


@dataclass(frozen=True, slots=True)
class SegmentCosts:
    """Of every segment ([Note: segments]) for one micro-batch."""

    forward: tuple[Work, ...]
    input_gradient: tuple[Work, ...]
    """With everything of backward that is not deferred ([Note: what W is]); without recomputation."""
    weight_gradient: tuple[Work, ...]
    recompute: tuple[float, ...]
    """Seconds more of I when the segment's block is checkpointed; 0 for embedding and head."""
    exchanged_again: tuple[ByAxis, ...]
    """Of these, what is exchanged once more."""
    saved: tuple[int, ...]
    """Bytes from F to I with nothing checkpointed."""
    saved_inputs: tuple[int, ...]
    """The same when the block is; of embedding and head, when any block of their stage is."""
    held_by_weight: tuple[int, ...]
    """Bytes from I to W ([Note: what a pending weight gradient holds])."""

    @property
    def seconds(self) -> tuple[float, ...]:
        """F, I and W of each segment with nothing recomputed: what `cutting.divide` divides."""
        parts = zip(self.forward, self.input_gradient, self.weight_gradient, strict=True)
        return tuple(sum(work.seconds for work in of_segment) for of_segment in parts)

    def kept_by(self, segment: int, again: range) -> int:
        """Bytes from F to I of a segment in a stage of which those of `again` are checkpointed."""
        at_end = segment in (0, len(self.forward) - 1)
        return (self.saved_inputs if segment in again or (again and at_end) else self.saved)[segment]

    def kept(self, own: range, again: range) -> int:
        """The same of a whole stage."""
        return sum(self.kept_by(segment, again) for segment in own)


def recomputed_segments(pipe: Pipe, stage: int, blocks: int) -> range:
    """The segments of a stage whose block is checkpointed."""
    first = pipe.blocks(stage, blocks).start + 1
    return range(first, first + pipe.checkpointed[stage])


class PipelineCosts:
    """Costs of every pipeline of one job. Raises ValueError for a model without blocks, which cannot be cut."""

    def __init__(
        self, job: JobSpec, profile: ModelProfile, groups: Groups | None = None, around: Around = ALONE
    ) -> None:
        self.blocks = block_count(profile)
        if not self.blocks:
            raise ValueError("a model without repeated blocks cannot be cut into pipeline stages")
        self.owners, self._wires = Owners(groups or Groups(profile)), Wires(profile)
        self._cluster = cluster = job.cluster
        wiring = Wiring.of(job, around)
        self._rate = memory_rate(cluster.device)
        self._efficiency = device_constants(cluster.device).links.value
        self._segments: Callable[[ComputeDtypeName, int], SegmentCosts] = lru_cache(maxsize=None)(
            lambda dtype, micro_batch: segment_costs(profile, dtype, micro_batch, cluster.device, wiring)
        )
        self._links: Callable[[int, int, int], LevelSpec | None] = lru_cache(maxsize=None)(
            lambda copies, one, other: slowest_link(cluster, copies, one, other)
        )
        self._exact: Callable[[Point], Costs] = lru_cache(maxsize=100_000)(self._stage_costs)
        self._costs: Callable[[Point, bool], Costs] = lru_cache(maxsize=100_000)(
            lambda point, whole: _never_growing(self._exact(point), whole)
        )
        self._messages: Callable[[Pipe, ComputeDtypeName, int], dict[Edge, int]] = lru_cache(maxsize=100_000)(
            self._wires.messages
        )

    def segments(self, precision: Precision, micro_batch: int) -> SegmentCosts:
        """Of every segment, at a micro-batch."""
        return self._segments(PRECISIONS[precision].compute, micro_batch)

    def costs(self, point: Point) -> Costs:
        """Of every stage of a point, in seconds and bytes, for making its schedule. Of the schedule it matters only
        whether it cuts backward in two ([Note: what a pending weight gradient holds])."""
        pipe = pipe_of(point)
        return self._costs(replace(point, pipe=without_schedule(pipe)), pipe.schedule in WHOLE_BACKWARD)

    def exact(self, point: Point) -> Costs:
        """The same, with the bytes that stages really keep: for memory, not for making a schedule."""
        return self._exact(replace(point, pipe=without_schedule(pipe_of(point))))

    def messages(self, point: Point) -> Mapping[Edge, int]:
        """Bytes of one micro-batch that each stage sends to each other one; as many gradients come back."""
        return self._messages(without_schedule(pipe_of(point)), PRECISIONS[point.precision].compute, point.micro_batch)

    def edges(self, point: Point) -> tuple[Edge, ...]:
        """Pairs of stages, the first of which makes activations for the second."""
        return tuple(self.messages(point))

    def send_seconds(self, point: Point, edge: Edge) -> float:
        """Of one message over an edge; 0 on one rank."""
        layout = pipe_of(point).layout
        link = self._links(point.copies, *(layout.place(stage)[0] for stage in edge))
        if link is None:
            return 0.0
        return link.latency + self.messages(point).get(edge, 0) / (self._efficiency * link.bandwidth)

    def gradient_copies(self, point: Point, stage: int) -> float:
        """Seconds in which a micro-batch's gradients are put into the fp32 buffers: read, and written or added."""
        added = point.accumulation > 1 and point.gradient_degree == 1
        each = PRECISIONS[point.precision].compute_bytes + MASTER_BYTES * (2 if added else 1)
        return each * self.owners.trained(stage_segments(pipe_of(point), stage, self.blocks)) / self._rate

    def _stage_costs(self, point: Point) -> Costs:
        pipe, of = pipe_of(point), self.segments(point.precision, point.micro_batch)
        dtype = PRECISIONS[point.precision].compute
        stages = range(pipe.layout.stages)
        own = [stage_segments(pipe, stage, self.blocks) for stage in stages]
        again = [recomputed_segments(pipe, stage, self.blocks) for stage in stages]
        return Costs(
            forward=tuple(_seconds(of.forward, segments) for segments in own),
            input_gradient=tuple(
                _seconds(of.input_gradient, segments) + sum(of.recompute[segment] for segment in recomputed)
                for segments, recomputed in zip(own, again, strict=True)
            ),
            weight_gradient=tuple(
                _seconds(of.weight_gradient, own[stage]) + self.gradient_copies(point, stage) for stage in stages
            ),
            send=tuple(self.send_seconds(point, edge) for edge in pairwise(stages)),
            activations=tuple(
                of.kept(segments, recomputed) + self._wires.kept(segments, dtype, point.micro_batch)
                for segments, recomputed in zip(own, again, strict=True)
            ),
            held_by_weight=tuple(sum(of.held_by_weight[segment] for segment in segments) for segments in own),
        )


def _never_growing(costs: Costs, whole: bool) -> Costs:
    pairs = list(zip(costs.activations, costs.held_by_weight, strict=True))
    return replace(
        costs,
        activations=costs.activations if whole else tuple(max(pair) for pair in pairs),
        held_by_weight=tuple(min(pair) for pair in pairs) if whole else costs.held_by_weight,
    )


def pipe_of(point: Point) -> Pipe:
    """The pipeline of a point that has one. Raises ValueError for others."""
    if point.pipe is None:
        raise ValueError("this point has no pipeline")
    return point.pipe


def slowest_link(cluster: ClusterSpec, copies: int, one: int, other: int) -> LevelSpec | None:
    """The level that messages between two ranks of a pipeline go over, where devices rank * copies .. + copies - 1 have
    the same stages: the slowest that any pair of them needs; None on one rank."""
    slowest, below = None, 1
    for level in cluster.levels:
        inner, below = below, below * level.size
        apart = any(
            (one * copies + each) // inner != (other * copies + each) // inner
            and (one * copies + each) // below == (other * copies + each) // below
            for each in range(copies)
        )
        if apart:
            slowest = level
    return slowest


def segment_costs(
    profile: ModelProfile,
    dtype: ComputeDtypeName,
    micro_batch: int,
    device: DeviceSpec,
    wiring: Wiring = UNWIRED,
) -> SegmentCosts:
    """Seconds as planner/compute.py has them, of the two halves of backward each on its own: all that is exchanged
    belongs to F and I."""
    halves = [
        model_work(_half(profile, dtype, deferred), dtype, micro_batch, device, hooked=False, wiring=wiring)
        for deferred in (False, True)
    ]
    units = [(unit, now, later) for unit, now, later in zip(profile.units, *halves, strict=True)]
    segments = [each for each in units for _ in range(each[0].count)]
    costs = [unit.costs[dtype] for unit, *_ in segments]
    return SegmentCosts(
        forward=tuple(now.forward for _, now, _ in segments),
        input_gradient=tuple(now.backward for _, now, _ in segments),
        weight_gradient=tuple(later.backward for *_, later in segments),
        recompute=tuple(now.recompute if unit.kind == "block" else 0.0 for unit, now, _ in segments),
        exchanged_again=tuple(now.exchanged_again if unit.kind == "block" else NOTHING for unit, now, _ in segments),
        saved=tuple(cost.saved["none"].at(micro_batch) for cost in costs),
        saved_inputs=tuple(cost.saved["full"].at(micro_batch) for cost in costs),
        held_by_weight=tuple(_held(cost, micro_batch) for cost in costs),
    )


def is_deferred(operator: Operator) -> bool:
    """Whether W runs it ([Note: what W is])."""
    linear = operator.kind == "matmul" and not any(other in operator.name for other in _OTHERS)
    return linear and operator.phase == "weight_gradient"


def _held(cost: UnitCost, micro_batch: int) -> int:
    if not any(map(is_deferred, cost.operators)):
        return 0
    return cost.held_by_weight.at(micro_batch) or cost.saved["none"].at(micro_batch)


def _half(profile: ModelProfile, dtype: ComputeDtypeName, deferred: bool) -> ModelProfile:
    """The model with only the operators that are deferred, or with all the others."""

    def of(unit: Unit) -> Unit:
        cost = unit.costs[dtype]
        operators = tuple(operator for operator in cost.operators if is_deferred(operator) is deferred)
        exchanges = () if deferred else cost.exchanges
        return replace(unit, costs={dtype: replace(cost, operators=operators, exchanges=exchanges)})

    return replace(profile, units=tuple(map(of, profile.units)))


def _seconds(works: Sequence[Work], segments: Iterable[int]) -> float:
    return sum(works[segment].seconds for segment in segments)
