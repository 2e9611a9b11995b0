"""What one of the processes that share each sequence does of a unit, and what they tell one another.

Every process has its part of the sequence in the blocks and, unless the model's head is named, from there to the loss;
what runs before the first block sees whole sequences. Of causal attention zigzag chunks give each process an equal part
(arXiv 2407.21783, section 3.3.2). The exchanges are those of the runtime's sequence.py and context_attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from shardwright.planner.divided_costs import (
    NOTHING,
    part_of,
    total,
    with_bytes,
    with_operators,
    with_peaks,
    with_saved,
)
from shardwright.planner.parallel import Parallel
from shardwright.schemas.profile import Affine, ContextParallelism, Exchange, Operator, Unit, UnitCost

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_SUMS = 4
"""Bytes of an element of what a ring sums up, float32."""


@dataclass(frozen=True, slots=True)
class Attended:
    """Of one sequence, what a call of fused attention takes on the processes that share it together, in bytes."""

    queries: int
    keys: int
    """Keys and values."""
    query_elements: int
    key_elements: int
    key_heads: int
    query_heads: int
    calls: int


def attended(cost: UnitCost) -> list[Attended]:
    """The calls of fused attention in the forward of a unit, by their operands (1, heads, length, features)."""
    found = []
    for each in cost.operators:
        if each.kind == "attention" and each.phase == "forward" and len(each.shapes) >= 3:
            query, key, value = each.shapes[:3]
            element = _SIZES.get(each.dtype, 2)
            keys = prod(key) + prod(value)
            found.append(
                Attended(element * prod(query), element * keys, prod(query), keys, key[1], query[1], each.count)
            )
    return found


def shared_sequence(
    unit: Unit, cost: UnitCost, how: ContextParallelism, parallel: Parallel, hidden: Affine
) -> UnitCost:
    """What a unit costs one process. `hidden`: bytes of what enters the first block, whole."""
    if unit.kind == "embedding":
        return _embedding(cost, parallel)
    return _block(cost, parallel) if unit.kind == "block" else _head(cost, how, parallel, hidden)


def _embedding(cost: UnitCost, parallel: Parallel) -> UnitCost:
    """Whole sequences; the checkpointed first block keeps what enters it whole too. Only where tensor parallelism
    divides the sequence once more is what its entry gathers in backward a part."""
    output = cost.output.slope // (parallel.tp if parallel.sequence else 1)
    cost = with_saved(cost, Affine(0, output - output // parallel.cp), ("full",))
    return replace(
        cost,
        exchanges=tuple(
            replace(each, bytes=part_of(each.bytes, parallel.cp)) if each.kind == "all_gather" else each
            for each in cost.exchanges
        ),
    )


def _divided(cost: UnitCost, degree: int) -> UnitCost:
    def operator(each: Operator) -> Operator:
        return replace(each, flops=part_of(each.flops, degree), bytes=part_of(each.bytes, degree))

    return with_operators(with_bytes(cost, lambda line: part_of(line, degree)), operator)


def _block(cost: UnitCost, parallel: Parallel) -> UnitCost:
    calls, degree = attended(cost), parallel.cp
    cost = _divided(cost, degree)
    if parallel.method == "ring":
        cost = with_operators(cost, lambda each: _in_rounds(each, degree))
    exchanges = [each for call in calls for each in _exchanges(call, parallel)]
    saved = total(_kept(call, parallel) for call in calls)
    cost = with_saved(cost, saved, ("none", "selective"))
    peak = max((_transient(call, parallel).plus(_kept(call, parallel)) for call in calls), default=NOTHING)
    return replace(with_peaks(cost, peak), exchanges=(*cost.exchanges, *exchanges))


def _in_rounds(operator: Operator, degree: int) -> Operator:
    """A kernel for each part of the keys."""
    return replace(operator, count=operator.count * degree) if operator.kind == "attention" else operator


def _exchanges(call: Attended, parallel: Parallel) -> Iterator[Exchange]:
    degree = parallel.cp
    if parallel.method == "gather":
        yield _exchange("all_gather", "forward", call.keys, call.calls)
        yield _exchange("reduce_scatter", "backward", call.keys, call.calls)
    elif parallel.method == "ulysses":
        operands = (call.queries + repeats(call, degree) * call.keys) // degree
        for size in (operands, call.queries // degree):
            yield _exchange("all_to_all", "forward", size, call.calls)
            yield _exchange("all_to_all", "backward", size, call.calls)
    else:
        rounds = (degree - 1) * call.calls
        yield _exchange("all_to_all", "forward", call.keys // degree, rounds)
        yield _exchange("all_to_all", "backward", call.keys // degree, rounds)
        yield _exchange("all_to_all", "backward", _SUMS * call.key_elements // degree, rounds)


def repeats(call: Attended, degree: int) -> int:
    """How often key-value heads are repeated so that so many processes can share them: as seldom as heads permit."""
    most = call.query_heads // call.key_heads
    able = (each for each in range(1, most + 1) if most % each == 0 and call.key_heads * each % degree == 0)
    return next(able, most)


def _exchange(kind: str, phase: str, size: int, count: int, *, again: bool = True) -> Exchange:
    return Exchange(
        axis="cp",
        kind=kind,  # type: ignore[arg-type]
        phase=phase,  # type: ignore[arg-type]
        bytes=Affine(0, size),
        count=count,
        again=again and phase == "forward",
    )


def _kept(call: Attended, parallel: Parallel) -> Affine:
    """Bytes for backward beyond its own part of queries, keys, values and results."""
    if parallel.method == "gather":
        return Affine(0, call.keys - call.keys // parallel.cp)
    if parallel.method == "ulysses":
        return Affine(0, (repeats(call, parallel.cp) - 1) * call.keys // parallel.cp)
    return NOTHING


def _transient(call: Attended, parallel: Parallel) -> Affine:
    """Bytes while attention runs, forward or backward, whichever is more."""
    degree = parallel.cp
    if parallel.method == "gather":  # the gradients of the gathered keys and values, in two orders
        return Affine(0, 2 * call.keys)
    if parallel.method == "ulysses":
        return Affine(0, (call.queries + repeats(call, degree) * call.keys) // degree)
    sums = _SUMS * (call.query_elements + 3 * call.key_elements)
    return Affine(0, (2 * call.keys + sums) // degree)


def _head(cost: UnitCost, how: ContextParallelism, parallel: Parallel, hidden: Affine) -> UnitCost:
    """All of it on a part of the sequence, unless a module is named that makes the logits: then what comes before that
    is whole, and what enters is gathered."""
    degree = parallel.cp
    if not how.head:
        return _divided(cost, degree)
    before = _before(cost, how.head)
    # Half of what an operator moves is what it writes, and no more than that is kept or alive.
    written = sum(each.bytes.slope for each in before if each.phase == "forward") // 2

    def part(line: Affine) -> Affine:
        whole = min(line.slope, written)
        return Affine(line.constant, whole + part_of(Affine(0, line.slope - whole), degree).slope)

    def operator(each: Operator) -> Operator:
        if each in before:
            return each
        return replace(each, flops=part_of(each.flops, degree), bytes=part_of(each.bytes, degree))

    gathered = (
        _exchange("all_gather", "forward", hidden.slope, 1, again=False),
        _exchange("reduce_scatter", "backward", hidden.slope, 1),
    )
    cost = with_operators(with_bytes(cost, part), operator)
    return replace(cost, exchanges=(*cost.exchanges, *gathered))


def _before(cost: UnitCost, head: str) -> list[Operator]:
    """Operators of the modules that run before the one that makes the logits."""
    modules: set[str] = set()
    for each in cost.operators:
        if each.module == head or each.module.startswith(head + "."):
            break
        modules.add(each.module)
    return [each for each in cost.operators if each.module in modules and each.module]
