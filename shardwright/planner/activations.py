"""Activation bytes at the moments of a step at which memory may peak, whatever engine runs it.

The profile says who counts what ([Note: who counts a boundary] in schemas/profile.py). Within a run of equal blocks
everything is linear in the block's position, but for the model's first blocks, before which nothing is prefetched, and
its last, behind which nothing is being reduced: so the worst is among the blocks at either end of a run, two for
engines that are one block ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from shardwright.schemas.profile import ComputeDtypeName, ModelProfile, Policy, Unit, UnitCost

MomentName = Literal[
    "root gather",
    "embedding forward",
    "block gather",
    "block forward",
    "second copy",
    "head and loss",
    "loss backward",
    "head backward",
    "backward gather",
    "block backward",
    "gradient reduction",
    "embedding backward",
    "root gradient reduction",
]
"""In the order of a step. `block gather` and `backward gather`: a block's parameters are gathered before its forward or
backward. `second copy`: after its forward, a part of them is copied before they are freed. `loss backward`: before
the gradient of what the model returned is known. `gradient reduction`: a block's backward has ended, its gradients
are handed over."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Activations alive at one moment, in bytes."""

    name: MomentName
    block: int
    """Index of the block that runs; -1 elsewhere."""
    saved: int
    """Kept for backward by units before this one, with what enters this one."""
    temporaries: int
    """Alive only while this unit runs."""
    recomputes: bool = False
    """Whether this is the backward of a checkpointed block, which more checkpointing does not make smaller."""
    gradients: int | None = 0
    """Elements of this unit's parameters whose gradients exist; None for all of them."""
    in_loss: bool = False
    """Whether the model has returned, and its backward has not begun."""


class Backward(NamedTuple):
    """A moment of a unit's backward (`BackwardMoment` of the profile) at one micro-batch."""

    bytes: int
    gradients: int | None
    in_loss: bool


