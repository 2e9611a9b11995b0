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
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shardwright.passes.blocks import Block
from shardwright.passes.calls import fit_calls, fit_results
from shardwright.passes.exchanges import exchanges
from shardwright.passes.fit import NotAffine, fit, fit_peak, operators
from shardwright.passes.moments import block_instants, outside_instants, rises_in_model, worst_moments
from shardwright.passes.record import Event
from shardwright.passes.step_run import EMBEDDING, HEAD, BlockCall, StepRun
from shardwright.passes.unit_run import UnitRun
from shardwright.schemas.profile import Affine, ComputeDtypeName, Policy, Unit, UnitCost, UnitKind

POLICIES: tuple[Policy, ...] = ("none", "selective", "full")


class _Saved(Counter[Policy]):
    """Bytes kept, by policy."""

    def add(self, size: int, policies: Iterable[Policy]) -> None:
        """These policies keep so much more."""
        for policy in policies:
            self[policy] += size


_Sizes = dict[Policy, dict[int, int]]
"""Storages of a call's output, by policy and index, with their bytes."""


@dataclass
class _Books:
    """Who counts what in one step: each region outside the blocks, and each call of a block by its position."""

    outside: dict[str, _Saved] = field(default_factory=lambda: {EMBEDDING: _Saved(), HEAD: _Saved()})
    calls: dict[int, _Saved] = field(default_factory=lambda: defaultdict(_Saved))
    elsewhere: dict[int, _Sizes] = field(default_factory=lambda: defaultdict(lambda: {p: {} for p in POLICIES}))
    """Outputs that a call keeps and that others count."""
    entering: int = 0
    """Bytes that the embedding hands to blocks which count them."""
    by_head: list[tuple[int, int]] = field(default_factory=list)
    """What the head counts and what is alive in the backward of blocks: bytes, and position of the first such call."""

    def passing(self, position: int) -> int:
        """Bytes that the head counts and that are alive in the backward of this call, too."""
        return sum(size for first, size in self.by_head if first <= position)


@dataclass
class _Boundary:
    """A storage that enters or leaves blocks."""

    size: int
    region: str
    producer: int | None = None
    index: int = 0
    """Among the producer's outputs."""
    kept_by_producer: frozenset[Policy] = frozenset()
    consumers: dict[int, frozenset[Policy]] = field(default_factory=dict)
    """Position of the call to the policies under which it keeps the storage."""


def _boundaries(step: StepRun) -> dict[int, _Boundary]:
    found: dict[int, _Boundary] = {}

    def boundary(number: int) -> _Boundary:
        return found.setdefault(number, _Boundary(step.size[number], step.region[number]))

    for position, call in enumerate(step.calls):
        kept = call.run.kept
        for index, number in enumerate(call.inputs):
            if number is not None:
                keeping = frozenset(policy for policy in POLICIES if index in kept[policy].inputs)
                boundary(number).consumers[position] = keeping
        for index, number in enumerate(call.outputs):
            if number is not None and number not in call.inputs:
                made = boundary(number)
                made.producer, made.index = position, index
                made.kept_by_producer = frozenset(policy for policy in POLICIES if index in kept[policy].outputs)
    return found


def _keep_books(step: StepRun) -> _Books:
    """[Note: shared storages], [Note: who counts a boundary]."""
    books = _Books()
    boundaries = _boundaries(step)
    for number in step.alive - boundaries.keys():
        owner = EMBEDDING if step.region[number] == EMBEDDING else HEAD
        books.outside[owner].add(step.size[number], POLICIES)
        if owner == HEAD:
            books.by_head.append((step.next_call[number], step.size[number]))
    for position, call in enumerate(step.calls):
        for policy in POLICIES:
            books.calls[position].add(call.run.kept[policy].inside, [policy])
    for number, at in boundaries.items():
        _account(books, at, frozenset(POLICIES if number in step.alive else ()))
    return books


