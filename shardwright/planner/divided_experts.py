"""What one of the processes that share the experts of each layer does of a unit, and what they tell one another.

Every process has its part of the experts, and computes what all of them send there: on average as much as it would
alone, on the fullest `imbalance` times that. The exchanges are those of the runtime's experts.py: how many rows travel,
tokens and weights to the experts, results back, and the gradients of each the other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardwright.planner.divided_costs import more, total, with_operators, with_peaks, with_saved
from shardwright.schemas.profile import (
    Affine,
    BackwardMoment,
    ComputeDtypeName,
    Exchange,
    ExpertLayer,
    Operator,
    Parameter,
    Unit,
    UnitCost,
)

_SIZES: dict[ComputeDtypeName, int] = {"fp32": 4, "bf16": 2}
_COUNT = 8
"""Bytes of a number of rows."""


def layers_of(unit: Unit, layers: Sequence[ExpertLayer]) -> tuple[ExpertLayer, ...]:
    """The layers of experts inside each of a unit's blocks, by those of the first."""
    return tuple(each for each in layers if unit.paths and each.path.startswith(f"{unit.paths[0]}."))


def shared_experts(
    unit: Unit,
    cost: UnitCost,
    layers: Sequence[ExpertLayer],
    *,
    dtype: ComputeDtypeName,
    tokens: int,
    degree: int,
    imbalance: float,
    elements: int,
) -> UnitCost:
    """What a block costs the fullest process. `tokens`: those of one sequence that a process has; `elements`: of the
    parameters of its layers of experts, of all processes together."""
    own = layers_of(unit, layers)
    if not own:
        return cost
    paths = [each.path.removeprefix(f"{unit.paths[0]}.") for each in own]

    def inside(operator: Operator) -> bool:
        return any(operator.module == path or operator.module.startswith(f"{path}.") for path in paths)

    def operator(each: Operator) -> Operator:
        if not inside(each):
            return each
        size = Affine(each.bytes.constant // degree, round(each.bytes.slope * imbalance))
        flops, results, kept = (more(line, imbalance) for line in (each.flops, each.results, each.kept))
        return replace(each, bytes=size, flops=flops, results=results, kept=kept)

    forward = [each for each in cost.operators if inside(each) and each.phase == "forward"]
    kept_more = more(total(each.kept for each in forward), imbalance - 1)
    made = more(total(each.results for each in forward), imbalance - 1)
    rows = total(Affine(0, tokens * each.chosen * each.features * _SIZES[dtype]) for each in own)
    cost = with_saved(with_operators(cost, operator), kept_more, ("none", "selective"))
    # Beside what the layer makes there are the rows that arrived, and those on their way.
    cost = with_peaks(cost, made.plus(more(rows, 2 * imbalance)))
    exchanges = [each for layer in own for each in _exchanges(layer, tokens, _SIZES[dtype])]
    return replace(_fewer_gradients(cost, elements, degree), exchanges=(*cost.exchanges, *exchanges))


def _exchanges(layer: ExpertLayer, tokens: int, element: int) -> Iterator[Exchange]:
    rows = tokens * layer.chosen
    told = (Affine(_COUNT * layer.experts, 0), 1), (Affine(0, rows * layer.features * element), 2)
    for size, count in (*told, (Affine(0, rows * element), 1)):
        yield Exchange(axis="ep", kind="all_to_all", phase="forward", bytes=size, count=count, again=True)
        if size.slope:
            yield Exchange(axis="ep", kind="all_to_all", phase="backward", bytes=size, count=count)


def _fewer_gradients(cost: UnitCost, elements: int, degree: int) -> UnitCost:
    """The moments of backward with the gradients of a part of the experts. Backward comes to the experts of a block
    first, so that the gradients of the first moments are theirs."""

    def moments(found: tuple[BackwardMoment, ...]) -> tuple[BackwardMoment, ...]:
        gone = elements - elements // degree
        return tuple(
            each._replace(gradients=each.gradients - min(each.gradients, elements) * gone // max(1, elements))
            for each in found
        )

    return replace(
        cost,
        backward_moments={policy: moments(found) for policy, found in cost.backward_moments.items()},
        moments_before=moments(cost.moments_before),
        moments_after=moments(cost.moments_after),
    )


def local_parameter(parameter: Parameter, degree: int) -> Parameter:
    """The part of a stack of experts that one of so many processes has."""
    if not parameter.experts:
        return parameter
    first, *rest = parameter.shape
    return replace(parameter, shape=(first // degree, *rest), experts=parameter.experts // degree)
