"""Building blocks of a V for any memory, beyond the two of the paper.

[Note: blocks with constant steps]
A block ([Note: building blocks], Qi et al., arXiv 2405.15362) is the slots of one micro-batch's F, F, I and I on each
rank, repeated every 6 slots. With constant steps from rank to rank, alike on both ways up and on both ways down, and
constant gaps at its three turns, it is five small numbers (V-Half steps by 2 and 1, V-Min by 1 and 1). It is valid if
no two of a rank's four slots fall together modulo 6, which repeats with the rank modulo 6. A rank's memory is the time
between F and I of its two chunks over 2 x 6, in micro-batches: linear in the rank, so largest on the first or the last.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

PERIOD = 6


class Block(NamedTuple):
    """Memory in micro-batches, slots from first F to last I, and per rank the slots of its F, F, I and I."""

    memory: float
    length: int
    slots: tuple[tuple[int, int, int, int], ...]


@lru_cache(maxsize=16)
def blocks(ranks: int) -> tuple[Block, ...]:
    """All valid blocks, by memory."""
    found = []
    for up, down in product(range(1, 5), repeat=2):
        steps = (up, down, up, down)
        for gaps in product(range(1, 5), repeat=3):
            slots = [_slots(ranks, rank, steps, gaps) for rank in range(min(ranks, PERIOD))]
            if all(len({slot % PERIOD for slot in of_rank}) == 4 for of_rank in slots):
                found.append(_block(ranks, steps, gaps))
    return tuple(sorted(found))


def _slots(ranks: int, rank: int, steps: tuple[int, ...], gaps: tuple[int, ...]) -> tuple[int, int, int, int]:
    back = ranks - 1 - rank
    second = (ranks - 1) * steps[0] + gaps[0]
    third = second + (ranks - 1) * steps[1] + gaps[1]
    fourth = third + (ranks - 1) * steps[2] + gaps[2]
    return rank * steps[0], second + back * steps[1], third + rank * steps[2], fourth + back * steps[3]


def _block(ranks: int, steps: tuple[int, ...], gaps: tuple[int, ...]) -> Block:
    slots = tuple(_slots(ranks, rank, steps, gaps) for rank in range(ranks))
    kept = max(fourth + 1 - first + third + 1 - second for first, second, third, fourth in (slots[0], slots[-1]))
    return Block(kept / (2 * PERIOD), slots[0][3] + 1, slots)
