"""The moments of a backward at which memory may peak, whatever the engine does with parameter gradients.

Bytes of activations and elements of parameter gradients are kept apart: an engine holds gradients whole or in shards,
in bf16 or fp32, and may hold those of other units beside them. While a backward goes on, activations are freed and
gradients appear, so which moment is the worst depends on what an element of a gradient costs. The moments that are
worst at some price are among those that no other moment exceeds in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardwright.passes.fit import NotAffine, fit
from shardwright.passes.record import Recording
from shardwright.passes.unit_run import UnitRun
from shardwright.schemas.profile import Affine, BackwardMoment, Policy


class Instant(NamedTuple):
    """A moment of backward at one micro-batch."""

    bytes: int
    gradients: int
    in_loss: bool


def block_instants(run: UnitRun, policy: Policy) -> list[Instant]:
    """The moments of a block's backward. Where forward runs again in between, gradients are made after it."""
    rises, gradients = run.backward_rises[policy], run.gradients
    if len(rises) != len(gradients):
        after = len(gradients) - len(run.replay.after)
        made_before = gradients[after - 1] if after else 0
        gradients = [made_before] * (len(rises) - len(run.replay.after)) + gradients[after:]
    return [Instant(size, made, False) for size, made in zip(rises, gradients, strict=True)]


def outside_instants(backward: Recording, region: str) -> list[Instant]:
    """The moments of backward in a region outside the blocks."""
    pairs = zip(backward.rises(region), backward.of(region), strict=True)
    return [Instant(rise, moment.gradients, moment.in_loss) for rise, moment in pairs]


def rises_in_model(forward: Recording, region: str) -> list[int]:
    """Bytes alive in forward beyond what was alive before the region, until the model has returned."""
    pairs = zip(forward.rises(region), forward.of(region), strict=True)
    return [rise for rise, moment in pairs if not moment.in_loss]


def worst_moments(runs: Sequence[Sequence[Instant]], more: Affine) -> tuple[BackwardMoment, ...]:
    """The moments of the runs at three micro-batches, in order, but for those that another one exceeds at every
    micro-batch, each with so many bytes more. Raises NotAffine as `fit` does."""
    if len({len(instants) for instants in runs}) > 1:
        raise NotAffine("backward makes more allocations at one micro-batch than at another")
    moments = [BackwardMoment(more, 0, bool(runs[0]) and runs[0][0].in_loss)]
    for instants in zip(*runs, strict=True):
        line = fit([instant.bytes for instant in instants], "the bytes alive in backward are")
        size = line.plus(more)
        moments.append(BackwardMoment(size, instants[0].gradients, instants[0].in_loss))
    distinct = list(dict.fromkeys(moments))
    return tuple(one for one in distinct if not any(_exceeds(other, one) for other in distinct if other is not one))


def _exceeds(other: BackwardMoment, one: BackwardMoment) -> bool:
    """Whether `other` holds at least as much as `one` of everything."""
    return (
        other.in_loss == one.in_loss
        and other.bytes.at(1) >= one.bytes.at(1)
        and other.bytes.slope >= one.bytes.slope
        and other.gradients >= one.gradients
    )
