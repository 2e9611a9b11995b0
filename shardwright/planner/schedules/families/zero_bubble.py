"""ZB-1p and ZB-2p: the zero-bubble authors' search under a memory limit, one stage a rank.

[Note: the zero-bubble heuristic]
Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 3.1; the third flag and what is done in detail
are those of the authors' scheduler (https://github.com/sail-sg/zero-bubble-pipeline-parallelism).

1. Warm-up: as many F as memory holds before the first I arrives.
2. Then rounds of one F and one I on every rank. Before each of them, W's fill the time of waiting where they fit into
   it whole. Where a W does not, it is run all the same if waiting would make this rank's idle time the longest of all.
   W's are also run until memory suffices.
3. A rank always has started at least one more F than the next; where it has started two more, it may leave one out.
4. The W's that are left come last.

Three flags make eight runs, of which the shortest counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from shardwright.planner.schedules.families.clocks import Clocks
from shardwright.planner.schedules.families.family import DoesNotFitError
from shardwright.planner.schedules.timetable import Action, Costs, Kind, Layout, Timetable


def zb_1p(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """[Note: the zero-bubble heuristic] with the memory of 1F1B's first rank, p M_B, on every rank."""
    return heuristic(layout, micro_batches, costs, _capped(layout.ranks, costs, limits))


