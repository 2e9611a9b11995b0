"""ZB-V: two stages a rank on a V, searched under a memory limit.

[Note: the ZB-V heuristic]
Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 6 and appendix; in detail as in the authors'
scheduler (https://github.com/sail-sg/zero-bubble-pipeline-parallelism).

1. The first micro-batch goes down and up the V; while a rank waits for it to come back, more F of chunk 0 go down as
   far as that rank, if its memory holds them. Then the ranks are levelled: each gets as many F as the one before.
2. Rounds of one I and one F on every rank, of the chunk whose input is there. Before each of them W's fill waits, as in
   [Note: the zero-bubble heuristic].
3. The W's that are left come last.

Two flags say whether a wait too short for a W is filled before an F and before an I of chunk 1; each of the four runs
is repeated with the idle times of the first as allowance for as long as that helps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from shardwright.planner.schedules.families.clocks import Clocks
from shardwright.planner.schedules.families.family import DoesNotFitError
from shardwright.planner.schedules.timetable import Action, Costs, Kind, Layout, Timetable

_KINDS: tuple[Kind, ...] = ("F", "F", "I", "I")
_CHUNKS = (0, 1, 1, 0)
"""A micro-batch goes through the ranks four times, in legs: forward down in chunk 0 and up in chunk 1, backward down in
chunk 1 and up in chunk 0. A leg up begins on the last rank, one down on the first, with what the leg before left."""


def zb_v(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """[Note: the ZB-V heuristic] with p M_B on every rank, no more than 1F1B's first."""
    kept = [
        sum(costs.activations[layout.stage(rank, chunk)] for chunk in (0, 1)) * layout.ranks
        for rank in range(layout.ranks)
    ]
    allowed = kept if limits is None else [min(pair) for pair in zip(kept, limits, strict=True)]
    runs = _runs(layout, costs, micro_batches, allowed, careful=False)
    if not runs or allowed != kept:
        runs += _runs(layout, costs, micro_batches, allowed, careful=True)
    if not runs:
        raise DoesNotFitError("the ZB-V heuristic finds no schedule within this memory")
    best = min(runs, key=lambda run: run.span)
    return tuple(map(tuple, best.orders))


def _runs(layout: Layout, costs: Costs, micro_batches: int, limits: Sequence[float], careful: bool) -> list[_Run]:
    """The runs that keep the limits."""
    runs = []
    for fill_forward, fill_backward in product((True, False), repeat=2):
        allowance: list[float] | None = None
        while True:
            run = _Run(layout, costs, micro_batches, limits, _Flags(fill_forward, fill_backward, careful), allowance)
            try:
                run.fill()
            except DoesNotFitError:
                break
            runs.append(run)
            if allowance is not None and max(run.idle) >= max(allowance):
                break
            allowance = run.idle
    return runs


class _Flags(NamedTuple):
    fill_forward: bool
    fill_backward: bool
    careful: bool
    """Not of the authors: no warm-up of its own, and an F of chunk 0 leaves room for one of chunk 1, so that forwards
    cannot wait for each other's memory. For limits, or activations, with which the other runs come to a halt."""


