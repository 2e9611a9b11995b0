"""Cuts and checkpointing: against trying everything, and against what memory asks of early ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate, combinations, pairwise, product
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.planner.pipelines.cutting import (
    CLOSE,
    Allowance,
    Held,
    Price,
    StageChoice,
    Weights,
    divide,
    fewest,
    in_flight,
    stage_price,
)
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.timetable import Layout, even_costs

TIMES = st.lists(st.floats(0.01, 3.0), min_size=3, max_size=9)


def by_time(times: list[float]) -> Price:
    sums = [0.0, *accumulate(times)]
    return lambda stage, first, last: sums[last] - sums[first]


def slowest(price: Price, ends: tuple[int, ...], units: int) -> float:
    return max(price(stage, *pair) for stage, pair in enumerate(pairwise((0, *ends, units))))


@settings(max_examples=60, deadline=None)
@given(TIMES, st.integers(1, 4), st.data())
def test_the_slowest_stage_is_as_fast_as_it_can_be(times: list[float], stages: int, data: st.DataObject) -> None:
    permitted = sorted(data.draw(st.sets(st.integers(1, len(times) - 1), min_size=1)))
    price = by_time(times)
    found = divide(price, len(times), stages, permitted)
    every = list(combinations(permitted, stages - 1))
    if not every:
        assert found is None
        return
    assert found is not None
    assert set(found) <= set(permitted)
    least = min(slowest(price, ends, len(times)) for ends in every)
    assert slowest(price, found, len(times)) <= least * (1 + 2 * CLOSE)


def test_of_equally_slow_cuts_the_most_even_one_is_taken() -> None:
    assert divide(by_time([1.0, 1.0, 1.0, 1.0, 4.0]), 5, 3, range(1, 5)) == (2, 4)


def test_a_model_with_too_few_places_is_not_cut() -> None:
    assert divide(by_time([1.0] * 4), 4, 3, [2]) is None
    assert divide(lambda stage, first, last: inf, 4, 2, [1, 2, 3]) is None


def in_flight_of(name: str, ranks: int, micro_batches: int, chunks: int = 1) -> tuple[tuple[Held, ...], ...]:
    family = SCHEDULES[name]
    layout = Layout(ranks, chunks, family.placement)
    return in_flight(family.make(layout, micro_batches, even_costs(layout, (1, 1, 1, 0), 1.0), None), layout)


def test_what_is_in_flight() -> None:
    assert in_flight_of("1f1b", 4, 12) == tuple((Held((4 - rank,), (0,)),) for rank in range(4))
    assert [held[0].active for held in in_flight_of("gpipe", 2, 6)] == [(6,), (6,)]
    assert all(sum(held.active) + sum(held.waiting) <= 4 for held in in_flight_of("zb-h1", 4, 12)[0])


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-h2", "interleaved-1f1b", "v-half", "v-min", "dualpipe-v"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_two_micro_batches_a_rank_show_all_that_is_ever_in_flight(name: str, ranks: int) -> None:
    chunks = SCHEDULES[name].chunks
    assert in_flight_of(name, ranks, 2 * ranks, chunks) == in_flight_of(name, ranks, 8 * ranks, chunks)


def weights(blocks: int) -> Weights:
    return Weights(
        seconds=[0.1, *[3.0] * blocks, 2.0],
        recompute=[0.0, *[1.0] * blocks, 0.0],
        saved=[0, *[10] * blocks, 5],
        saved_inputs=[0, *[1] * blocks, 5],
        held_by_weight=[0] * (blocks + 2),
        states=[7.0, *[10.0] * blocks, 7.0],
    )


def test_early_stages_recompute_more_and_get_fewer_blocks() -> None:
    blocks, stages = 96, 4
    allowances = [Allowance(Held((stages - stage,), (0,)), room=700.0) for stage in range(stages)]
    price, plain = stage_price(weights(blocks), allowances), by_time(list(weights(blocks).seconds))
    ends = divide(price, blocks + 2, stages, range(1, blocks + 2))
    assert ends is not None
    even = divide(plain, blocks + 2, stages, range(1, blocks + 2))
    assert even is not None
    assert ends[0] < even[0]
    again = [price(stage, *pair) - plain(stage, *pair) for stage, pair in enumerate(pairwise((0, *ends, blocks + 2)))]
    assert again == sorted(again, reverse=True)
    assert again[0] > 0


def test_a_stage_that_does_not_fit_has_no_price() -> None:
    price = stage_price(weights(8), [Allowance(Held((2,), (0,)), room=40.0)])
    assert price(0, 1, 2) == 3.0
    assert price(0, 1, 3) == pytest.approx(6.0 + 2.0)
    assert price(0, 1, 5) == inf


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 120), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3))
def test_as_few_blocks_as_fit_are_recomputed(room: int, active: list[tuple[int, int]]) -> None:
    choices = [
        StageChoice(kept=[12, 8, 4, 0], held=2, recompute=[0, 1, 2, 3]),
        StageChoice(kept=[9, 6, 3], held=0, recompute=[0, 1, 2]),
    ]
    moments = [Held(pair, (1, 1)) for pair in active]

    def fits(counts: tuple[int, ...]) -> bool:
        return all(
            sum(n * choice.kept[count] for n, choice, count in zip(moment.active, choices, counts, strict=True)) + 2
            <= room
            for moment in moments
        )

    found = fewest(choices, moments, room)
    fitting = [counts for counts in product(range(4), range(3)) if fits(counts)]
    assert (found is None) == (not fitting)
    if found is not None:
        assert fits(found)
        if len(moments) == 1:
            assert sum(found) <= min(map(sum, fitting)) + 1


def test_cutting_a_large_model_takes_milliseconds() -> None:
    allowances = [Allowance(Held((32 - stage,), (0,)), room=500.0) for stage in range(32)]
    began = time.process_time()
    assert divide(stage_price(weights(126), allowances), 128, 32, range(1, 128)) is not None
    assert time.process_time() - began < 0.2


def cut(
    times: Sequence[float], stages: int, fits: Callable[[int, int, int], bool] = lambda stage, first, last: True
) -> tuple[int, ...] | None:
    """Where all stages end, of units of these times."""
    seconds = by_time(list(times))

    def price(stage: int, first: int, last: int) -> float:
        return seconds(stage, first, last) if fits(stage, first, last) else inf

    ends = divide(price, len(times), stages, range(1, len(times)))
    return None if ends is None else (*ends, len(times))


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
