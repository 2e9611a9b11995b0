"""From traced steps to the units of the profile: who counts which storage, and which blocks cost the same.

[Note: shared storages]
A storage that enters one block and nothing else follows [Note: who counts a boundary]. What enters several blocks
(rotary tables, positions, an encoder's output), or is also kept by work outside the blocks, is counted once, by
`embedding` if it was made there, else by `head`. Neither of the two is ever checkpointed: their `saved` under `full` is
what they keep once blocks are. So the plain sum of `saved` over the units is exact for no block and for all blocks
checkpointed, and for the first k of them too unless a block alone among several keeps a shared storage.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shardwright.passes.fit import NotAffine, fit, fit_peak, operators
from shardwright.passes.record import Event
from shardwright.passes.step_run import EMBEDDING, HEAD, BlockCall, StepRun
from shardwright.passes.unit_run import UnitRun
from shardwright.schemas.profile import ComputeDtypeName, Policy, Unit, UnitCost, UnitKind

POLICIES: tuple[Policy, ...] = ("none", "full")


@dataclass
class _Saved:
    """Bytes kept, by policy."""

    none: int = 0
    full: int = 0

    def add(self, size: int, *, none: bool, full: bool) -> None:
        self.none += size * none
        self.full += size * full


@dataclass
class _Books:
    """Who counts what in one step: each region outside the blocks, and each call of a block by its position."""

    outside: dict[str, _Saved] = field(default_factory=lambda: {EMBEDDING: _Saved(), HEAD: _Saved()})
    calls: dict[int, _Saved] = field(default_factory=lambda: defaultdict(_Saved))
    entering: int = 0
    """Bytes that the embedding hands to blocks which count them."""


@dataclass
class _Boundary:
    """A storage that enters or leaves blocks."""

    size: int
    region: str
    producer: int | None = None
    kept_by_producer: bool = False
    consumers: dict[int, tuple[bool, bool]] = field(default_factory=dict)
    """Position of the call to whether it keeps the storage under `none` and `full`."""


def _boundaries(step: StepRun) -> dict[int, _Boundary]:
    found: dict[int, _Boundary] = {}

    def boundary(number: int) -> _Boundary:
        return found.setdefault(number, _Boundary(step.size[number], step.region[number]))

    for position, call in enumerate(step.calls):
        kept = call.run.kept
        for index, number in enumerate(call.inputs):
            if number is not None:
                boundary(number).consumers[position] = (index in kept["none"].inputs, index in kept["full"].inputs)
        for index, number in enumerate(call.outputs):
            if number is not None and number not in call.inputs:
                made = boundary(number)
                made.producer, made.kept_by_producer = position, index in kept["none"].outputs
    return found


def _keep_books(step: StepRun) -> _Books:
    """[Note: shared storages], [Note: who counts a boundary]."""
    books = _Books()
    boundaries = _boundaries(step)
    for number in step.alive - boundaries.keys():
        owner = EMBEDDING if step.region[number] == EMBEDDING else HEAD
        books.outside[owner].add(step.size[number], none=True, full=True)
    for position, call in enumerate(step.calls):
        books.calls[position].add(call.run.kept["none"].inside, none=True, full=False)
        books.calls[position].add(call.run.kept["full"].inside, none=False, full=True)
    for number, at in boundaries.items():
        _account(books, at, kept_outside=number in step.alive)
    return books


def _account(books: _Books, at: _Boundary, *, kept_outside: bool) -> None:
    owner = books.outside[EMBEDDING if at.region == EMBEDDING else HEAD]
    if len(at.consumers) > 1 or (at.producer is not None and kept_outside):
        none = kept_outside or at.kept_by_producer or any(none for none, _ in at.consumers.values())
        full = kept_outside or any(full for _, full in at.consumers.values())
        owner.add(at.size, none=none, full=full)
        return
    none = full = False
    for position, (none, full) in at.consumers.items():
        books.calls[position].add(at.size, none=none, full=full)
        books.entering += at.size * (at.region == EMBEDDING)
    if kept_outside:
        owner.add(at.size, none=not none, full=not full)
    elif at.producer is not None and at.kept_by_producer:
        books.calls[at.producer].add(at.size, none=not none, full=False)


def _output_bytes(run: UnitRun) -> int:
    """Bytes of the storages that leave a block and did not enter it."""
    pairs = zip(run.output.layouts, run.output_is_input, strict=True)
    return sum({at.storage: at.storage_bytes for at, place in pairs if place is None}.values())


@dataclass
class CostFitter:
    """Fits the units' costs of one dtype; equal runs are fitted once, and give the same object."""

    steps: Sequence[StepRun]
    books: Sequence[_Books] = field(init=False)
    done: dict[tuple[Any, ...], UnitCost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.books = [_keep_books(step) for step in self.steps]

    def block(self, position: int) -> UnitCost:
        """Cost of the block called at this position."""
        runs = [step.calls[position].run for step in self.steps]
        saved = [books.calls[position] for books in self.books]
        key = (*map(id, runs), *((each.none, each.full) for each in saved))
        if key not in self.done:
            if len({run.recomputed for run in runs}) > 1:
                raise NotAffine("checkpointing recomputes other operators at one micro-batch than at another")
            costs = operators([run.forward for run in runs], [run.backward for run in runs], runs[0].input_only or [])
            self.done[key] = UnitCost(
                operators=costs,
                not_recomputed=operators([run.forward[run.recomputed :] for run in runs], [[], [], []], []),
                saved={policy: fit([getattr(s, policy) for s in saved], "the bytes saved are") for policy in POLICIES},
                output=fit([_output_bytes(run) for run in runs], "the bytes of the output are"),
                forward_peak=fit_peak([run.forward_rises for run in runs], "forward"),
                backward_peak={
                    policy: fit_peak([run.backward_rises[policy] for run in runs], "backward") for policy in POLICIES
                },
            )
        return self.done[key]

    def outside(self, region: str) -> UnitCost:
        """Cost of what runs in a region outside the blocks."""
        first = self.steps[0].input_only
        costs = operators(
            [_of(step.forward.events, region) for step in self.steps],
            [_of(step.backward.events, region) for step in self.steps],
            _of(first.events if first else [], region),
        )
        saved = [books.outside[region] for books in self.books]
        pairs = zip(self.books, self.steps, strict=True)
        output = [books.entering if region == EMBEDDING else step.loss_bytes for books, step in pairs]
        peak = fit_peak([step.backward.rises(region) for step in self.steps], "backward")
        return UnitCost(
            operators=costs,
            saved={policy: fit([getattr(s, policy) for s in saved], "the bytes saved are") for policy in POLICIES},
            output=fit(output, "the bytes of the output are"),
            forward_peak=fit_peak([step.forward.rises(region) for step in self.steps], "forward"),
            backward_peak=dict.fromkeys(POLICIES, peak),
        )


def _of(events: Iterable[Event], region: str) -> list[Event]:
    return [event for event in events if event.region == region]


def make_units(traces: Mapping[ComputeDtypeName, Sequence[StepRun]]) -> tuple[Unit, ...]:
    """The units in order of execution, consecutive equal blocks as one. Raises NotAffine, its message beginning with
    the unit."""
    fitters = {dtype: CostFitter(steps) for dtype, steps in traces.items()}
    calls = _calls(traces)
    units = []
    if calls:
        units.append(_unit("embedding", (), {d: _naming(EMBEDDING, f.outside, EMBEDDING) for d, f in fitters.items()}))
    paths: list[str] = []
    for position, call in enumerate(calls):
        costs = {dtype: _naming(call.path, fitter.block, position) for dtype, fitter in fitters.items()}
        paths.append(call.path)
        following = position + 1 < len(calls) and {d: f.block(position + 1) for d, f in fitters.items()}
        if not following or any(following[dtype] is not costs[dtype] for dtype in costs):
            units.append(_unit("block", tuple(paths), costs))
            paths = []
    units.append(_unit("head", (), {d: _naming(HEAD, f.outside, HEAD) for d, f in fitters.items()}))
    return tuple(units)


def _calls(traces: Mapping[ComputeDtypeName, Sequence[StepRun]]) -> tuple[BlockCall, ...]:
    steps = [step for steps in traces.values() for step in steps]
    paths = {tuple(call.path for call in step.calls) for step in steps}
    if len(paths) > 1:
        raise NotAffine("forward calls other blocks at one micro-batch than at another")
    return steps[0].calls


def _naming(unit: str, cost: Any, argument: Any) -> UnitCost:
    try:
        return cost(argument)  # type: ignore[no-any-return]
    except NotAffine as error:
        raise NotAffine(f"{unit}: {error}") from error


def _unit(kind: UnitKind, paths: tuple[str, ...], costs: dict[ComputeDtypeName, UnitCost]) -> Unit:
    content = json.dumps({dtype: asdict(cost) for dtype, cost in costs.items()}, sort_keys=True)
    fingerprint = hashlib.sha256(f"{kind} {content}".encode()).hexdigest()[:16]
    return Unit(kind=kind, paths=paths, fingerprint=fingerprint, costs=costs)
