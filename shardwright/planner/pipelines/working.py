"""Bytes of activations that a stage needs only while one of its actions runs.

They are counted on top of what the micro-batches in flight keep, the one that runs included ([Note: memory of an
action]): F holds all that it will keep from its start, I lets go of it at its end. A unit of the model is as
planner/activations.py has it. Where backward is cut in two, gradients of outputs of linear layers stay where backward
would have dropped them: as large a share of what W will find as the unit has gone through its parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from shardwright.planner.activations import ActivationBytes, Backward, UnitBytes
from shardwright.planner.groups import Groups
from shardwright.planner.pipelines.costs import SegmentCosts
from shardwright.planner.precisions import PRECISIONS, Precision
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile


class Need(NamedTuple):
    """The most that an action needs."""

    bytes: int
    in_head: bool
    """Whether head or loss need it."""


@dataclass(frozen=True, slots=True)
class Working:
    """Of the actions of one stage."""

    forward: Need
    backward: Need
    """Of I or B."""
    first_backward: Need
    """The same where its gradients' buffers are made meanwhile, these included."""
    weight: Need


class WorkingSets:
    """Of all stages of one job."""

    def __init__(self, profile: ModelProfile, groups: Groups) -> None:
        self._units: Callable[[ComputeDtypeName, int], list[UnitBytes]] = lru_cache(maxsize=None)(
            lambda dtype, micro_batch: _by_segment(ActivationBytes.of(profile, dtype, micro_batch))
        )
        sizes = groups.sizes(1)
        outside = groups.outside
        self._numel = [0, *sizes.block_numels, outside.head_numel]
        self._largest = [outside.embedding_largest, *sizes.block_largest, outside.head_largest]

    def of(
        self,
        costs: SegmentCosts,
        own: range,
        again: range,
        *,
        precision: Precision,
        micro_batch: int,
        splits: bool,
        buffers: dict[int, int],
    ) -> Working:
        """A stage of the segments `own`, of which `again` are checkpointed.

        `splits`: backward is cut in two. `buffers`: bytes of gradient buffers that each segment's backward makes.
        """
        units = self._units(PRECISIONS[precision].compute, micro_batch)
        element = PRECISIONS[precision].compute_bytes
        plain, fresh = self._backward(costs, units, own, again, element, splits, buffers)
        return Working(
            forward=_forward(costs, units, own, again),
            backward=plain,
            first_backward=fresh,
            # The embedding's gradient is made by I, and by B all are.
            weight=Need(element * max((self._largest[each] for each in own if each and splits), default=0), False),
        )

    def _backward(
        self,
        costs: SegmentCosts,
        units: list[UnitBytes],
        own: range,
        again: range,
        element: int,
        splits: bool,
        buffers: dict[int, int],
    ) -> tuple[Need, Need]:
        """The units from the last to the first; those that are done have let go of what they kept."""
        last = len(units) - 1
        plain = fresh = Need(0, False)
        change = made = 0
        for segment in reversed(own):
            unit, held = units[segment], costs.held_by_weight[segment] if splits else 0
            moments = unit.recompute if segment in again else unit.backward
            for moment in moments:
                begun = moment.gradients is None or moment.gradients > 0
                new = element * self._largest[segment] if begun and (segment == 0 or not splits) else 0
                queued = round(held * self._share(segment, moment))
                entering = 0 if segment == last else unit.output
                need = change + moment.bytes + entering + queued + new
                plain = max(plain, Need(need, segment == last))
                fresh = max(fresh, Need(need + made + (buffers.get(segment, 0) if begun else 0), segment == last))
            change += held - costs.kept_by(segment, again)
            made += buffers.get(segment, 0)
        return plain, max(fresh, Need(made, False))

    def _share(self, segment: int, moment: Backward) -> float:
        """The part of a unit's parameters that backward has gone through."""
        if moment.gradients is None or not self._numel[segment]:
            return 1.0
        return min(1.0, moment.gradients / self._numel[segment])


def _forward(costs: SegmentCosts, units: list[UnitBytes], own: range, again: range) -> Need:
    kept = [costs.kept_by(segment, again) for segment in own]
    before, most = -sum(kept), Need(0, False)
    for segment, bytes_ in zip(own, kept, strict=True):
        entering = units[segment - 1].output if segment else 0
        most = max(most, Need(before + entering + units[segment].forward_peak, segment == len(units) - 1))
        before += bytes_
    return most


def _by_segment(activations: ActivationBytes) -> list[UnitBytes]:
    groups = (activations.embedding, activations.blocks, activations.head)
    return [unit for group in groups for unit in group for _ in range(unit.count)]
