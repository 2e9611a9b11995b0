"""Where things lie and what travels, compared with the plan: bytes at rest, collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.planner.at_rest import State
from shardwright.planner.parallel import WHOLE, Parallel
from shardwright.planner.schedules.timetable import Layout, Timetable
from shardwright.planner.space import PIPELINE_AXIS, Pipe
from shardwright.rehearse.report_types import Check
from shardwright.schemas.plan import Collective, Mesh


@dataclass(frozen=True, slots=True)
class Processes:
    """Who the processes of a rehearsal are."""

    mesh: Mesh
    parallel: Parallel = WHOLE
    """How they share one copy of the model."""
    stages: tuple[tuple[int, ...], ...] = ()
    """Of each process, those that it has; empty without a pipeline."""
    ties: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Of each process, the processes with copies of the same parameters, itself included; empty without a pipeline."""

    def name(self, rank: int) -> str:
        """For instance `process 3 (stages 1, 2)`."""
        if not self.stages:
            return f"process {rank}"
        return f"process {rank} ({stages_named(self.stages[rank])})"

    def groups(self, axis: str, rank: int, size: int) -> list[tuple[int, ...]]:
        """Groups that a collective of `size` processes over an axis may have."""
        if self.ties and axis == PIPELINE_AXIS and size < len(group_ranks(self.mesh, axis, rank)):
            return [group for group in self.ties[rank] if len(group) == size]
        if axis in ("cp", "ep", "expert_shard", "expert_replicate"):
            return [self._shared(axis, rank, size)]
        return [group_ranks(self.mesh, axis, rank, size)]

    def _shared(self, axis: str, rank: int, size: int) -> tuple[int, ...]:
        """Processes that share sequences or experts are neighbours among those with the same part of every layer; those
        with the same experts follow, shards first."""
        stride = self.parallel.tp
        if axis.startswith("expert"):
            stride *= self.parallel.ep
        if axis == "expert_replicate":
            shard = next((each.size for each in self.mesh.axes if each.name == "dp_shard"), 1)
            stride *= max(1, shard // self.parallel.ep)
        first = rank - rank // stride % size * stride
        return tuple(range(first, first + size * stride, stride))


def own_stages(pipe: Pipe, world: int, process: int) -> tuple[int, ...]:
    """The stages of one of so many processes."""
    rank = process // (world // pipe.ranks)
    return tuple(sorted(pipe.layout.stage(rank, chunk) for chunk in range(pipe.chunks)))


def stages_named(stages: Sequence[int]) -> str:
    """For instance `stages 1, 2`."""
    return f"{'stage' if len(stages) == 1 else 'stages'} {', '.join(map(str, stages))}"


def compare_at_rest(
    run: str, of: Processes, expected: Sequence[Mapping[State, int]], found: Sequence[Mapping[State, int]]
) -> list[Check]:
    """Bytes of each model state on each process."""
    checks = []
    for state in expected[0]:
        want, have = [rank[state] for rank in expected], [rank[state] for rank in found]
        wrong = next((rank for rank, pair in enumerate(zip(want, have, strict=True)) if pair[0] != pair[1]), None)
        checks.append(
            Check(
                run=run,
                name=f"{state.replace('_', ' ')} at rest, B",
                expected=_each(want),
                found=_each(have) + ("" if wrong is None else f", wrong on {of.name(wrong)}"),
                tolerance="exact",
                passed=wrong is None,
            )
        )
    return checks


def _each(values: Sequence[int]) -> str:
    """One number where all processes agree."""
    return f"{values[0]}" if len(set(values)) == 1 else ", ".join(map(str, values))


def compare_actions(
    run: str, of: Processes, timetable: Timetable, layout: Layout, found: Sequence[Mapping[str, Any]]
) -> Check:
    """What the stages of each process computed in the observed step, in its order, against the plan's timetable."""
    copies = len(found) // layout.ranks
    wrong = ""
    for rank, process in enumerate(found):
        place = rank // copies
        want = [(kind, layout.stage(place, chunk), batch) for kind, chunk, batch in timetable[place]]
        have = [tuple(action) for action in process["actions"]]
        if want != have:
            wrong = wrong or f"{of.name(rank)}: {_first_difference(want, have)}"
    return Check(
        run=run,
        name="order of actions",
        expected=f"{sum(map(len, timetable)) * copies} as in the timetable",
        found=wrong or f"{sum(len(process['actions']) for process in found)} as in the timetable",
        tolerance="exact",
        passed=not wrong,
    )


def _first_difference(want: Sequence[tuple[Any, ...]], have: Sequence[tuple[Any, ...]]) -> str:
    at = next((at for at, (one, other) in enumerate(zip(want, have, strict=False)) if one != other), None)
    if at is None:
        return f"{len(have)} actions, not {len(want)}"
    return f"{_action(have[at])}, instead of {_action(want[at])}"


def _action(action: tuple[Any, ...]) -> str:
    kind, stage, micro_batch = action
    return f"{kind} of stage {stage}, micro-batch {micro_batch}"


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
    run: str, of: Processes, predicted: Sequence[Sequence[Collective]], found: Sequence[Mapping[str, Any]]
) -> list[Check]:
    """Every call of the observed step on every process; what was predicted for another group is not found.

    `predicted`: of each process. Predicted calls have a row per kind and axis, found ones that nobody predicted a row
    per kind and group. Of messages those sent count: that each is received is what the other side waits for. How many
    bytes tokens take on their way to experts follows from the router: only the calls are compared.
    """
    checks = []
    rest = [
        Counter({(kind, tuple(group), size): n for kind, group, size, n in rank["collectives"] if kind != "recv"})
        for rank in found
    ]
    whole = {axis.name: axis.size for axis in of.mesh.axes} | {"world": of.mesh.world_size}
    for kind, axis, size in dict.fromkeys((call.kind, call.axis, call.group_size) for own in predicted for call in own):
        expected = [_predicted(own, kind, axis, size) for own in predicted]
        if (kind, axis) == ("all_to_all", "ep"):
            found_calls = [_take_all(calls, kind, of.groups(axis, rank, size)) for rank, calls in enumerate(rest)]
            checks.append(_row(run, f"{kind} over {axis}", of, [_calls_only(own) for own in expected], found_calls))
            continue
        taken = [
            _take(calls, kind, of.groups(axis, rank, size), sizes)
            for rank, (calls, sizes) in enumerate(zip(rest, expected, strict=True))
        ]
        name = f"{kind} over {axis}" + (f", {size} of it" if size < whole.get(axis, size) else "")
        checks.append(_row(run, name, of, expected, taken))
    for kind, group in dict.fromkeys((kind, group) for calls in rest for kind, group, _ in +calls):
        sizes = [_sizes(calls, kind, group) for calls in rest]
        checks.append(_row(run, f"{kind} in group {list(group)}", of, [Counter[int]()] * len(rest), sizes))
    if any(rank["unseen_collectives"] for rank in found):
        unseen = [Counter({0: rank["unseen_collectives"]}) for rank in found]
        checks.append(_row(run, "collectives of another kind", of, [Counter[int]()] * len(rest), unseen))
    return checks


