"""Costs of a unit with every amount, or every operator, changed alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from shardwright.schemas.profile import Affine, BackwardMoment, Call, Edge, Operator, Policy, UnitCost

Line = Callable[[Affine], Affine]
NOTHING = Affine(0, 0)


def part_of(line: Affine, degree: int) -> Affine:
    """What one of so many processes has of an amount that grows with the tokens: what does not grow, weights above all,
    it has whole."""
    return Affine(line.constant, -(-line.slope // degree))


def more(line: Affine, factor: float) -> Affine:
    """So many times as much."""
    return Affine(round(line.constant * factor), round(line.slope * factor))


def total(lines: Iterable[Affine]) -> Affine:
    """The sum."""
    result = NOTHING
    for line in lines:
        result = result.plus(line)
    return result


def with_operators(cost: UnitCost, of: Callable[[Operator], Operator]) -> UnitCost:
    """The cost with every operator changed."""
    return replace(
        cost,
        operators=tuple(map(of, cost.operators)),
        not_recomputed=tuple(map(of, cost.not_recomputed)),
    )


def with_bytes(cost: UnitCost, of: Line) -> UnitCost:
    """The cost with all bytes of activations changed, those of the operators' results included, and those that are told
    one another; but not what the operators do."""

    def moments(found: Iterable[BackwardMoment]) -> tuple[BackwardMoment, ...]:
        return tuple(moment._replace(bytes=of(moment.bytes)) for moment in found)

    def call(each: Call) -> Call:
        return replace(each, results=of(each.results), elsewhere=of(each.elsewhere), alive=of(each.alive))

    policies: dict[Policy, Affine] = cost.saved
    return replace(
        with_operators(cost, lambda each: replace(each, results=of(each.results), kept=of(each.kept))),
        saved={policy: of(line) for policy, line in policies.items()},
        output=of(cost.output),
        forward_peak=of(cost.forward_peak),
        forward_in_model=of(cost.forward_in_model),
        backward_peak={policy: of(line) for policy, line in cost.backward_peak.items()},
        backward_moments={policy: moments(found) for policy, found in cost.backward_moments.items()},
        calls=tuple(map(call, cost.calls)),
        moments_before=moments(cost.moments_before),
        moments_after=moments(cost.moments_after),
        crossing=of(cost.crossing),
        held_by_weight=of(cost.held_by_weight),
        exchanges=tuple(replace(each, bytes=of(each.bytes)) for each in cost.exchanges),
    )


def with_peaks(cost: UnitCost, bytes_more: Affine) -> UnitCost:
    """The cost with so many bytes more at every moment of forward and backward."""
    return replace(
        cost,
        forward_peak=cost.forward_peak.plus(bytes_more),
        forward_in_model=cost.forward_in_model.plus(bytes_more) if cost.forward_in_model != NOTHING else NOTHING,
        backward_peak={policy: line.plus(bytes_more) for policy, line in cost.backward_peak.items()},
        backward_moments={
            policy: tuple(each._replace(bytes=each.bytes.plus(bytes_more)) for each in moments)
            for policy, moments in cost.backward_moments.items()
        },
        moments_before=tuple(each._replace(bytes=each.bytes.plus(bytes_more)) for each in cost.moments_before),
        moments_after=tuple(each._replace(bytes=each.bytes.plus(bytes_more)) for each in cost.moments_after),
    )


def with_saved(cost: UnitCost, bytes_more: Affine, policies: Iterable[Policy]) -> UnitCost:
    """The cost with so many bytes more kept from forward to backward."""
    saved = {name: line.plus(bytes_more) if name in policies else line for name, line in cost.saved.items()}
    return replace(cost, saved=saved)


def sent(edge: Edge, degree: int) -> Edge:
    """What one of so many processes sends of an edge between blocks. What the embedding makes and what the head takes
    is whole."""
    inside = {"embedding", "head"}.isdisjoint((edge.source, edge.target))
    return replace(edge, bytes=-(-edge.bytes // degree)) if inside else edge