def zb_2p(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """[Note: the zero-bubble heuristic] with 2p M_B on every rank."""
    return heuristic(layout, micro_batches, costs, _capped(2 * layout.ranks, costs, limits))


def _capped(micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> list[float]:
    own = [micro_batches * each for each in costs.activations]
    return own if limits is None else [min(pair) for pair in zip(own, limits, strict=True)]


def heuristic(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float]) -> Timetable:
    """[Note: the zero-bubble heuristic]. Raises DoesNotFitError where no run keeps the limits."""
    best: _Run | None = None
    for choices in product((True, False), repeat=3):
        run = _Run(costs, micro_batches, limits, _Flags(*choices))
        try:
            run.fill()
        except DoesNotFitError:
            continue
        if best is None or run.span < best.span:
            best = run
    if best is None:
        raise DoesNotFitError("the zero-bubble heuristic finds no schedule within this memory")
    return tuple(map(tuple, best.orders))


class _Flags(NamedTuple):
    keep_first_backward: bool
    """Whether the F's of the warm-up must not delay the first I."""
    backward_first: bool
    """Whether F's may be left out, so that an I does not wait for them."""
    weight_always: bool
    """Whether a W fills a wait that is shorter even if waiting would not make this rank the idlest."""


class _Run(Clocks):
    """One run of the heuristic."""

    def __init__(self, costs: Costs, micro_batches: int, limits: Sequence[float], flags: _Flags) -> None:
        super().__init__(limits)
        ranks = costs.stages
        self.costs, self.micro_batches, self.flags, self.ranks = costs, micro_batches, flags, ranks
        self.send = [*costs.send, 0.0]
        self.ends: dict[Kind, list[list[float]]] = {"F": [], "I": [], "W": []}
        for ends in self.ends.values():
            ends += ([] for _ in range(ranks))
        self.forwards, self.inputs, self.weights = (self.ends[kind] for kind in ("F", "I", "W"))
        self.durations: dict[Kind, Sequence[float]] = {
            "F": costs.forward,
            "I": costs.input_gradient,
            "W": costs.weight_gradient,
        }
        self.adds: dict[Kind, list[float]] = {
            "F": list(costs.activations),
            "I": [held - kept for held, kept in zip(costs.held_by_weight, costs.activations, strict=True)],
            "W": [-held for held in costs.held_by_weight],
        }

    def fill(self) -> None:
        """The whole schedule."""
        self._warm_up()
        for _ in range(1, self.micro_batches):
            wanted = self._wanted_forwards()
            for rank in range(self.ranks):
                if wanted[rank]:
                    self._fill_wait(rank, "F")
                    self._put(rank, "F")
            for rank in reversed(range(self.ranks)):
                self._fill_wait(rank, "I")
                self._put(rank, "I")
        for rank in range(self.ranks):
            self._flush(rank)

    def _arrival(self, rank: int, kind: Kind) -> float:
        """When the input of a rank's next action is there; W needs none."""
        if kind == "F" and rank > 0:
            before, index = self.forwards[rank - 1], len(self.forwards[rank])
            return before[index] + self.send[rank - 1]
        if kind == "I" and rank < self.ranks - 1:
            return self.inputs[rank + 1][len(self.inputs[rank])] + self.send[rank]
        return 0.0

    def _put(self, rank: int, kind: Kind) -> None:
        ends = self.ends[kind][rank]
        if kind == "I" and len(ends) >= len(self.forwards[rank]):
            raise DoesNotFitError("memory holds too few F's for an I a round")
        action, takes, adds = Action(kind, 0, len(ends)), self.durations[kind][rank], self.adds[kind][rank]
        ends.append(self.run(rank, action, self._arrival(rank, kind), takes, adds))

    def _flush(self, rank: int) -> None:
        while len(self.weights[rank]) < len(self.inputs[rank]):
            self._put(rank, "W")

    def _warm_up(self) -> None:
        for rank in range(self.ranks):
            self._put(rank, "F")
        more = self._more_forwards()
        for rank in range(self.ranks):
            for _ in range(more[rank]):
                self._put(rank, "F")
        for rank in reversed(range(self.ranks)):
            self._put(rank, "I")

    def _more_forwards(self) -> list[int]:
        """After the first F of each rank, how many more before its first I."""
        more = [0] * self.ranks
        first = self.clocks[-1] + self.costs.input_gradient[-1]
        for rank in reversed(range(self.ranks - 1)):
            arrives, clock, forward = first + self.send[rank], self.clocks[rank], self.costs.forward[rank]
            room = self.limits[rank] - self.memory[rank]
            while 1 + more[rank] < self.micro_batches and (more[rank] + 1) * self.costs.activations[rank] <= room:
                if clock + forward > arrives if self.flags.keep_first_backward else clock >= arrives:
                    break
                clock += forward
                more[rank] += 1
            first = max(clock, arrives) + self.costs.input_gradient[rank]
        for rank in range(1, self.ranks):
            # One less than the rank before, unless both have them all.
            if 1 + more[rank] < self.micro_batches:
                more[rank] = max(0, min(more[rank], more[rank - 1] - 1))
            more[rank] = min(more[rank], more[rank - 1])
        return more

    def _wanted_forwards(self) -> list[bool]:
        """Which ranks run an F in this round: one that leaves it out makes all before it do so."""
        wanted = [
            len(self.forwards[rank]) < self.micro_batches and not self._leaves_out(rank) for rank in range(self.ranks)
        ]
        for rank in reversed(range(self.ranks - 1)):
            wanted[rank] = wanted[rank] and wanted[rank + 1]
        return wanted

    def _leaves_out(self, rank: int) -> bool:
        if not self.flags.backward_first or rank == self.ranks - 1:
            return False
        if len(self.forwards[rank]) < len(self.forwards[rank + 1]) + 2:
            return False
        # When the I of this round can arrive, if the next rank runs one F and one I at once.
        costs, behind = self.costs, rank + 1
        arrives = self.clocks[behind] + costs.forward[behind] + costs.input_gradient[behind] + self.send[rank]
        if self.clocks[rank] >= arrives:
            return True
        busy = self.clocks[rank] + costs.forward[rank] + self._weights_for_memory(rank) * costs.weight_gradient[rank]
        if busy <= arrives:
            return False
        return arrives - self.clocks[rank] <= self.idlest - self.idle[rank]

    def _weights_for_memory(self, rank: int) -> int:
        """How many W's must run before the next F fits."""
        count, pending = 0, len(self.inputs[rank]) - len(self.weights[rank])
        memory = self.memory[rank] + self.adds["F"][rank]
        while memory > self.limits[rank] and count < pending:
            memory += self.adds["W"][rank]
            count += 1
        return count

    def _fill_wait(self, rank: int, kind: Kind) -> None:
        """W's before an F or I: for its memory, and in the time until its input is there."""
        weight = self.costs.weight_gradient[rank]
        while self.memory[rank] + self.adds[kind][rank] > self.limits[rank] and self._pending(rank):
            self._put(rank, "W")
        if rank != (0 if kind == "F" else self.ranks - 1):
            arrives = self._arrival(rank, kind)
            while self._pending(rank) and self.clocks[rank] + weight <= arrives:
                self._put(rank, "W")
            wait = arrives - self.clocks[rank]
            idlest = self.flags.weight_always or wait > self.idlest - self.idle[rank]
            if self._pending(rank) and wait > 0 and idlest:
                self._put(rank, "W")
        if kind == "I" and rank == 0 and len(self.forwards[0]) == self.micro_batches:
            self._flush(0)

    def _pending(self, rank: int) -> bool:
        return len(self.weights[rank]) < len(self.inputs[rank])
