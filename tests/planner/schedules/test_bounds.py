"""Lower bounds: what is known of them in closed form, and that no schedule is below."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.exact_schedule import shorter_exists

from shardwright.planner.schedules.auto import search
from shardwright.planner.schedules.bounds import lower_bound
from shardwright.planner.schedules.simulator import simulate
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.timetable import Costs, Layout, even_costs

PROFILE = (18.522, 18.086, 9.337, 0.601)
"""F, I, W and sending in ms of the 1.5B model on 8 ranks (arXiv 2401.10241)."""


def test_work_alone_is_the_bound_of_one_rank() -> None:
    layout = Layout(1)
    assert lower_bound(layout, even_costs(layout, (2.0, 3.0, 1.0, 0.0), 0.5), 5, [1.0]) == pytest.approx(30.0)


def test_with_p_micro_batches_zb_h1_is_optimal() -> None:
    """work + (p - 1)(T_F + T_I - T_W + 4 T_send): the way up and back is waited for at both ramps."""
    forward, gradient, weight, send = PROFILE
    layout = Layout(8)
    costs = even_costs(layout, PROFILE, 0.5)
    expected = 24 * (forward + gradient + weight) + 7 * (forward + gradient - weight + 4 * send)
    assert lower_bound(layout, costs, 24, [8.0] * 8) == pytest.approx(expected)
    zb_h1 = SCHEDULES["zb-h1"].make(layout, 24, costs, None)
    assert simulate(zb_h1, layout, costs).span == pytest.approx(expected)


def test_the_last_rank_bounds_a_schedule_with_plenty_of_memory() -> None:
    """(m + p - 1)(T_F + T_I) + 2 (p - 1) T_send + T_W."""
    forward, gradient, weight, send = PROFILE
    layout = Layout(8)
    found = lower_bound(layout, even_costs(layout, PROFILE, 0.5), 24, [24.0] * 8)
    assert found == pytest.approx(31 * (forward + gradient) + 14 * send + weight)


def test_memory_times_time_bounds_a_schedule_with_little() -> None:
    """One micro-batch at a time on rank 0: m round trips."""
    layout = Layout(4)
    costs = even_costs(layout, (1.0, 1.0, 1.0, 0.0), 1.0)
    assert lower_bound(layout, costs, 6, [1.0] * 4) == pytest.approx(6 * (4 + 4 + 1))


@st.composite
def uneven(draw: st.DrawFn, most_ranks: int = 4, least_actions: int = 75) -> tuple[Layout, Costs, int, list[float]]:
    """Any layout with costs of every stage, and limits of every rank that a micro-batch fits into."""
    ranks = draw(st.integers(1, most_ranks))
    chunks = draw(st.integers(1, 3))
    layout = Layout(ranks, chunks, draw(st.sampled_from(["loop", "wave"])))

    def times(low: float, high: float, number: int) -> list[float]:
        return [draw(st.integers(int(8 * low), int(8 * high))) / 8 for _ in range(number)]

    stages = layout.stages
    rank_of = [layout.place(stage)[0] for stage in range(stages)]
    send = [
        0.0 if rank_of[stage] == rank_of[stage + 1] else each for stage, each in enumerate(times(0, 0.5, stages - 1))
    ]
    kept = times(0.5, 2, stages)
    share = draw(st.sampled_from([0.25, 0.5, 1.0]))
    costs = Costs(
        times(0.5, 2, stages),
        times(0.5, 2, stages),
        times(0.25, 2, stages),
        send,
        kept,
        [share * each for each in kept],
    )
    needed = [sum(kept[s] for s in range(stages) if rank_of[s] == rank) for rank in range(ranks)]
    limits = [each * draw(st.integers(4, 16)) / 4 for each in needed]
    least = -(-least_actions // (3 * stages))
    return layout, costs, draw(st.integers(least, least + 3)), limits


@settings(max_examples=20, deadline=None)
@given(uneven())
def test_no_schedule_is_below_the_bound(case: tuple[Layout, Costs, int, list[float]]) -> None:
    layout, costs, micro_batches, limits = case
    bound = lower_bound(layout, costs, micro_batches, limits)
    found = search(layout, costs, micro_batches, limits, passes=2)
    simulation = simulate(found.timetable, layout, costs)
    assert found.bound == bound
    assert simulation.span == pytest.approx(found.span, rel=1e-9)
    assert found.span >= bound * (1 - 1e-9)
    assert all(held <= limit * (1 + 1e-9) for held, limit in zip(simulation.peak_memory, limits, strict=True))


@settings(max_examples=30, deadline=None)
@given(uneven(most_ranks=2, least_actions=1).filter(lambda case: case[0].stages * case[2] <= 8))
def test_no_schedule_at_all_is_below_the_bound(case: tuple[Layout, Costs, int, list[float]]) -> None:
    layout, costs, micro_batches, limits = case
    bound = lower_bound(layout, costs, micro_batches, limits)
    assert not shorter_exists(layout, costs, micro_batches, limits, bound * (1 - 1e-6))


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"zb-auto"}))
def test_no_family_is_below_the_bound_at_its_own_memory(name: str) -> None:
    family = SCHEDULES[name]
    layout = Layout(4, family.chunks, family.placement)
    for times in ((1.0, 1.0, 1.0, 0.0), (1.0, 1.1, 0.6, 0.05)):
        costs = even_costs(layout, times, 0.5)
        simulation = simulate(family.make(layout, 12, costs, None), layout, costs)
        assert lower_bound(layout, costs, 12, simulation.peak_memory) <= simulation.span * (1 + 1e-9)
