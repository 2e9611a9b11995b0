"""The step of `ShardedStates` on its lanes: compute beside one wire for each level of the cluster.

[Note: wires]
Collectives run in the order in which they are issued, one after another on each wire. A wire is the slowest level that
an axis of the mesh spans: axes that share a level share its links. A collective is issued at the moment that compute
has come to, and starts when the wire is free. Waiting for it stops compute. The next hop of a chain over several axes
is issued when somebody waits for the one before. All of it is in a fixed order of sums and maxima, so more bandwidth
or less work never makes a step slower.

[Note: order of issue]
As the runtime's hooks have it. After the optimizer the new values are sent off, the root's first. In forward units are
gathered as many ahead as the gather has axes, each time one hop further, so that every axis is busy with another unit;
in backward likewise, before the reduction of the unit that has just ended. Whenever a reduction is issued, and before
each block of the next forward, every one in flight goes on by one hop; after the last micro-batch all are driven to
their end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Hop = tuple[int, float]
"""The wire, and seconds on it."""
Hops = tuple[Hop, ...]
"""One chain."""


@dataclass(frozen=True, slots=True)
class Communication:
    """What the buckets of one unit send; a chain for each bucket."""

    gathers: tuple[Hops, ...] = ()
    """Parameters, from where they rest to the whole."""
    again: tuple[Hops, ...] = ()
    """The same for backward."""
    reductions: tuple[Hops, ...] = ()
    """Gradients of a micro-batch; empty chains where they only add up."""
    last_reductions: tuple[Hops, ...] = ()
    publications: tuple[Hops, ...] = ()
    """New values, from the optimizer to where parameters rest."""
    keep: float = 0.0
    """Seconds of compute: copying the second copy out of the gathered parameters."""
    hand_over: float = 0.0
    """Copying gradients into the bucket, for a micro-batch."""
    add_whole: float = 0.0
    """What adding a later micro-batch's gradients takes beyond that, where they accumulate whole in the bucket."""
    add: float = 0.0
    """Adding a later micro-batch's reduced gradients to the earlier ones'."""


@dataclass(frozen=True, slots=True)
class FlatUnit:
    """A block, or the root: its compute, and what it sends."""

    forward: float
    backward: float
    sends: Communication


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatStep:
    """What one step puts on the lanes."""

    blocks: Sequence[FlatUnit]
    root: Communication
    embedding: tuple[float, float]
    """Forward and backward."""
    head: tuple[float, float]
    micro_batches: int
    kept: bool
    """Whether blocks stay gathered through the step."""
    wires: int
    gather_hops: int = 1
    """Axes that parameters are gathered over; 0 where they are whole."""
    again_hops: int = 1
    """The same in backward."""
    publish_hops: int = 1
    """Axes between the optimizer states and the parameters."""


@dataclass(slots=True)
class Totals:
    """Compute's clock, and what it spent waiting and copying."""

    compute: float = 0.0
    gather_stall: float = 0.0
    reduce_stall: float = 0.0
    copies: float = 0.0


SIMULATED = 5
"""Micro-batches of a step that are simulated; the others repeat the last but one."""


def run_flat(step: FlatStep) -> Totals:
    """From the optimizer's step before to the last reduction ([Note: order of issue])."""
    run = _Run(step)
    simulated = min(step.micro_batches, SIMULATED)
    before = now = run.snapshot()
    run.publish()
    for index in range(simulated):
        before, now = now, run.snapshot()
        last = index == simulated - 1
        if last:
            between = now
        run.micro_batch(first=index == 0, last=last)
    run.drain()
    repeated = step.micro_batches - simulated
    if not repeated:
        return run.totals
    return Totals(
        *(
            getattr(run.totals, name) + repeated * (getattr(between, name) - getattr(before, name))
            for name in Totals.__slots__
        )
    )


class _Chain:
    """A chain in flight: its hops, the one that runs, and when that ends."""

    __slots__ = ("add", "at", "end", "hops")

    def __init__(self, hops: Hops, end: float, add: float = 0.0) -> None:
        self.hops, self.at, self.end, self.add = hops, 0, end, add