def _account(books: _Books, at: _Boundary, outside: frozenset[Policy]) -> None:
    """Books one storage. `outside`: the policies under which work outside the blocks keeps it, all or none."""
    owner = books.outside[EMBEDDING if at.region == EMBEDDING else HEAD]
    by_consumers = frozenset[Policy]().union(*at.consumers.values())
    if len(at.consumers) > 1 or (at.producer is not None and outside):
        owner.add(at.size, outside | at.kept_by_producer | by_consumers)
        if owner is books.outside[HEAD] and outside | by_consumers:
            first = min(at.consumers) if at.producer is None or not outside else at.producer + 1
            books.by_head.append((first, at.size))
        others = frozenset(POLICIES)
    else:
        for position in at.consumers:
            books.calls[position].add(at.size, by_consumers)
            books.entering += at.size * (at.region == EMBEDDING)
        owner.add(at.size, outside - by_consumers)
        if at.producer is not None:
            books.calls[at.producer].add(at.size, at.kept_by_producer - by_consumers)
        others = by_consumers
    if at.producer is not None:
        for policy in others & at.kept_by_producer:
            books.elsewhere[at.producer][policy][at.index] = at.size


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
        elsewhere = [books.elsewhere[position] for books in self.books]
        pairs = zip(self.steps, self.books, strict=True)
        crossing = [step.calls[position].crossing + books.passing(position) for step, books in pairs]
        key = (*map(id, runs), *(each[policy] for each in saved for policy in POLICIES), str(elsewhere), *crossing)
        if key not in self.done:
            self.done[key] = _block_cost(runs, saved, elsewhere, crossing)
        return self.done[key]

    def outside(self, region: str) -> UnitCost:
        """Cost of what runs in a region outside the blocks."""
        first = self.steps[0].input_only
        forward = [_of(step.forward.events, region) for step in self.steps]
        backward = [_of(step.backward.events, region) for step in self.steps]
        costs = operators(forward, backward, _of(first.events if first else [], region))
        saved = [books.outside[region] for books in self.books]
        pairs = zip(self.books, self.steps, strict=True)
        output = [books.entering if region == EMBEDDING else step.loss_bytes for books, step in pairs]
        peak = fit_peak([step.backward.rises(region) for step in self.steps], "backward")
        return UnitCost(
            operators=costs.operators,
            saved=_fit_saved(saved),
            output=fit(output, "the bytes of the output are"),
            forward_peak=fit_peak([step.forward.rises(region) for step in self.steps], "forward"),
            forward_in_model=fit_peak([rises_in_model(step.forward, region) for step in self.steps], "forward"),
            backward_peak=dict.fromkeys(POLICIES, peak),
            backward_moments=dict.fromkeys(
                POLICIES, worst_moments([outside_instants(step.backward, region) for step in self.steps], Affine(0, 0))
            ),
            held_by_weight=_fit_held([step.held_by_weight[region] for step in self.steps]),
            exchanges=exchanges(forward, backward),
        )


def _fit_held(held: Sequence[int]) -> Affine:
    return fit(held, "the bytes held for weight gradients are")


def _fit_saved(saved: Sequence[_Saved]) -> dict[Policy, Affine]:
    return {policy: fit([each[policy] for each in saved], "the bytes saved are") for policy in POLICIES}


