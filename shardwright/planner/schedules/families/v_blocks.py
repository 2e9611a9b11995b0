"""V-Half and V-Min: two stages a rank on a V, from a repeated building block that bounds memory.

[Note: building blocks]
Qi et al., "Pipeline Parallelism with Controllable Memory", arXiv 2405.15362, sections 2 and 3; details of the pulling
are those of the authors' scheduler (https://github.com/sail-sg/zero-bubble-pipeline-parallelism). With F, I and W of
equal length, a block holds the slots of one micro-batch's two F and two I on each rank; the next micro-batch follows
6 slots later. A rank's memory is the time between its F and I in the block, summed over its chunks, over 6: choosing
the slots chooses the memory.

1. Repeat the block. W's take the first free slots after their I's.
2. Pull each action of the warm-up and cool-down to the earliest free slot that its inputs and the peak of all ranks
   allow, first with the W's at their slots; close the gaps; then pull those of the cool-down with W's that give way.
3. Keep the orders; times follow from the real costs.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

from shardwright.planner.schedules.timetable import Action, Costs, Kind, Layout, Timetable

_LEGS: tuple[tuple[Kind, int], ...] = (("F", 0), ("F", 1), ("I", 1), ("I", 0))
"""The four ways of a micro-batch through the ranks: down, up, down, up. The fifth list of slots is the W's."""
_WEIGHT = 4
_PERIOD = 6

Slots = list[list[list[int]]]
"""By rank and leg, for each micro-batch its slot."""


