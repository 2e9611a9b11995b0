"""Cuts into stages, against trying every one."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.planner.schedules.stages import cut


def everything(times: list[int], stages: int, most: int) -> tuple[int, int] | None:
    """The least largest stage time, and the least sum of squares with it, of the cuts with at most so many units."""
    found = []
    for inner in combinations(range(1, len(times)), stages - 1):
        ends = (0, *inner, len(times))
        if all(last - first <= most for first, last in pairwise(ends)):
            sums = [sum(times[first:last]) for first, last in pairwise(ends)]
            found.append((max(sums), sum(each * each for each in sums)))
    return min(found, default=None)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(1, 5), st.integers(1, 9))
def test_no_cut_is_better(times: list[int], stages: int, most: int) -> None:
    stages = min(stages, len(times))
    ends = cut(times, stages, lambda _, first, last: last - first <= most)
    expected = everything(times, stages, most)
    if expected is None:
        assert ends is None
        return
    assert ends is not None
    assert ends[-1] == len(times)
    sums = [sum(times[first:last]) for first, last in pairwise((0, *ends))]
    assert (max(sums), sum(each * each for each in sums)) == expected


def test_embedding_and_head_take_the_place_of_blocks() -> None:
    """A head worth three of twelve blocks: the last stage gets one block, the first the embedding and three."""
    assert cut([0.5, *[1.0] * 12, 3.0], 4) == (4, 8, 12, 14)


def test_memory_may_forbid_the_even_cut() -> None:
    """Early stages hold more micro-batches, so they get fewer blocks."""
    ends = cut([1.0] * 8, 2, lambda stage, first, last: stage > 0 or last - first <= 2)
    assert ends == (2, 8)
    assert cut([1.0] * 8, 2, lambda stage, first, last: False) is None


def test_more_stages_than_units_are_refused() -> None:
    with pytest.raises(ValueError, match="2 units make at most 2 stages, not 3"):
        cut([1.0, 1.0], 3)
