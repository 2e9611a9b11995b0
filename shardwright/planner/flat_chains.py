"""Bytes of what is on its way in `ShardedStates`: gathers, reductions, and new values for the parameters at rest.

[Note: what a chain holds]
A chain goes one hop on whenever the chain of another unit begins, so how far it is follows from how many have begun
since. A hop that is under way holds what it reads and what it writes; the reduction's first hop reads the whole float32
buffer, an all-reduce reads and writes in place, the last hop of new values writes into the parameters at rest. Until a
reduction has reached level g, the sum of the earlier micro-batches lies beside it. The last reductions of a micro-batch
go on in the forward of the next, a hop with every block.

[Note: packing]
A hop with fewer bits holds a message to send and those that come, until the unit's next such hop or the end of the
gather. Packing and unpacking are done by a chain of operators (runtime/quantize.py) and take up to 9 bytes an element
of a bf16 message, 5 of a float32 one, and 5 of what is unpacked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction
from itertools import accumulate

from shardwright.planner.flat import Chain
from shardwright.planner.precisions import MASTER_BYTES
from shardwright.planner.quantized import BLOCK, SCALE_BYTES, message_bytes

PACKING = {2: 9, MASTER_BYTES: 5}
"""Bytes an element, by the bytes of what is packed ([Note: packing])."""
UNPACKING = 5 + Fraction(SCALE_BYTES, BLOCK)


Share = tuple[int, int]
"""A part of a number of bytes: numerator and denominator."""


def _part(size: int, share: Share) -> int:
    return size * share[0] // share[1]


def message_share(bits: int) -> Fraction:
    """Bytes of a message for each of its elements."""
    return Fraction(message_bytes(BLOCK, bits), BLOCK)


class FlatGathers:
    """Gathers from one level to the whole, as parts of a unit's whole bytes."""

    def __init__(self, layout: Chain, level: int, compute: int, int8: Collection[int]) -> None:
        self._shares, self._packing = [(0, 1)], [(0, 1)]
        message = message_share(8) / compute
        for hop in range(1, level + 1):
            axis = level - hop
            whole, part = Fraction(1, layout.degree(axis)), Fraction(1, layout.degree(axis + 1))
            reads = part if hop > 1 else Fraction(0)
            writes, packing = whole, Fraction(0)
            if axis in int8:
                writes = message * (whole + part)
                packing = Fraction(PACKING[compute], compute) * part
            if hop > 1 and axis + 1 in int8:
                stale = message * (part + Fraction(1, layout.degree(axis + 2)))
                reads += 0 if axis in int8 else stale
                packing = max(packing, UNPACKING / compute * part + (stale if axis in int8 else 0))
            self._shares.append((reads + writes).as_integer_ratio())
            self._packing.append(max(Fraction(0), packing - writes).as_integer_ratio())
        arrival = 1 + UNPACKING / compute if level and 0 in int8 else Fraction(0)
        self._arrival = arrival.as_integer_ratio()
        self.packs = any(axis in int8 for axis in range(level))
        """Whether any hop has fewer bits."""

    def held(self, whole: int, hops: int) -> int:
        """Bytes when so many hops have been issued, the last of them under way."""
        return _part(whole, self._shares[hops])

    def packing(self, whole: int, hops: int) -> int:
        """Bytes that it takes beside these, at most, to have the last of so many hops issued."""
        return _part(whole, self._packing[hops])

    def arrival(self, whole: int) -> int:
        """Bytes more while the last hop of all is unpacked."""
        return _part(whole, self._arrival)