class _Run:
    """The state of one simulated step; unit -1 is the root."""

    def __init__(self, step: FlatStep) -> None:
        self._step = step
        self._wires = [0.0] * step.wires
        self.totals = Totals()
        self._reducing: list[_Chain] = []
        self._publishing: list[int] = []
        self._published: dict[int, list[_Chain]] = {}
        self._gathering: dict[int, list[_Chain]] = {}
        self._whole: set[int] = set()

    def snapshot(self) -> Totals:
        return replace(self.totals)

    def publish(self) -> None:
        self._publishing = [-1, *range(len(self._step.blocks))]
        for unit in self._publishing:
            self._published[unit] = self._start(self._sends(unit).publications)

    def micro_batch(self, *, first: bool, last: bool) -> None:
        self._forward()
        self._backward(first=first, last=last)

    def drain(self) -> None:
        while self._reducing:
            self._advance()

    def _sends(self, unit: int) -> Communication:
        return self._step.root if unit < 0 else self._step.blocks[unit].sends

    # --- the wires --------------------------------------------------------------------------------------------------

    def _issue(self, hop: Hop) -> float:
        wire, seconds = hop
        end = max(self._wires[wire], self.totals.compute) + seconds
        self._wires[wire] = end
        return end

    def _start(self, chains: Iterable[Hops], add: float = 0.0) -> list[_Chain]:
        return [_Chain(hops, self._issue(hops[0]), add) for hops in chains if hops]

    def _stall(self, until: float, *, reduces: bool) -> None:
        totals = self.totals
        if until > totals.compute:
            if reduces:
                totals.reduce_stall += until - totals.compute
            else:
                totals.gather_stall += until - totals.compute
            totals.compute = until

    def _step_on(self, chain: _Chain, *, reduces: bool = False) -> bool:
        """Wait for the hop that runs and issue the next one; whether there was one."""
        self._stall(chain.end, reduces=reduces)
        chain.at += 1
        if chain.at < len(chain.hops):
            chain.end = self._issue(chain.hops[chain.at])
            return True
        if chain.add:
            self._copy(chain.add)
        return False

    def _push(self, chains: list[_Chain]) -> None:
        """One hop further, but for those on their last."""
        for chain in chains:
            if chain.at + 1 < len(chain.hops):
                self._step_on(chain)

    def _finish(self, chains: list[_Chain]) -> None:
        for chain in chains:
            while self._step_on(chain):
                pass

    def _advance(self) -> None:
        self._reducing = [chain for chain in self._reducing if self._step_on(chain, reduces=True)]

    def _copy(self, seconds: float) -> None:
        self.totals.compute += seconds
        self.totals.copies += seconds

    # --- what the runtime is told -----------------------------------------------------------------------------------

    def _arrive(self, unit: int) -> None:
        if unit in self._publishing:
            self._publishing.remove(unit)
            for due in (unit, *self._publishing[: max(self._step.publish_hops - 1, 0)]):
                self._push(self._published[due])
            self._finish(self._published.pop(unit))

    def _gather(self, unit: int, *, again: bool = False) -> None:
        if not self._step.gather_hops:
            return
        self._arrive(unit)
        if unit in self._whole:
            return
        if unit in self._gathering:
            self._push(self._gathering[unit])
        else:
            sends = self._sends(unit)
            self._gathering[unit] = self._start(sends.again if again else sends.gathers)

    def _wait(self, unit: int, *, again: bool = False) -> None:
        self._arrive(unit)
        self._gather(unit, again=again)
        self._finish(self._gathering.pop(unit, []))
        self._whole.add(unit)

    # --- a micro-batch ----------------------------------------------------------------------------------------------

    def _forward(self) -> None:
        step, totals = self._step, self.totals
        count, ahead = len(step.blocks), max(step.gather_hops, 1)
        start = [-1, *range(min(ahead, count))]
        for turn in range(ahead):
            for unit in start[: turn + 2]:
                self._gather(unit)
        self._wait(-1)
        totals.compute += step.embedding[0]
        for index, block in enumerate(step.blocks):
            self._wait(index)
            for unit in range(index + 1, min(index + 1 + ahead, count)):
                self._gather(unit)
            self._advance()
            totals.compute += block.forward
            if not step.kept:
                self._copy(block.sends.keep)
                self._whole.discard(index)
        totals.compute += step.head[0]

    def _backward(self, *, first: bool, last: bool) -> None:
        step, totals = self._step, self.totals
        count = len(step.blocks)
        self._gather_below(count)
        totals.compute += step.head[1]
        for index in range(count - 1, -1, -1):
            if index + 1 < count:
                self._release(index + 1, last=last)
            self._wait(index, again=True)
            self._gather_below(index)
            if index + 1 < count:
                self._reduce(step.blocks[index + 1].sends, first=first, last=last)
            totals.compute += step.blocks[index].backward
        totals.compute += step.embedding[1]
        if count:
            self._release(0, last=last)
            self._reduce(step.blocks[0].sends, first=first, last=last)
        self._release(-1, last=last)
        self._reduce(step.root, first=first, last=last)

    def _gather_below(self, unit: int) -> None:
        for ahead in range(unit - 1, max(0, unit - max(self._step.again_hops, 1)) - 1, -1):
            self._gather(ahead, again=True)

    def _release(self, unit: int, *, last: bool) -> None:
        if last or not self._step.kept:
            self._whole.discard(unit)

    def _reduce(self, sends: Communication, *, first: bool, last: bool) -> None:
        self._copy(sends.hand_over + (0.0 if first else sends.add_whole))
        for hops in sends.last_reductions if last else sends.reductions:
            self._advance()
            self._reducing += self._start([hops], 0.0 if first else sends.add)