def _predicted(calls: Sequence[Collective], kind: str, axis: str, size: int) -> Counter[int]:
    sizes = Counter[int]()
    for call in calls:
        if (call.kind, call.axis, call.group_size) == (kind, axis, size):
            sizes[call.bytes] += call.count
    return sizes


def _take(calls: Calls, kind: str, groups: Sequence[tuple[int, ...]], expected: Counter[int]) -> Counter[int]:
    """Remove from `calls` what belongs to the row of these expected calls, and return it by size.

    Axes that span the same processes share their calls: each takes the sizes that it expects, as often as it expects
    them. What is left is nobody's.
    """
    taken = Counter[int]()
    for group in groups:
        have = _sizes(calls, kind, group) & (expected - taken)
        for size, count in have.items():
            calls[kind, group, size] -= count
        taken += have
    return taken


def _take_all(calls: Calls, kind: str, groups: Sequence[tuple[int, ...]]) -> Counter[int]:
    """Remove all calls of a kind in these groups, of whatever size, and return how many they are."""
    taken = Counter[int]()
    for group in groups:
        for size, count in _sizes(calls, kind, group).items():
            calls[kind, group, size] -= count
            taken[0] += count
    return taken


def _calls_only(calls: Counter[int]) -> Counter[int]:
    return Counter({0: calls.total()})


def _sizes(calls: Calls, kind: str, group: tuple[int, ...]) -> Counter[int]:
    return Counter({size: n for (a, b, size), n in calls.items() if (a, b) == (kind, group) and n > 0})


def _row(run: str, name: str, of: Processes, expected: Sequence[Counter[int]], found: Sequence[Counter[int]]) -> Check:
    """Shows the process that is furthest off, or what all have; where these differ, all together."""
    off = [((want - have) + (have - want)).total() for want, have in zip(expected, found, strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    want, have = expected[worst], found[worst]
    if not off[worst] and any(each != want for each in expected):
        want = have = sum(expected, Counter[int]())
    return Check(
        run=run,
        name=name,
        expected=_describe(want, have),
        found=_describe(have, want) + (f" on {of.name(worst)}" if off[worst] and len(off) > 1 else ""),
        tolerance="exact",
        passed=not off[worst],
    )


def _describe(calls: Counter[int], other: Counter[int]) -> str:
    """Number of calls and their bytes together; where the other side differs, the sizes that only this one has."""
    if not calls:
        return "none"
    if set(calls) == {0}:
        return f"{calls.total()} calls"
    text = f"{calls.total()} calls, {sum(size * n for size, n in calls.items())} B"
    only = calls - other
    return text + (" (" + ", ".join(f"{n} x {size} B" for size, n in sorted(only.items())) + ")" if only else "")
