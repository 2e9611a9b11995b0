"""Activation bytes at the moments of a step at which memory may peak, whatever engine runs it.

The profile says who counts what ([Note: who counts a boundary] in schemas/profile.py). Within a run of equal blocks
everything is linear in the block's position, but for the model's first block, before which nothing is prefetched, and
its last, behind which nothing is being reduced: so the worst is among the two blocks at either end of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from shardwright.schemas.profile import ComputeDtypeName, ModelProfile, Unit

MomentName = Literal[
    "embedding forward",
    "block forward",
    "head and loss",
    "loss backward",
    "head backward",
    "block backward",
    "gradient reduction",
    "embedding backward",
    "root gradient reduction",
]
"""In the order of a step. `loss backward`: before the head's parameters have gradients. `gradient reduction`: a block's
backward has ended, its gradients are handed over."""


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


@dataclass(frozen=True, slots=True)
class UnitBytes:
    """Activation bytes of a unit at one micro-batch in one compute dtype."""

    count: int
    saved: int
    saved_inputs: int
    """Of `saved`, what checkpointing keeps."""
    forward_peak: int
    backward_peak: int
    recompute_peak: int
    """`backward_peak` under checkpointing."""
    output: int


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

    def moments(self, checkpointed: int) -> Iterator[Moment]:
        """Every moment at which memory may peak when the first `checkpointed` blocks are recomputed."""
        runs = self._runs(checkpointed)
        start = sum(unit.saved for unit in self.embedding)
        end = runs[-1].before + runs[-1].count * runs[-1].saved if runs else start
        for unit in self.embedding:
            yield Moment("embedding forward", -1, 0, unit.forward_peak)
        for run in runs:
            alive = run.before + (run.count - 1) * run.saved + run.output
            yield Moment("block forward", run.first + run.count - 1, alive, run.forward_peak)
        boundary = runs[-1].output if runs else 0
        for unit in self.head:
            yield Moment("head and loss", -1, end + boundary, unit.forward_peak)
            # The loss holds float32 logits and their gradient. When the head's own gradients are made, one of the two
            # is gone: at most half is left. A model without blocks is one head, of which nothing of the kind is known.
            rest = unit.backward_peak // 2 if self.blocks else unit.backward_peak
            yield Moment("loss backward", -1, end, unit.saved + unit.backward_peak)
            yield Moment("head backward", -1, end, unit.saved + rest)
        for run in runs:
            for block in run.ends():
                before = run.before + (block - run.first) * run.saved
                temporaries = run.backward_peak + run.output
                yield Moment("block backward", block, before + run.saved, temporaries, run.recomputed)
                yield Moment("gradient reduction", block, before, run.output)
        for unit in self.embedding:
            yield Moment("embedding backward", -1, unit.saved, unit.backward_peak + unit.output)
        yield Moment("root gradient reduction", -1, 0, 0)

    def _runs(self, checkpointed: int) -> Sequence[_Run]:
        """The blocks as runs of equal ones; the run in which checkpointing ends is divided there."""
        runs: list[_Run] = []
        first, before = 0, sum(unit.saved for unit in self.embedding)
        for unit in self.blocks:
            full = min(unit.count, max(0, checkpointed - first))
            for count, recomputed in ((full, True), (unit.count - full, False)):
                if count == 0:
                    continue
                saved = unit.saved_inputs if recomputed else unit.saved
                backward = unit.recompute_peak if recomputed else unit.backward_peak
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
    backward_peak: int
    output: int
    recomputed: bool

    def ends(self) -> tuple[int, ...]:
        """The two blocks at either end, each once."""
        last = self.first + self.count - 1
        return tuple(sorted({self.first, min(self.first + 1, last), max(last - 1, self.first), last}))


def _evaluate(unit: Unit, dtype: ComputeDtypeName, micro_batch: int) -> UnitBytes:
    cost = unit.costs[dtype]
    return UnitBytes(
        count=unit.count,
        saved=cost.saved["none"].at(micro_batch),
        saved_inputs=cost.saved["full"].at(micro_batch),
        forward_peak=cost.forward_peak.at(micro_batch),
        backward_peak=cost.backward_peak["none"].at(micro_batch),
        recompute_peak=cost.backward_peak["full"].at(micro_batch),
        output=cost.output.at(micro_batch),
    )