def _block_cost(
    runs: Sequence[UnitRun], saved: Sequence[_Saved], elsewhere: Sequence[_Sizes], crossing: Sequence[int]
) -> UnitCost:
    replays = [run.replay for run in runs]
    costs = operators(
        [run.forward for run in runs],
        [run.backward for run in runs],
        runs[0].input_only or [],
        fit_results(runs),
    )
    leaving = [_counted_elsewhere(run, each["selective"]) for run, each in zip(runs, elsewhere, strict=True)]
    calls = fit_calls(runs, costs.of_forward, leaving)
    first, stop = replays[0].first, replays[0].stop
    once = [[*run.forward[:first], *run.forward[stop:]] for run in runs]
    passing = fit(crossing, "the bytes of gradients that pass by are")
    uncounted = {policy: _uncounted(elsewhere, policy).plus(passing) for policy in POLICIES}
    return UnitCost(
        operators=costs.operators,
        not_recomputed=operators(once, [[]] * len(once), []).operators,
        saved=_fit_saved(saved),
        output=fit([_output_bytes(run) for run in runs], "the bytes of the output are"),
        forward_peak=fit_peak([run.forward_rises for run in runs], "forward"),
        backward_peak={policy: _backward_peak(runs, policy, uncounted[policy]) for policy in POLICIES},
        backward_moments={
            policy: worst_moments([block_instants(run, policy) for run in runs], uncounted[policy])
            for policy in POLICIES
        },
        calls=calls.calls,
        moments_before=calls.moments_before,
        moments_after=calls.moments_after,
        crossing=passing,
        held_by_weight=_fit_held([run.held_by_weight for run in runs]),
        exchanges=exchanges([run.forward for run in runs], [run.backward for run in runs], range(first, stop)),
    )


def _backward_peak(runs: Sequence[UnitRun], policy: Policy, uncounted: Affine) -> Affine:
    return fit_peak([run.backward_rises[policy] for run in runs], "backward").plus(uncounted)


def _uncounted(elsewhere: Sequence[_Sizes], policy: Policy) -> Affine:
    """Bytes of the outputs that the unit itself keeps and the next one counts: that one's backward is over."""
    return fit([sum(each[policy].values()) for each in elsewhere], "the bytes of kept outputs are")


def _counted_elsewhere(run: UnitRun, elsewhere: Mapping[int, int]) -> dict[int, int]:
    """Outputs that others count where a choice of what is kept has them: all but what `selective` has the unit count
    itself. (Where nobody else keeps the last block's output, a choice that does has so much more.)"""
    own = run.kept["selective"].outputs - elsewhere.keys()
    return {at.storage: at.storage_bytes for at in run.output.layouts if at.storage not in own}


def _of(events: Iterable[Event], region: str) -> list[Event]:
    return [event for event in events if event.region == region]


def make_units(traces: Mapping[ComputeDtypeName, Sequence[StepRun]], blocks: Sequence[Block]) -> tuple[Unit, ...]:
    """The units in order of execution, consecutive blocks of one kind and cost as one. Raises NotAffine, its message
    beginning with the unit."""
    block_at = {block.path: block for block in blocks}
    fitters = {dtype: CostFitter(steps) for dtype, steps in traces.items()}
    calls = _calls(traces)
    units = []
    if calls:
        units.append(_unit("embedding", (), {d: _naming(EMBEDDING, f.outside, EMBEDDING) for d, f in fitters.items()}))
    paths: list[str] = []
    for position, call in enumerate(calls):
        costs = {dtype: _naming(call.path, fitter.block, position) for dtype, fitter in fitters.items()}
        paths.append(call.path)
        block = block_at[call.path]
        last = position + 1 == len(calls) or block_at[calls[position + 1].path].kind != block.kind
        if last or {dtype: fitter.block(position + 1) for dtype, fitter in fitters.items()} != costs:
            units.append(_unit("block", tuple(paths), costs, block))
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


def _unit(
    kind: UnitKind, paths: tuple[str, ...], costs: dict[ComputeDtypeName, UnitCost], block: Block | None = None
) -> Unit:
    content = json.dumps({dtype: asdict(cost) for dtype, cost in costs.items()}, sort_keys=True)
    fingerprint = hashlib.sha256(f"{kind} {block.kind if block else ''} {content}".encode()).hexdigest()[:16]
    module = type(block.module).__name__ if block else ""
    return Unit(kind=kind, paths=paths, fingerprint=fingerprint, costs=costs, module=module)
