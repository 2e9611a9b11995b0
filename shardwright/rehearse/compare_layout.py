"""Where things lie and what travels, compared with the plan: bytes at rest, collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from shardwright.planner.at_rest import State
from shardwright.rehearse.report_types import Check
from shardwright.schemas.plan import Collective, Mesh


def compare_at_rest(
    run: str, expected: Sequence[Mapping[State, int]], found: Sequence[Mapping[State, int]]
) -> list[Check]:
    """Bytes of each model state on each process."""
    checks = []
    for state in expected[0]:
        want, have = [rank[state] for rank in expected], [rank[state] for rank in found]
        checks.append(
            Check(
                run=run,
                name=f"{state.replace('_', ' ')} at rest, B",
                expected=_each(want),
                found=_each(have),
                tolerance="exact",
                passed=want == have,
            )
        )
    return checks


def _each(values: Sequence[int]) -> str:
    """One number where all processes agree."""
    return f"{values[0]}" if len(set(values)) == 1 else ", ".join(map(str, values))


Calls = Counter[tuple[str, tuple[int, ...], int]]
"""How often a process takes part in a collective: kind, ranks of its group, bytes of the whole tensor."""


def group_ranks(mesh: Mesh, axis: str, rank: int, size: int | None = None) -> tuple[int, ...]:
    """Global ranks of the group of an axis (or `world`) that holds `rank`; the mesh counts its last axis fastest.

    `size`: only so many neighbours on the axis, which share fsdp2's second copy.
    """
    if axis == "world":
        return tuple(range(mesh.world_size))
    stride = 1
    for one in reversed(mesh.axes):
        if one.name == axis:
            many = size or one.size
            first = rank - rank // stride % many * stride
            return tuple(range(first, first + many * stride, stride))
        stride *= one.size
    raise ValueError(f"the mesh has no axis {axis}")


def compare_collectives(
    run: str, mesh: Mesh, predicted: Sequence[Collective], found: Sequence[Mapping[str, Any]]
) -> list[Check]:
    """Every call of the observed step on every process; what was predicted for another group is not found.

    Predicted calls have a row per kind and axis, found ones that nobody predicted a row per kind and group.
    """
    checks = []
    rest = [Counter({(kind, tuple(group), size): n for kind, group, size, n in rank["collectives"]}) for rank in found]
    whole = {axis.name: axis.size for axis in mesh.axes} | {"world": mesh.world_size}
    for kind, axis, size in dict.fromkeys((call.kind, call.axis, call.group_size) for call in predicted):
        sizes = Counter[int]()
        for call in predicted:
            if (call.kind, call.axis, call.group_size) == (kind, axis, size):
                sizes[call.bytes] += call.count
        taken = [_take(calls, kind, group_ranks(mesh, axis, rank, size), sizes) for rank, calls in enumerate(rest)]
        worst = max(taken, key=lambda have: ((sizes - have) + (have - sizes)).total())
        name = f"{kind} over {axis}" + (f", {size} of it" if size < whole[axis] else "")
        checks.append(_calls_check(run, name, sizes, worst))
    for kind, group in dict.fromkeys((kind, group) for calls in rest for kind, group, _ in +calls):
        sizes = max((_sizes(calls, kind, group) for calls in rest), key=Counter.total)
        checks.append(_calls_check(run, f"{kind} in group {list(group)}", Counter(), sizes))
    if any(rank["unseen_collectives"] for rank in found):
        unseen = max(rank["unseen_collectives"] for rank in found)
        checks.append(_calls_check(run, "collectives of another kind", Counter(), Counter({0: unseen})))
    return checks


def _take(calls: Calls, kind: str, group: tuple[int, ...], expected: Counter[int]) -> Counter[int]:
    """Remove from `calls` what belongs to the row of these expected calls, and return it by size.

    Axes that span the same processes share their calls: each takes the sizes that it expects, as often as it expects
    them. What is left is nobody's.
    """
    have = _sizes(calls, kind, group) & expected
    for size, count in have.items():
        calls[kind, group, size] -= count
    return have


def _sizes(calls: Calls, kind: str, group: tuple[int, ...]) -> Counter[int]:
    return Counter({size: n for (a, b, size), n in calls.items() if (a, b) == (kind, group) and n > 0})


def _calls_check(run: str, name: str, expected: Counter[int], found: Counter[int]) -> Check:
    return Check(
        run=run,
        name=name,
        expected=_describe(expected, found),
        found=_describe(found, expected),
        tolerance="exact",
        passed=expected == found,
    )


def _describe(calls: Counter[int], other: Counter[int]) -> str:
    """Number of calls and their bytes together; where the other side differs, the sizes that only this one has."""
    if not calls:
        return "none"
    text = f"{calls.total()} calls, {sum(size * n for size, n in calls.items())} B"
    only = calls - other
    return text + (" (" + ", ".join(f"{n} x {size} B" for size, n in sorted(only.items())) + ")" if only else "")