class _Run(Clocks):
    """One run of the heuristic."""

    def __init__(
        self,
        layout: Layout,
        costs: Costs,
        micro_batches: int,
        limits: Sequence[float],
        flags: _Flags,
        allowance: Sequence[float] | None,
    ) -> None:
        super().__init__(limits)
        ranks = layout.ranks
        self.micro_batches, self.ranks, self.last = micro_batches, ranks, ranks - 1
        self.flags = flags
        self.pending: list[deque[tuple[int, int]]] = [deque() for _ in range(ranks)]
        self.ends = [[list[float]() for _ in range(ranks)] for _ in _KINDS]
        stages = [[layout.stage(rank, chunk) for chunk in (0, 1)] for rank in range(ranks)]
        self.send = [[costs.send[stages[rank][0]], costs.send[stages[rank + 1][1]]] for rank in range(ranks - 1)]
        self.weights = [[costs.weight_gradient[stage] for stage in of_rank] for of_rank in stages]
        self.held = [[costs.held_by_weight[stage] for stage in of_rank] for of_rank in stages]
        self.kept = [[costs.activations[stage] for stage in of_rank] for of_rank in stages]
        passes = costs.forward, costs.forward, costs.input_gradient, costs.input_gradient
        self.durations = [
            [each[of_rank[chunk]] for of_rank in stages] for each, chunk in zip(passes, _CHUNKS, strict=True)
        ]
        self.floors = [0.0 if allowance is None else max(allowance) - each for each in allowance or self.clocks]

    def fill(self) -> None:
        """The whole schedule."""
        if not self.flags.careful:
            self._warm_up()
            self._level()
        left = 6 * self.micro_batches * self.ranks
        while (placed := sum(map(len, self.orders))) < left:
            for rank, leg in self._backwards():
                if self._arrival(rank, leg) is not None:
                    self._put_in_wait(rank, leg, leg == 3 or self.flags.fill_backward)
            for rank in range(self.ranks):
                forward = self._next_forward(rank)
                if forward is not None and self._makes_room(rank, forward):
                    self._put_in_wait(rank, forward, self.flags.fill_forward)
            if len(self.ends[2][0]) == self.micro_batches == len(self.ends[3][0]):
                self._flush()
            elif sum(map(len, self.orders)) == placed:
                raise DoesNotFitError("memory is full of forwards that wait for each other")

    def _flush(self) -> None:
        for rank in range(self.ranks):
            while self.pending[rank]:
                self._put_weight(rank)

    def _makes_room(self, rank: int, chunk: int) -> bool:
        """Whether one more F fits, if need be after W's."""
        room = sum(self.kept[rank]) if self.flags.careful and chunk == 0 else self.kept[rank][chunk]
        while self.pending[rank] and self.memory[rank] + room > self.limits[rank]:
            self._put_weight(rank)
        return self.memory[rank] + room <= self.limits[rank]

    def _arrival(self, rank: int, leg: int) -> float | None:
        """When the input of the next action of a leg is there; None: not known yet."""
        index = len(self.ends[leg][rank])
        if index >= self.micro_batches or (leg and len(self.ends[leg - 1][rank]) <= index):
            return None
        if self._begins(rank, leg):
            if leg == 0:
                return 0.0
            made, send = self.ends[leg - 1][rank], 0.0
        else:
            source = rank + (1 if leg % 2 else -1)
            made, send = self.ends[leg][source], self.send[min(rank, source)][_CHUNKS[leg]]
        return made[index] + send if index < len(made) else None

    def _begins(self, rank: int, leg: int) -> bool:
        return rank == (self.last if leg % 2 else 0)

    def _put(self, rank: int, leg: int) -> None:
        arrives, ends = self._arrival(rank, leg), self.ends[leg][rank]
        kind, chunk, index = _KINDS[leg], _CHUNKS[leg], len(ends)
        if arrives is None:
            raise DoesNotFitError("an input is not there")
        kept, held = self.kept[rank][chunk], self.held[rank][chunk]
        adds = kept if kind == "F" else held - kept
        ends.append(self.run(rank, Action(kind, chunk, index), arrives, self.durations[leg][rank], adds))
        if kind == "I":
            self.pending[rank].append((chunk, index))

    def _put_weight(self, rank: int) -> None:
        chunk, index = self.pending[rank].popleft()
        self.run(rank, Action("W", chunk, index), 0.0, self.weights[rank][chunk], -self.held[rank][chunk])

    def _put_in_wait(self, rank: int, leg: int, fill: bool) -> None:
        """W's in the time until the input is there, then the action. `fill`: also one for which the time is too short,
        if this rank would be the idlest otherwise."""
        pending, arrives = self.pending[rank], self._arrival(rank, leg) or 0.0
        begins = self._begins(rank, leg)
        while pending and not begins and self.clocks[rank] + self.weights[rank][pending[0][0]] <= arrives:
            self._put_weight(rank)
        idlest = max(self.floors[rank], self.idlest)
        if pending and not begins and fill and arrives - self.clocks[rank] > idlest - self.idle[rank]:
            self._put_weight(rank)
        self._put(rank, leg)

    def _warm_up(self) -> None:
        """The way of the first micro-batch down and up, with more behind it as far as memory holds them."""
        for rank in range(self.ranks):
            self._put(rank, 0)
        for rank in reversed(range(self.ranks)):
            arrives = self._arrival(rank, 1) or 0.0
            while rank < self.last and self._one_more(rank, arrives):
                for each in range(rank + 1):
                    self._put(each, 0)
            self._put(rank, 1)

    def _one_more(self, rank: int, arrives: float) -> bool:
        """Whether one more F of chunk 0 on ranks 0 to `rank` delays none of chunk 1, and leaves the room for the F's of
        chunk 1 that come before an I."""
        return (
            self.memory[rank] + self.kept[rank][0] * (2 + 2 * rank) <= self.limits[rank]
            and self.clocks[rank] + self.durations[0][rank] <= arrives
            and len(self.ends[0][rank]) < self.micro_batches
        )

    def _level(self) -> None:
        """As many F on each rank as on the one before, of chunks 0 and 1 by turns."""
        leg, m = 0, self.micro_batches
        for rank in range(1, self.ranks):
            while True:
                (done_0, done_1), (before_0, before_1) = (
                    [len(self.ends[leg][each]) for leg in (0, 1)] for each in (rank, rank - 1)
                )
                if done_0 + done_1 >= before_0 + before_1 and not done_1 <= before_1 < m:
                    break
                able = [each for each in reversed(range(rank, self.ranks)) if len(self.ends[leg][each]) < m]
                if not self._put_all(able, leg):
                    return
                leg = 1 - leg

    def _put_all(self, ranks: Sequence[int], leg: int) -> bool:
        """An F on each of these ranks, up to one where its input or memory is not there: whether there was none."""
        for rank in ranks:
            if self._arrival(rank, leg) is None or self.memory[rank] + self.kept[rank][leg] > self.limits[rank]:
                return False
            self._put(rank, leg)
        return True

    def _backwards(self) -> list[tuple[int, int]]:
        """The rank and leg of the I's of a round: leg 3, up the ranks, where its input is there or leg 2 is done; then
        leg 2, down."""
        ups: list[int] = []
        downs: list[int] = []
        for rank in range(self.ranks):
            down, up = len(self.ends[2][rank]), len(self.ends[3][rank])
            known = rank == self.last or up < len(self.ends[3][rank + 1]) or down >= self.micro_batches
            (ups if up < down and known else downs).append(rank)
        return [(rank, 3) for rank in reversed(ups)] + [(rank, 2) for rank in downs]

    def _next_forward(self, rank: int) -> int | None:
        """The leg of a rank's F in a round, if it runs one."""
        down, up = len(self.ends[0][rank]), len(self.ends[1][rank])
        if up >= self.micro_batches:
            return None
        if up < down and self._arrival(rank, 1) is not None:
            return 1
        return 0 if self._arrival(rank, 0) is not None else None