@dataclass(frozen=True, slots=True)
class UnitBytes:
    """Activation bytes of a unit at one micro-batch in one compute dtype."""

    count: int
    saved: int
    saved_inputs: int
    """What it keeps when blocks are checkpointed: a block itself, what is outside of them when any block is."""
    forward_peak: int
    forward_in_model: int
    """Of a head: `forward_peak` until the model has returned."""
    backward: tuple[Backward, ...]
    recompute: tuple[Backward, ...]
    """`backward` under checkpointing."""
    output: int

    def kept(self, checkpointed: int) -> int:
        """What embedding or head keep when so many blocks are checkpointed."""
        return self.saved_inputs if checkpointed else self.saved


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """All units of a model at one micro-batch in one compute dtype."""

    embedding: tuple[UnitBytes, ...]
    blocks: tuple[UnitBytes, ...]
    head: tuple[UnitBytes, ...]

    @classmethod
    def of(cls, profile: ModelProfile, dtype: ComputeDtypeName, micro_batch: int) -> ActivationBytes:
        """Evaluate the profile's affine bytes."""
        kinds: dict[str, list[UnitBytes]] = {"embedding": [], "block": [], "head": []}
        for unit in profile.units:
            kinds[unit.kind].append(_evaluate(unit, dtype, micro_batch))
        return cls(tuple(kinds["embedding"]), tuple(kinds["block"]), tuple(kinds["head"]))

    def moments(self, checkpointed: int, ends: int = 2) -> Iterator[Moment]:
        """Every moment at which memory may peak when the first `checkpointed` blocks are recomputed, in so many blocks
        at either end of a run."""
        runs = self._runs(checkpointed)
        yield Moment("root gather", -1, 0, 0)
        for unit in self.embedding:
            yield Moment("embedding forward", -1, 0, unit.forward_peak)
        for run in runs:
            for block in run.ends(ends):
                alive = run.before + (block - run.first) * run.saved + run.output
                yield Moment("block gather", block, alive, 0)
                yield Moment("block forward", block, alive, run.forward_peak)
                yield Moment("second copy", block, alive + run.saved, 0)
        yield from self.head_moments(checkpointed)
        for run in runs:
            for block in run.ends(ends):
                yield from run.backward_of(block)
        for unit in self.embedding:
            for bytes_, gradients, _ in unit.backward:
                saved = unit.kept(checkpointed)
                yield Moment("embedding backward", -1, saved, bytes_ + unit.output, gradients=gradients)
        yield Moment("root gradient reduction", -1, 0, 0)

    def head_moments(self, checkpointed: int) -> Iterator[Moment]:
        """The moments of the head's forward and backward, when everything is alive that blocks keep."""
        runs = self._runs(checkpointed)
        start = sum(unit.kept(checkpointed) for unit in self.embedding)
        end = runs[-1].before + runs[-1].count * runs[-1].saved if runs else start
        boundary = runs[-1].output if runs else 0
        for unit in self.head:
            in_loss = any(moment.in_loss for moment in unit.backward)
            yield Moment("head and loss", -1, end + boundary, unit.forward_peak, in_loss=in_loss)
            yield Moment("head and loss", -1, end + boundary, unit.forward_in_model)
            for bytes_, gradients, in_loss in unit.backward:
                name: MomentName = "loss backward" if in_loss else "head backward"
                alive = unit.kept(checkpointed) + bytes_
                yield Moment(name, -1, end, alive, gradients=gradients, in_loss=in_loss)

    def _runs(self, checkpointed: int) -> Sequence[_Run]:
        """The blocks as runs of equal ones; the run in which checkpointing ends is divided there."""
        runs: list[_Run] = []
        first, before = 0, sum(unit.kept(checkpointed) for unit in self.embedding)
        for unit in self.blocks:
            full = min(unit.count, max(0, checkpointed - first))
            for count, recomputed in ((full, True), (unit.count - full, False)):
                if count == 0:
                    continue
                saved = unit.saved_inputs if recomputed else unit.saved
                backward = unit.recompute if recomputed else unit.backward
                runs.append(_Run(first, count, before, saved, unit.forward_peak, backward, unit.output, recomputed))
                first, before = first + count, before + count * saved
        return runs


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive equal blocks under one checkpointing policy."""

    first: int
    count: int
    before: int
    """Saved by everything before the run."""
    saved: int
    forward_peak: int
    backward: tuple[Backward, ...]
    output: int
    recomputed: bool

    def backward_of(self, block: int) -> Iterator[Moment]:
        """The backward of one of its blocks, and what follows."""
        before = self.before + (block - self.first) * self.saved
        yield Moment("backward gather", block, before + self.saved, self.output, self.recomputed)
        for bytes_, gradients, _ in self.backward:
            alive = bytes_ + self.output
            yield Moment("block backward", block, before + self.saved, alive, self.recomputed, gradients)
        yield Moment("gradient reduction", block, before, self.output)

    def ends(self, blocks: int) -> tuple[int, ...]:
        """So many blocks at either end, each once."""
        inside = range(self.first, self.first + self.count)
        return tuple(dict.fromkeys((*inside[:blocks], *inside[-blocks:])))


def _evaluate(unit: Unit, dtype: ComputeDtypeName, micro_batch: int) -> UnitBytes:
    cost = unit.costs[dtype]
    return UnitBytes(
        count=unit.count,
        saved=cost.saved["none"].at(micro_batch),
        saved_inputs=cost.saved["full"].at(micro_batch),
        forward_peak=cost.forward_peak.at(micro_batch),
        forward_in_model=cost.forward_in_model.at(micro_batch),
        backward=_backward(cost, "none", micro_batch),
        recompute=_backward(cost, "full", micro_batch),
        output=cost.output.at(micro_batch),
    )


def _backward(cost: UnitCost, policy: Policy, micro_batch: int) -> tuple[Backward, ...]:
    """The moments of a backward. A profile that states none has everything alive at once."""
    if policy not in cost.backward_moments:
        return (Backward(cost.backward_peak[policy].at(micro_batch), None, False),)
    return tuple(
        Backward(moment.bytes.at(micro_batch), moment.gradients, moment.in_loss)
        for moment in cost.backward_moments[policy]
    )
