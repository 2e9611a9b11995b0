"""What a block costs when it is checkpointed and keeps the results of chosen operators.

[Note: keeping]
A checkpointed block keeps its inputs, and recomputes in backward everything before its last saved tensor. Selective
checkpointing (`torch.utils.checkpoint.create_selective_checkpoint_contexts`) also keeps the results of chosen operators
and does not run those again: bytes for work. Bytes and work both add up over the operators. The peak of backward does
not, but follows exactly from the order of the calls: at each call that runs again, the bytes alive are those under
`full` less what the kept calls up to there would have made anew (their results were alive before backward began, and
have since gone where `full` has them gone). A kept result that leaves the block is counted by the unit that it enters,
whose backward is over by then: the peak has it instead.

The choice is made for a merged `Operator`: all calls of one aten operator in one module with the same shapes and dtype
(the products of queries and of keys with the rotary tables, where both have as many heads) are kept together or not at
all. For these choices bytes and work are exact, and the peak is as exact as `UnitCost.backward_peak` is: to the byte
if one moment is the highest at every micro-batch, else at micro-batch 1, and an upper bound above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce

from shardwright.schemas.profile import KEPT_BY_SELECTIVE, Affine, BackwardMoment, Operator, Policy, UnitCost

_NOTHING = Affine(0, 0)
Choice = Callable[[Operator], bool]
"""Whether the results of an operator of forward are kept."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """A block under one choice of what is kept, or without checkpointing."""

    saved: Affine
    """Bytes from forward to backward."""
    backward_moments: tuple[BackwardMoment, ...]
    """As `UnitCost.backward_moments`."""
    recomputed: tuple[Operator, ...]
    """What runs again in backward; counts, FLOPs and bytes are of the calls that do."""
    leaving: Affine = _NOTHING
    """Bytes of kept results that leave the block: the next block counts them among its inputs. After the last block,
    they come on top if the head does not keep them."""

    @classmethod
    def of(cls, cost: UnitCost, keep: Choice) -> Keeping:
        """A checkpointed block ([Note: keeping]). Operators without `results` cannot be kept, whatever `keep` says."""
        chosen = {at for at, op in enumerate(cost.operators) if can_keep(op) and keep(op)}
        results = _sum(cost.operators[at].results for at in chosen)
        elsewhere = _sum(call.elsewhere for call in cost.calls if call.operator in chosen)
        return cls(
            saved=cost.saved["full"].plus(_less(results, elsewhere)),
            backward_moments=_moments(cost, chosen, elsewhere.plus(cost.crossing)),
            recomputed=_recomputed(cost, chosen),
            leaving=elsewhere,
        )

    @classmethod
    def named(cls, cost: UnitCost, policy: Policy) -> Keeping:
        """A block under one of the profile's own policies. `selective` and `full` are chosen here anew, and agree with
        what the profile has of them."""
        if policy == "none":
            return cls(cost.saved["none"], cost.backward_moments["none"], ())
        return cls.of(cost, NAMED[policy])

    @property
    def backward_peak(self) -> Affine:
        """As `UnitCost.backward_peak`: the line above all moments."""
        slope = max(moment.bytes.slope for moment in self.backward_moments)
        return Affine(max(moment.bytes.at(1) for moment in self.backward_moments) - slope, slope)

    def flops(self, micro_batch: int) -> int:
        """Work that runs again, in FLOPs."""
        return sum(op.flops.at(micro_batch) for op in self.recomputed)


def keep_nothing(_: Operator) -> bool:
    """Full checkpointing."""
    return False


def keep_products(op: Operator) -> bool:
    """Selective checkpointing: the results of matrix products and of attention."""
    return op.kind in KEPT_BY_SELECTIVE


NAMED: dict[Policy, Choice] = {"selective": keep_products, "full": keep_nothing}
"""The choices behind the policies that checkpoint."""


def can_keep(op: Operator) -> bool:
    """Whether the results of an operator can be kept, and keeping them takes memory."""
    return op.phase == "forward" and op.results != _NOTHING


def _moments(cost: UnitCost, chosen: set[int], more: Affine) -> tuple[BackwardMoment, ...]:
    """Every moment of backward, with so many bytes more, but for those that another one exceeds in everything.
    Forward runs again at once, so no gradient of a parameter is made meanwhile."""
    made = max((moment.gradients for moment in cost.moments_before), default=0)
    moments, taken = [BackwardMoment(_NOTHING, 0, False), *cost.moments_before], _NOTHING
    for call in cost.calls:
        if call.again:
            taken = taken.plus(call.results) if call.operator in chosen else taken
            moments.append(BackwardMoment(_less(call.alive, taken), made, False))
    moments += [moment._replace(bytes=_less(moment.bytes, taken)) for moment in cost.moments_after]
    distinct = list(dict.fromkeys(moment._replace(bytes=moment.bytes.plus(more)) for moment in moments))
    return tuple(one for one in distinct if not any(_exceeds(other, one) for other in distinct if other is not one))


def _exceeds(other: BackwardMoment, one: BackwardMoment) -> bool:
    """Whether `other` holds at least as much as `one` of everything."""
    lines = other.bytes.at(1) >= one.bytes.at(1) and other.bytes.slope >= one.bytes.slope
    return lines and other.gradients >= one.gradients


def _recomputed(cost: UnitCost, chosen: set[int]) -> tuple[Operator, ...]:
    once = {(op.name, op.module, op.shapes, op.dtype): op for op in cost.not_recomputed}
    found = []
    for at, op in enumerate(cost.operators):
        skipped = once.get((op.name, op.module, op.shapes, op.dtype))
        if op.phase != "forward" or at in chosen or (skipped is not None and skipped.count == op.count):
            continue
        if skipped is not None:
            op = replace(
                op,
                count=op.count - skipped.count,
                flops=_less(op.flops, skipped.flops),
                bytes=_less(op.bytes, skipped.bytes),
            )
        found.append(op)
    return tuple(found)


def _sum(lines: Iterable[Affine]) -> Affine:
    return reduce(Affine.plus, lines, Affine(0, 0))


def _less(line: Affine, other: Affine) -> Affine:
    return Affine(line.constant - other.constant, line.slope - other.slope)