class FlatGradients:
    """Gradients of all units in the micro-batch of this number: `trained` are the padded elements of each unit, the
    root's last."""

    def __init__(
        self, layout: Chain, trained: Sequence[int], int4: Collection[int], *, number: int, last: bool
    ) -> None:
        degree = layout.degree
        self._number, self._first = number, number == 0
        self._bytes = [MASTER_BYTES * elements for elements in trained]
        self._sum_degree = degree(layout.gradients)
        self._end_degree = degree(layout.optimizer_states) if last else self._sum_degree
        hops = len(layout.sizes) if last else layout.gradients
        self._hops = [reduction_share(layout, axis, int4).as_integer_ratio() for axis in range(hops)]
        packed = [axis in int4 and axis < layout.optimizer_states for axis in range(hops)]
        self.packs = any(packed)
        """Whether any hop has fewer bits."""
        unpacking = UNPACKING / MASTER_BYTES
        self._unpacking = [(unpacking / degree(axis) * packed[axis]).as_integer_ratio() for axis in range(hops)]
        beside = (PACKING[MASTER_BYTES] - 2 * message_share(4)) / MASTER_BYTES
        self._packing = [(beside / degree(axis) * packed[axis]).as_integer_ratio() for axis in range(hops)]
        self._below_sum, self._writing = layout.gradients, min(hops, layout.optimizer_states)
        self.reduces = hops > 0
        """Whether anything is sent in this micro-batch."""
        blocks = [block for block, elements in enumerate(trained[:-1]) if elements]
        self._blocks = [self._bytes[block] for block in blocks]
        self._sums = [0, *accumulate(self._blocks)]
        self._places = [0, *accumulate(elements > 0 for elements in trained[:-1])]
        self.before = 0 if self._first else sum(self._bytes) // self._sum_degree
        """Bytes from the micro-batches before this one, when all their reductions have ended."""

    def fresh(self, unit: int) -> int:
        """The buffer that a unit's first gradient makes."""
        return self._bytes[unit] if self._first or self._below_sum else 0

    def left(self, blocks: int) -> tuple[int, int]:
        """Bytes of gradients, and of hops under way, from the micro-batches before this one, when so many blocks have
        begun their forward."""
        if self._first:
            return 0, 0
        units = ([self._bytes[-1]] if self._bytes[-1] else []) + self._blocks
        under_way = units[: max(0, self._below_sum - blocks)]
        hops = self._hops[blocks : self._below_sum]
        buffers = sum(_part(size, hop) for size, hop in zip(under_way, hops, strict=False))
        gradients = self.before - (sum(under_way) // self._sum_degree if self._number == 1 else 0)
        return gradients, buffers

    def going_on(self, blocks: int) -> tuple[int, int]:
        """The same when they go on, with what unpacking takes."""
        units = ([self._bytes[-1]] if self._bytes[-1] else []) + self._blocks
        gradients, buffers = self.left(blocks)
        unpacking = self._unpacking[blocks : self._below_sum]
        return gradients, buffers + (0 if self._first else _largest(units, unpacking))

    def handed_over(self, block: int) -> tuple[int, int]:
        """Bytes of gradients, and of hops under way, when the reductions of all blocks behind `block` have begun."""
        return self._state(self._places[block + 1], [], self._bytes[-1])

    def all_handed_over(self) -> tuple[int, int]:
        """The most while that of the root begins and all go on to their ends."""
        root = [self._bytes[-1]] if self._bytes[-1] else []
        gradients, buffers = self._state(0, root, 0)
        before = self.fresh(len(self._bytes) - 1) + self._going_on(self._blocks)
        after = buffers + _largest(root, self._packing)
        return gradients, max(before, after, self._going_on([*root, *self._blocks]))

    def handing_over(self, block: int) -> tuple[int, int]:
        """The most while those of the blocks behind `block` go on and its own begins."""
        gradients, buffers = self.handed_over(block - 1)
        before = (self.fresh(block) if self._hops else 0) + self._going_on(self._blocks[self._places[block + 1] :])
        return gradients, max(before, buffers + _largest([self._bytes[block]], self._packing))

    def _going_on(self, units: Sequence[int]) -> int:
        """The most that hops hold while these units, each a hop further than the one before it, go on by one, the last
        of them first; 0 where that makes nothing."""
        units, worst = units[: len(self._hops)], 0
        for at, size in enumerate(units):
            ahead = sum(_part(size, hop) for size, hop in zip(units[at + 1 :], self._hops[at + 2 :], strict=False))
            behind = sum(_part(size, hop) for size, hop in zip(units[:at], self._hops, strict=False))
            unpacks = self._unpacking[at][0] > 0
            unpacked = _part(size, self._hops[at]) + _part(size, self._unpacking[at]) if unpacks else 0
            written = _part(size, self._hops[at + 1]) if at + 1 < self._writing else 0
            if written or unpacks:
                worst = max(worst, ahead + max(unpacked, written) + behind)
        return worst

    def _state(self, place: int, newest: list[int], waiting: int) -> tuple[int, int]:
        """`newest` chains, then those of the blocks from `place` on; `waiting` has not begun."""
        count = max(0, len(self._hops) - len(newest))
        under_way = [*newest[: len(self._hops)], *self._blocks[place : place + count]]
        ended = self._sums[-1] - self._sums[min(place + count, len(self._blocks))] + sum(newest[len(self._hops) :])
        gradients = ended // self._end_degree
        if not self._first:
            waits = waiting + self._sums[place] + sum(under_way[: self._below_sum])
            gradients += waits // self._sum_degree
        return gradients, sum(_part(size, hop) for size, hop in zip(under_way, self._hops, strict=False))


def _largest(units: Sequence[int], shares: Sequence[Share]) -> int:
    return max((_part(size, share) for size, share in zip(units, shares, strict=False)), default=0)


def reduction_share(layout: Chain, axis: int, int4: Collection[int]) -> Fraction:
    """What the hop over an axis holds, as a part of the whole buffer."""
    if axis >= layout.optimizer_states:
        return Fraction(1, layout.degree(layout.optimizer_states))
    reads = Fraction(1, layout.degree(axis))
    if axis in int4:
        return reads + 2 * reads * message_share(4) / MASTER_BYTES
    return reads + Fraction(1, layout.degree(axis + 1))


class FlatPublishing:
    """New values on their way from level o to level p, the root's first, then those of the blocks in order."""

    def __init__(self, layout: Chain, trained: Sequence[int], compute: int) -> None:
        start, self._hops = layout.optimizer_states, layout.optimizer_states - layout.parameters
        self._bytes = [compute * elements for elements in (trained[-1], *trained[:-1])]
        self._sums = [0, *accumulate(self._bytes)]
        self._gradients = [MASTER_BYTES * size // compute // layout.degree(start) for size in self._bytes]
        self._held = [(0, 1)]
        for hop in range(1, self._hops + 1):
            at_rest = hop == 1 and compute == MASTER_BYTES
            reads = 0 if at_rest else Fraction(1, layout.degree(start - hop + 1))
            writes = 0 if hop == self._hops else Fraction(1, layout.degree(start - hop))
            self._held.append(Fraction(reads + writes).as_integer_ratio())

    @property
    def worst(self) -> int:
        """Bytes when the root has been sent off, or all have, each unit's gradients dropped before; 0 where nothing is
        held."""
        one, every = self._of(0, 1, 1), self._of(0, len(self._bytes), 1)
        return max(one + sum(self._gradients[1:]), every) if every else 0

    def behind(self, arrived: int) -> int:
        """Bytes when the root and the first `arrived` blocks have arrived. As many units behind them as there are
        hops, less one, have been sent on, some more than once."""
        first, window = arrived + 1, min(arrived + self._hops, len(self._bytes))
        sent_on = sum(
            self._of(place, place + 1, 2 + arrived - max(0, place - self._hops + 1)) for place in range(first, window)
        )
        return sent_on + self._of(max(first, window), len(self._bytes), 1)

    def _of(self, first: int, last: int, hop: int) -> int:
        if last <= first or not self._hops:
            return 0
        return _part(self._sums[last] - self._sums[first], self._held[min(hop, self._hops)])