def v_half(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """About half of 1F1B's memory, (p + 2) // 2 M_B (arXiv 2405.15362, section 3.2, table 1)."""
    p = layout.ranks
    gap = 3 if p % 2 == 0 else 0
    return from_block(
        p, micro_batches, [(2 * i, 3 * p - i - 2, 3 * p + gap + 2 * i - 1, 6 * p + gap - i - 2) for i in range(p)]
    )


def v_min(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """About a third of 1F1B's memory, (p + 4) // 3 M_B, the least of V-shaped blocks (arXiv 2405.15362, section 3.2,
    table 1); it loses where F, I and W differ in length."""
    p = layout.ranks
    gap = 2 if p % 3 == 0 else 0
    return from_block(p, micro_batches, [(i, 2 * p - i - 1, 2 * p + gap + i, 4 * p + gap - i - 1) for i in range(p)])


def from_block(ranks: int, micro_batches: int, block: Sequence[tuple[int, int, int, int]]) -> Timetable:
    """The timetable of a block, by [Note: building blocks]: per rank the slots of micro-batch 0, of F of chunks 0 and 1
    and of I of chunks 1 and 0."""
    slots = [[[first + _PERIOD * each for each in range(micro_batches)] for first in of_rank] for of_rank in block]
    slots = [[*of_rank, [slot for slot, _ in _weights(of_rank)]] for of_rank in slots]
    _Pull(slots).run()
    slots = [of_rank[:_WEIGHT] for of_rank in _close_gaps(slots)]
    _PullAtEnd(slots).run()
    return tuple(map(_order, slots))


def _order(legs: list[list[int]]) -> tuple[Action, ...]:
    """A rank's actions by their slots."""
    at = [(slot, Action(*_LEGS[leg], each)) for leg in range(_WEIGHT) for each, slot in enumerate(legs[leg])]
    done = [0, 0]
    for slot, chunk in _weights(legs):
        at.append((slot, Action("W", chunk, done[chunk])))
        done[chunk] += 1
    return tuple(action for _, action in sorted(at))


def _weights(legs: list[list[int]]) -> list[tuple[int, int]]:
    """The slots and chunks of a rank's W's: each free slot takes one of those that wait, chunk 1 first."""
    taken = {slot: leg for leg in range(_WEIGHT) for slot in legs[leg]}
    slot, left, waiting, weights = 0, len(taken) // 2, [0, 0], list[tuple[int, int]]()
    while len(weights) < left:
        leg = taken.get(slot)
        if leg is None and any(waiting):
            chunk = 1 if waiting[1] else 0
            waiting[chunk] -= 1
            weights.append((slot, chunk))
        elif leg is not None and leg >= 2:
            waiting[_LEGS[leg][1]] += 1
        slot += 1
    return weights


class _Event(NamedTuple):
    slot: int
    rank: int
    leg: int
    micro_batch: int


def _events(slots: Slots) -> list[_Event]:
    return sorted(
        _Event(slot, rank, leg, micro_batch)
        for rank, legs in enumerate(slots)
        for leg, of_leg in enumerate(legs)
        for micro_batch, slot in enumerate(of_leg)
    )


def _input_slot(slots: Slots, event: _Event) -> int:
    """The slot of what an F or I waits for; -1: of nothing."""
    _, rank, leg, micro_batch = event
    if leg == _WEIGHT:
        return -1
    source = rank + (1 if leg % 2 else -1)
    before = slots[source][leg][micro_batch] if 0 <= source < len(slots) else -1
    return max(before, slots[rank][leg - 1][micro_batch]) if leg else before


def _close_gaps(slots: Slots) -> Slots:
    """Every action as early as the order and its inputs allow, with slots of one unit."""
    closed: Slots = [[[0] * len(of_leg) for of_leg in legs] for legs in slots]
    clocks = [0] * len(slots)
    for event in _events(slots):
        _, rank, leg, micro_batch = event
        slot = max(clocks[rank], _input_slot(closed, event) + 1)
        closed[rank][leg][micro_batch] = slot
        clocks[rank] = slot + 1
    return closed


class _Pull:
    """Pulls actions to earlier slots, in place, W's among them. Steady are those between the first micro-batch's last I
    and the last micro-batch's first F, on rank 0; they stay."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        size = 1 + max(slot for legs in slots for of_leg in legs for slot in of_leg)
        self.content = [[-1] * (size + 1) for _ in slots]
        for event in _events(slots):
            self.content[event.rank][event.slot] = event.leg
        self.backwards: list[list[int]] = [[] for _ in slots]
        """Slots of the I's that have been looked at, by rank, in order."""
        self.held = [list[int]() for _ in slots]
        self.limit = max(map(self.measure, range(len(slots))))

    def measure(self, rank: int) -> int:
        """Writes down what a rank holds after each slot, and returns the most; F adds 1, W takes 1."""
        held = 0
        for leg in self.content[rank]:
            held += 1 if 0 <= leg < 2 else -1 if leg == _WEIGHT else 0
            self.held[rank].append(held)
        return max(self.held[rank])

    def moves_before_steady(self) -> bool:
        """Whether the warm-up is pulled too."""
        return True

    def run(self) -> None:
        """Looks at all in the order of their slots."""
        phase, last = 0, len(self.slots[0][0]) - 1
        for event in _events(self.slots):
            slot, rank, leg, micro_batch = event
            if phase == 0 and rank == 0 and leg == 3:
                phase = 1
            if phase == 2 or (phase == 0 and self.moves_before_steady()):
                slot = self.pull(event)
            if phase == 1 and rank == 0 and leg == 0 and micro_batch == last:
                phase = 2
            if leg in (2, 3):
                insort(self.backwards[rank], slot)

    def pull(self, event: _Event) -> int:
        """Moves one action; returns where it is then."""
        slot, rank, leg, micro_batch = event
        first = _input_slot(self.slots, event)
        if leg == _WEIGHT:
            first = self.backwards[rank][micro_batch]
        if micro_batch:
            first = max(first, self.slots[rank][leg][micro_batch - 1])
        content = self.content[rank]
        for earlier in range(max(first + 1, self.earliest(event)), slot):
            if content[earlier] < 0 and self.allows(event, earlier):
                content[earlier], content[slot] = leg, -1
                self.slots[rank][leg][micro_batch] = earlier
                self.moved(event, earlier)
                return earlier
        return slot

    def earliest(self, event: _Event) -> int:
        """The first slot from which memory holds an action."""
        first, held = event.slot, self.held[event.rank]
        if event.leg >= 2:
            return 0
        while first > 0 and held[first - 1] < self.limit:
            first -= 1
        return first

    def allows(self, event: _Event, earlier: int) -> bool:
        """Whether memory allows a move; `earliest` has seen to it."""
        return True

    def moved(self, event: _Event, earlier: int) -> None:
        """Brings what is held up to date."""
        held, change = self.held[event.rank], {0: 1, 1: 1, _WEIGHT: -1}.get(event.leg, 0)
        for slot in range(earlier, event.slot):
            held[slot] += change


class _PullAtEnd(_Pull):
    """Without slots of their own, W's take whatever is free; only the cool-down is pulled."""

    def __init__(self, slots: Slots) -> None:
        self.waiting = [list[int]() for _ in slots]
        super().__init__(slots)

    def measure(self, rank: int) -> int:
        """Writes down held and waiting W's after each slot, and returns the most that is held."""
        size = len(self.content[rank])
        self.held[rank], self.waiting[rank] = [0] * size, [0] * size
        return self._again(rank, 0, size)

    def _again(self, rank: int, first: int, end: int) -> int:
        """The same for some slots."""
        content, holds, waits = self.content[rank], self.held[rank], self.waiting[rank]
        held, waiting, most = (holds[first - 1], waits[first - 1], 0) if first else (0, 0, 0)
        for slot in range(first, end):
            leg = content[slot]
            if leg >= 2:
                waiting += 1
            elif leg >= 0:
                held += 1
            elif waiting:
                held, waiting = held - 1, waiting - 1
            holds[slot], waits[slot] = held, waiting
            most = max(most, held)
        return most

    def moves_before_steady(self) -> bool:
        """See `_Pull`."""
        return False

    def earliest(self, event: _Event) -> int:
        """See `_Pull`; here `allows` decides."""
        return 0

    def allows(self, event: _Event, earlier: int) -> bool:
        """Whether no slot between holds too much after the move. Past them nothing gets worse: as many W's as before
        have run, or more."""
        content = self.content[event.rank]
        content[earlier], content[event.slot] = event.leg, -1
        most = self._again(event.rank, earlier, event.slot + 1)
        content[earlier], content[event.slot] = -1, event.leg
        if most > self.limit:
            self._again(event.rank, earlier, event.slot + 1)
        return most <= self.limit

    def moved(self, event: _Event, earlier: int) -> None:
        """Brings what is held up to date, also behind the old slot."""
        self._again(event.rank, earlier, len(self.content[event.rank]))
