"""Cutting a model into stages: which consecutive units each one gets.

[Note: the cut]
A pipeline is as slow as its slowest stage, so the largest stage time is made as small as it can be, embedding and head
counted; among the cuts that reach it, the one with the least sum of squared stage times, which is the most even. Both
are exact, by dynamic programming over the end of each stage: O(stages x units^2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf

Fits = Callable[[int, int, int], bool]
"""Whether a stage can hold the units from the first up to the last, exclusive: `fits(stage, first, last)`."""


def cut(times: Sequence[float], stages: int, fits: Fits = lambda stage, first, last: True) -> tuple[int, ...] | None:
    """Where the stages end, exclusive: every unit in one stage, every stage with one unit at least ([Note: the cut]).

    `times` are seconds of each unit, forward and backward of a micro-batch. None where no cut fits. Raises ValueError
    for fewer units than stages.
    """
    if not 0 < stages <= len(times):
        raise ValueError(f"{len(times)} units make at most {len(times)} stages, not {stages}")
    slowest = _best(times, stages, fits, max, lambda seconds: seconds)
    if slowest is None:
        return None
    limit = slowest[0] * (1 + 1e-12)

    def fits_in_time(stage: int, first: int, last: int) -> bool:
        return sums[last] - sums[first] <= limit and fits(stage, first, last)

    sums = [0.0, *accumulate(times)]
    even = _best(times, stages, fits_in_time, lambda total, one: total + one, lambda seconds: seconds * seconds)
    return None if even is None else even[1]


def _best(
    times: Sequence[float],
    stages: int,
    fits: Fits,
    join: Callable[[float, float], float],
    price: Callable[[float], float],
) -> tuple[float, tuple[int, ...]] | None:
    """The cut with the least price, joined over its stages, and that price."""
    units, sums = len(times), [0.0, *accumulate(times)]
    best = [0.0, *[inf] * units]
    ends: list[list[int]] = []
    for stage in range(stages):
        reached, begun = [inf] * (units + 1), [-1] * (units + 1)
        for last in range(stage + 1, units - (stages - stage - 1) + 1):
            for first in range(stage, last):
                if best[first] == inf or not fits(stage, first, last):
                    continue
                total = join(best[first], price(sums[last] - sums[first]))
                if total < reached[last]:
                    reached[last], begun[last] = total, first
        best = reached
        ends.append(begun)
    if best[units] == inf:
        return None
    at, found = units, []
    for begun in reversed(ends):
        found.append(at)
        at = begun[at]
    return best[units], tuple(reversed(found))
