"""From runs at three micro-batches to costs that are affine in the micro-batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from shardwright.passes.record import Event
from shardwright.schemas.profile import Affine, Operator, Phase

_Shapes = tuple[tuple[int, ...], ...]
_Key = tuple[object, ...]
_NOTHING = Affine(0, 0)


class NotAffine(Exception):
    """A quantity that does not grow linearly ([Note: affine in the micro-batch])."""


def fit(values: Sequence[int], what: str) -> Affine:
    """The line through the values at micro-batch 2 and 3. Raises NotAffine if one at 4 does not lie on it."""
    two, three, *more = values
    for four in more:
        if four - three != three - two:
            raise NotAffine(f"{what} {two}, {three} and {four} at micro-batch 2, 3 and 4")
    return Affine(3 * two - 2 * three, three - two)


def fit_peak(rises: Sequence[Sequence[int]], phase: str) -> Affine:
    """A line above every moment's line, at least 0: exact if one moment is the highest at every micro-batch, otherwise
    exact at micro-batch 1 and with the steepest moment's slope."""
    return highest([Affine(0, 0), *fit_moments(rises, phase)])


def fit_moments(rises: Sequence[Sequence[int]], phase: str) -> list[Affine]:
    """The line of each moment."""
    if len({len(moments) for moments in rises}) > 1:
        raise NotAffine(f"{phase} makes more allocations at one micro-batch than at another")
    return [fit(moment, f"the bytes alive in {phase} are") for moment in zip(*rises, strict=True)]


def highest(lines: Sequence[Affine]) -> Affine:
    """The line that `fit_peak` takes for these moments."""
    slope = max(line.slope for line in lines)
    return Affine(max(line.at(1) for line in lines) - slope, slope)


@dataclass(frozen=True, slots=True)
class _Label:
    """How an event of backward is divided between input and weight gradient."""

    to_input: Fraction

    def phases(self) -> list[tuple[Phase, Fraction]]:
        shares: list[tuple[Phase, Fraction]] = [
            ("input_gradient", self.to_input),
            ("weight_gradient", 1 - self.to_input),
        ]
        return [(phase, share) for phase, share in shares if share]


def labels(backward: Sequence[Event], input_only: Sequence[Event]) -> list[_Label]:
    """Tells input gradient from weight gradient by what runs when only the inputs' gradients are asked for
    ([Note: input and weight gradient])."""

    def key(event: Event) -> tuple[object, ...]:
        return event.node, event.name, event.shapes, event.strides

    left = Counter(map(key, input_only))
    flops = {key(event): event.flops for event in input_only}
    found = []
    for event in backward:
        if left[key(event)] == 0:
            found.append(_Label(Fraction(0)))
            continue
        left[key(event)] -= 1
        found.append(_Label(Fraction(flops[key(event)], event.flops) if event.flops else Fraction(1)))
    return found


@dataclass(frozen=True, slots=True)
class Merged:
    """The operators of a unit, equal ones merged."""

    operators: tuple[Operator, ...]
    of_forward: tuple[int, ...]
    """The operator that each event of forward belongs to."""


def operators(
    forward: Sequence[Sequence[Event]],
    backward: Sequence[Sequence[Event]],
    input_only: Sequence[Event],
    results: Sequence[tuple[Affine, Affine]] = (),
) -> Merged:
    """The operators of a unit from its events at each micro-batch. `results` are, of every event of forward,
    `Operator.results` and `Operator.kept`."""
    merged: dict[_Key, Operator] = {}
    aligned = _aligned(forward, "forward")
    for events, (made, kept) in zip(aligned, results or [(_NOTHING, _NOTHING)] * len(aligned), strict=True):
        _merge(merged, events[0], _operator("forward", events, Fraction(1), made, kept))
    for events, division in zip(_aligned(backward, "backward"), labels(backward[0], input_only), strict=True):
        for phase, share in division.phases():
            _merge(merged, events[0], _operator(phase, events, share, _NOTHING, _NOTHING))
    places = {key: at for at, key in enumerate(merged)}
    return Merged(tuple(merged.values()), tuple(places[_key("forward", events[0])] for events in aligned))


def _aligned(runs: Sequence[Sequence[Event]], phase: str) -> list[tuple[Event, ...]]:
    names = [[(event.name, event.module) for event in run] for run in runs]
    if any(other != names[0] for other in names[1:]):
        raise NotAffine(f"{phase} runs other operators at one micro-batch than at another")
    return list(zip(*runs, strict=True))


def _operator(phase: Phase, events: Sequence[Event], share: Fraction, results: Affine, kept: Affine) -> Operator:
    first = events[0]
    what = f"{first.name} in {first.module or 'the unit itself'}"
    return Operator(
        name=first.name,
        module=first.module,
        phase=phase,
        kind=first.kind,
        count=1,
        flops=fit([int(event.flops * share) for event in events], f"the FLOPs of {what} are"),
        bytes=fit([int(event.bytes * share) for event in events], f"the bytes moved by {what} are"),
        shapes=_shapes_at_one(events[0].shapes, events[1].shapes),
        dtype=first.dtype,
        results=results,
        kept=kept,
    )


def _key(phase: Phase, event: Event) -> _Key:
    return event.name, event.module, phase, event.shapes, event.dtype


def _merge(merged: dict[_Key, Operator], event: Event, one: Operator) -> None:
    """Adds one call's operator to its equals."""
    same = merged.setdefault(_key(one.phase, event), one)
    if same is not one:
        merged[_key(one.phase, event)] = replace(
            one,
            count=same.count + 1,
            flops=same.flops.plus(one.flops),
            bytes=same.bytes.plus(one.bytes),
            results=same.results.plus(one.results),
            kept=same.kept.plus(one.kept),
        )


def _shapes_at_one(two: _Shapes, three: _Shapes) -> _Shapes:
    pairs = zip(two, three, strict=True)
    return tuple(tuple(2 * a - b for a, b in zip(at_two, at_three, strict=True)) for at_two, at_three in pairs)
