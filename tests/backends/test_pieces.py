"""Stretches of a tensor's elements as boxes, against brute force."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.backends.pytorch.runtime.index import check_cover
from shardwright.backends.pytorch.runtime.pieces import Box, flat_boxes, whole


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_flat_boxes_are_the_elements_in_their_order(shape: list[int], data: st.DataObject) -> None:
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = torch.arange(size).reshape(shape)
    boxes = flat_boxes(shape, start, stop)
    found = [numbers[tuple(map(slice, box.start, box.stop))].flatten() for box in boxes]
    assert torch.equal(torch.cat([torch.arange(0), *found]), torch.arange(start, stop))
    assert all(box.numel for box in boxes)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(numbers[tuple(map(slice, box.start, box.stop))].is_contiguous() for box in boxes)


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_flat_boxes_of_neighbours_cover_a_tensor(shape: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, prod(shape)), max_size=6)))
    edges = [0, *cuts, prod(shape)]
    boxes = [box for a, b in pairwise(edges) for box in flat_boxes(shape, a, b)]
    check_cover("it", tuple(shape), boxes)


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 24, [whole((2, 3, 4))]),
        (5, 7, [Box((0, 1, 1), (1, 2, 3))]),
        (4, 12, [Box((0, 1, 0), (1, 3, 4))]),
        (3, 14, [Box((0, 0, 3), (1, 1, 4)), Box((0, 1, 0), (1, 3, 4)), Box((1, 0, 0), (2, 1, 2))]),
        (7, 7, []),
    ],
)
def test_flat_boxes_of_an_example(start: int, stop: int, expected: list[Box]) -> None:
    assert list(flat_boxes((2, 3, 4), start, stop)) == expected


def test_the_cover_by_many_pieces_of_one_row_is_checked_at_once() -> None:
    """Each piece is compared with its neighbours alone, not with all others."""
    shape = (1, 200_000)
    boxes = [box for start in range(0, shape[1], 10) for box in flat_boxes(shape, start, start + 10)]
    check_cover("it", shape, boxes)
