"""zb-auto: optimal where that can be known, never worse than what is published, better with more memory, the same each
time."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from support.exact_schedule import shorter_exists

from shardwright.planner.schedules.auto import Found, search
from shardwright.planner.schedules.families.family import DoesNotFitError
from shardwright.planner.schedules.simulator import simulate
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.timetable import Costs, Layout, even_costs

UNIT = (1.0, 1.0, 1.0, 0.0)
SMALL = (18.522, 18.086, 9.337, 0.601)
MIDDLE = (11.347, 11.248, 8.132, 0.377)
LARGE = (10.402, 10.248, 7.698, 0.46)
"""F, I, W and sending in ms of the 1.5B, 14.6B and 28.3B models (arXiv 2401.10241)."""


def layout_of(ranks: int, chunks: int) -> Layout:
    return Layout(ranks, chunks, "wave" if chunks == 2 else "loop")


def uneven_costs(layout: Layout, seed: int, held: float = 0.5) -> Costs:
    """Stages that differ by up to 30 % in time and memory."""
    chance = random.Random(seed)
    stages = layout.stages
    scale = [(1 + 0.3 * chance.random()) / layout.chunks for _ in range(stages)]
    kept = [(1 + 0.2 * chance.random()) / layout.chunks for _ in range(stages)]
    even = even_costs(layout, (1.0, 1.1, 0.7, 0.05), held)
    return Costs(
        scale, [1.1 * each for each in scale], [0.7 * each for each in scale], even.send, kept, [held * k for k in kept]
    )


def checked(layout: Layout, costs: Costs, micro_batches: int, limits: Sequence[float], passes: int = 16) -> Found:
    """What the search finds, replayed by the simulator."""
    found = search(layout, costs, micro_batches, limits, passes)
    simulation = simulate(found.timetable, layout, costs)
    assert simulation.span == pytest.approx(found.span, rel=1e-9)
    assert all(held <= limit * (1 + 1e-9) for held, limit in zip(simulation.peak_memory, limits, strict=True))
    assert found.span >= found.bound * (1 - 1e-9)
    return found


def bubble(found: Found, layout: Layout, costs: Costs) -> float:
    return simulate(found.timetable, layout, costs).bubble_rate()


TINY = [
    (ranks, chunks, micro_batches, limit, even)
    for ranks, chunks, micro_batches, limit in (
        (2, 1, 3, 1.5), (2, 1, 6, 3.0), (2, 1, 5, 2.0), (3, 1, 4, 2.0), (3, 1, 4, 3.0), (3, 1, 5, 2.5), (4, 1, 3, 2.0),
        (4, 1, 3, 4.0), (2, 2, 3, 1.5), (2, 2, 3, 2.0), (2, 2, 4, 2.0),
    )
    for even in (True, False)
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches", "limit", "even"), TINY)
def test_small_cases_are_optimal(ranks: int, chunks: int, micro_batches: int, limit: float, even: bool) -> None:
    layout = layout_of(ranks, chunks)
    costs = even_costs(layout, (1.0, 0.9, 0.5, 0.1), 0.5) if even else uneven_costs(layout, ranks + micro_batches)
    limits = [limit * (1.0 if even else 1.2)] * ranks
    found = checked(layout, costs, micro_batches, limits)
    assert found.span <= found.bound * (1 + 1e-9) or not shorter_exists(
        layout, costs, micro_batches, limits, found.span * (1 - 1e-6)
    )


def test_the_exact_answer_sees_a_shorter_schedule() -> None:
    layout = Layout(2)
    costs = even_costs(layout, UNIT, 0.5)
    one_by_one = simulate(SCHEDULES["gpipe"].make(layout, 4, costs, None), layout, costs)
    assert shorter_exists(layout, costs, 4, [4.0, 4.0], one_by_one.span * 0.999)


PUBLISHED = [
    ((8, 24), SMALL, 8, 0.1585), ((8, 24), SMALL, 16, 0.0433), ((16, 48), MIDDLE, 16, 0.1397),
    ((16, 48), MIDDLE, 32, 0.0066),
]  # fmt: skip
"""Bubble rates of ZB-1p and ZB-2p (arXiv 2401.10241)."""


@pytest.mark.parametrize(("size", "times", "limit", "published"), PUBLISHED)
def test_at_most_the_published_bubble(
    size: tuple[int, int], times: tuple[float, float, float, float], limit: float, published: float
) -> None:
    layout = Layout(size[0])
    costs = even_costs(layout, times, 0.5)
    found = checked(layout, costs, size[1], [limit] * size[0])
    assert round(bubble(found, layout, costs), 4) <= published


@pytest.mark.parametrize("ranks", [4, 6, 8])
def test_unit_costs_on_a_v_need_no_bubble_with_p_micro_batches(ranks: int) -> None:
    layout = layout_of(ranks, 2)
    found = checked(layout, even_costs(layout, UNIT, 0.5), 3 * ranks, [ranks] * ranks)
    assert found.gap == pytest.approx(0.0, abs=1e-9)
    assert found.span == pytest.approx(9 * ranks)


def fitting_spans(layout: Layout, costs: Costs, micro_batches: int, limits: Sequence[float]) -> dict[str, float]:
    """Spans of the other families within the limits."""
    spans = {}
    for name, family in SCHEDULES.items():
        same = layout.chunks == 1 or family.placement == layout.placement
        if name == "zb-auto" or not same or not family.allowed_chunks(layout.chunks):
            continue
        if family.refuses(layout, micro_batches):
            continue
        try:
            simulation = simulate(family.make(layout, micro_batches, costs, limits), layout, costs)
        except DoesNotFitError:
            continue
        if all(held <= limit * (1 + 1e-9) for held, limit in zip(simulation.peak_memory, limits, strict=True)):
            spans[name] = simulation.span
    return spans


def hold_against_families(ranks: int, chunks: int, micro_batches: int, share: float, seed: int | None) -> None:
    layout = layout_of(ranks, chunks)
    costs = even_costs(layout, LARGE, 0.5) if seed is None else uneven_costs(layout, seed, held=1.0)
    limits = [share * ranks * max(sum(costs.activations) / ranks, 1.0)] * ranks
    found = checked(layout, costs, micro_batches, limits, passes=8)
    for name, span in fitting_spans(layout, costs, micro_batches, limits).items():
        assert found.span <= span * (1 + 1e-9), name


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(("chunks", "share"), [(1, 1.0), (1, 2.0), (2, 0.5), (2, 1.0)])
@pytest.mark.parametrize(("ranks", "times"), [(4, 1), (4, 3), (6, 2)])
def test_never_worse_than_another_family(ranks: int, times: int, chunks: int, share: float, seed: int | None) -> None:
    hold_against_families(ranks, chunks, times * ranks, share, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize(("chunks", "share"), [(1, 1.0), (1, 1.5), (2, 0.5), (2, 0.75), (2, 1.0)])
@pytest.mark.parametrize(("ranks", "times"), [(8, 1), (8, 4), (16, 2)])
def test_never_worse_than_another_family_at_size(
    ranks: int, times: int, chunks: int, share: float, seed: int | None
) -> None:
    hold_against_families(ranks, chunks, times * ranks, share, seed)


@pytest.mark.parametrize("times", [UNIT, SMALL])
@pytest.mark.parametrize(("name", "ranks"), [("zb-v", 8), ("v-half", 8), ("v-min", 8), ("v-half", 6), ("v-min", 9)])
def test_on_a_v_at_the_memory_of_the_published_family(
    name: str, ranks: int, times: tuple[float, float, float, float]
) -> None:
    layout = layout_of(ranks, 2)
    costs = even_costs(layout, times, 0.5)
    published = simulate(SCHEDULES[name].make(layout, 3 * ranks, costs, None), layout, costs)
    found = checked(layout, costs, 3 * ranks, published.peak_memory, passes=8)
    assert found.span <= published.span * (1 + 1e-9)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), [(4, 1, 9), (4, 2, 8), (5, 1, 7), (2, 2, 4)])
def test_more_memory_is_never_worse(ranks: int, chunks: int, micro_batches: int, seed: int | None) -> None:
    layout = layout_of(ranks, chunks)
    costs = even_costs(layout, MIDDLE, 0.5) if seed is None else uneven_costs(layout, seed)
    unit = max(sum(costs.activations[layout.stage(rank, c)] for c in range(chunks)) for rank in range(ranks))
    spans = [
        checked(layout, costs, micro_batches, [half * unit / 2] * ranks, passes=8).span
        for half in range(2, 4 * ranks + 3, 2 if ranks > 3 else 1)
    ]
    assert all(more <= less * (1 + 1e-9) for less, more in pairwise(spans))


def test_ranks_may_have_limits_of_their_own() -> None:
    layout = Layout(4)
    costs = uneven_costs(layout, 5)
    loose = checked(layout, costs, 10, [8.0] * 4)
    tight = checked(layout, costs, 10, [8.0, 3.0, 3.0, 2.0])
    assert loose.span <= tight.span * (1 + 1e-9)


def test_the_same_input_gives_the_same_schedule() -> None:
    layout = layout_of(4, 2)
    costs = uneven_costs(layout, 4)
    assert search(layout, costs, 7, [2.5] * 4) == search(layout, costs, 7, [2.5] * 4)


def test_without_a_limit_all_memory_may_be_used() -> None:
    layout = Layout(3)
    costs = even_costs(layout, UNIT, 1.0)
    assert search(layout, costs, 5) == search(layout, costs, 5, [5.0] * 3)


def test_a_limit_below_one_micro_batch_is_refused() -> None:
    layout = layout_of(2, 2)
    with pytest.raises(DoesNotFitError, match=r"rank 0 keeps 1 .* memory limit of 0\.9"):
        search(layout, even_costs(layout, UNIT, 0.5), 4, [0.9, 2.0])
