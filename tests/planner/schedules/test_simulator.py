"""The simulator by hand, against a slow one, and its errors."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.simulator import check, rank_work, simulate, steady_period
from shardwright.planner.schedules.table import make_schedule
from shardwright.planner.schedules.text import from_text
from shardwright.planner.schedules.timetable import Action, Costs, Layout, Timetable, even_costs

TWO = Layout(2)


def test_by_hand() -> None:
    """Two ranks, two micro-batches; F 2, I 3, W 1, sending 0.5."""
    timetable = from_text("F0 F1 I0 W0 I1 W1\nF0 B0 F1 B1")
    simulation = simulate(timetable, TWO, even_costs(TWO, (2.0, 3.0, 1.0, 0.5), held_by_weight=0.25))
    assert simulation.starts == ([0, 2, 9, 12, 15, 18], [2.5, 4.5, 8.5, 10.5])
    assert simulation.ends == ([2, 4, 12, 13, 18, 19], [4.5, 8.5, 10.5, 14.5])
    assert simulation.ranks[1][1] == (Action("B", 0, 0), 4.5, 8.5)
    assert simulation.micro_batches == 2
    assert simulation.makespan == 19
    assert simulation.span == 19
    assert simulation.bubble_rate() == pytest.approx((19 - 12) / 19)
    assert simulation.memory[0] == ((0, 1), (2, 2), (12, 1.25), (13, 1), (18, 0.25), (19, 0))
    assert simulation.memory[1] == ((2.5, 1), (8.5, 0), (8.5, 1), (14.5, 0))
    assert simulation.peak_memory == (2, 1)


def test_span_leaves_out_when_a_rank_begins() -> None:
    layout, costs, timetable = make_schedule("zb-h2", 4, 8, (1.0, 1.0, 1.0, 0.0))
    simulation = simulate(timetable, layout, costs)
    assert (simulation.span, simulation.makespan, simulation.bubble_rate()) == (24, 27, 0)
    assert steady_period(timetable, layout, costs) == 24


def test_bubble_of_uneven_stages_is_of_the_busiest() -> None:
    costs = Costs([1, 2], [1, 2], [1, 2], [0], [1, 1], [1, 1])
    simulation = simulate(from_text("F0 B0 F1 B1\nF0 B0 F1 B1"), TWO, costs)
    assert rank_work(costs, TWO, 2) == [6, 12]
    assert simulation.span == 18
    assert simulation.bubble_rate() == pytest.approx((18 - 12) / 18)


def test_nothing_is_sent_on_one_rank() -> None:
    """Costs may carry a time for it all the same."""
    layout = Layout(1, 2, "wave")
    costs = Costs([1, 1], [1, 1], [1, 1], [7], [1, 1], [1, 1])
    assert simulate(from_text("F0 1:F0 1:B0 B0"), layout, costs).makespan == 6


def slow_ends(timetable: Timetable, layout: Layout, costs: Costs, ready: list[float]) -> list[float]:
    """When each rank is done: longest paths, relaxed until nothing changes."""
    ends: dict[tuple[str, int, int], float] = {}
    clocks: list[float] = []
    while True:
        before, clocks = dict(ends), list(ready)
        for rank, actions in enumerate(timetable):
            for kind, chunk, micro_batch in actions:
                stage = layout.stage(rank, chunk)
                into = {"F": ("F", stage - 1), "W": ("I", stage)}.get(kind, ("I", stage + 1))
                if kind in "IB" and stage == layout.stages - 1:
                    into = ("F", stage)
                arrives = ends.get((*into, micro_batch), 0.0)
                if 0 <= into[1] < layout.stages and layout.place(into[1])[0] != rank:
                    arrives += costs.send[min(stage, into[1])]
                lasts = {"F": costs.forward, "I": costs.input_gradient, "W": costs.weight_gradient}.get(kind)
                duration = lasts[stage] if lasts else costs.input_gradient[stage] + costs.weight_gradient[stage]
                clocks[rank] = max(clocks[rank], arrives) + duration
                ends["I" if kind == "B" else kind, stage, micro_batch] = clocks[rank]
        if ends == before:
            return clocks


@pytest.mark.parametrize("name", ["interleaved-1f1b", "zb-1p", "v-half", "hanayo"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_equals_a_slow_one(name: str, data: st.DataObject) -> None:
    layout, _, timetable = make_schedule(name, 3, 6, (1.0, 1.5, 0.5, 0.1))
    value = st.floats(0.0, 4.0)

    def each() -> list[float]:
        return data.draw(st.lists(value, min_size=layout.stages, max_size=layout.stages))

    costs = Costs(each(), each(), each(), each()[1:], [1.0] * layout.stages, [1.0] * layout.stages)
    simulation = simulate(timetable, layout, costs)
    assert [ends[-1] for ends in simulation.ends] == pytest.approx(slow_ends(timetable, layout, costs, [0.0] * 3))
    # Many iterations one after the other: growth over the last of a long row, in whole turns of a cycle of ranks.
    ready, history = [0.0] * 3, []
    for _ in range(40):
        ready = slow_ends(timetable, layout, costs, ready)
        history.append(max(ready))
    assert steady_period(timetable, layout, costs) == pytest.approx(
        (history[39] - history[27]) / 12, rel=1e-2, abs=1e-9
    )


@pytest.mark.parametrize(
    ("text", "rank", "index", "says"),
    [
        ("F0 B0\nF0 F0 B0", 1, 1, "F0 runs a second time"),
        ("F0 B0 W0\nF0 B0", 0, 2, "W0 runs a second time"),
        ("F0 B0\nF0 I0 W0 I0", 1, 3, "I0 runs a second time"),
        ("F0 I0 B0\nF0 B0", 0, 2, "B0 runs a second time"),
        ("F0 B0\nB0 F0", 1, 0, "B0 runs before its F"),
        ("F0 W0 I0\nF0 B0", 0, 1, "W0 runs before its I"),
        ("W0 F0 I0\nF0 B0", 0, 0, "W0 runs before its F"),
        ("F0 I0\nF0 B0", 0, 2, "W0 is missing"),
        ("F0 B0\nF0", 1, 1, "I0 is missing"),
        ("F0 B0\n-", 1, 0, "F0 is missing"),
        ("F0 B0\nF0 1:F0 B0", 1, 1, "no F of chunk 1"),
        ("F0 F1 B0 B1\nF0 B0", 1, 2, "F1 is missing"),
        ("F0 B0 F1 B1\nF0 F1 B0 B1", 0, 1, "deadlock: B0 on rank 0 waits for I0 of chunk 0 on rank 1"),
    ],
)
def test_points_at_what_is_wrong(text: str, rank: int, index: int, says: str) -> None:
    with pytest.raises(ScheduleError, match=says) as caught:
        check(from_text(text), TWO)
    assert (caught.value.rank, caught.value.index) == (rank, index)
    assert str(caught.value).startswith(f"rank {rank}, action {index}: ")


def test_a_micro_batch_too_many() -> None:
    with pytest.raises(ScheduleError, match="no micro-batch 1"):
        check(from_text("F0 F1 B0 B1\nF0 F1 B0 B1"), TWO, micro_batches=1)
    with pytest.raises(ScheduleError, match="F1 is missing"):
        check(from_text("F0 B0\nF0 B0"), TWO, micro_batches=2)


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="1 ranks for a layout of 2"):
        check(from_text("F0 B0"), TWO)
    with pytest.raises(ValueError, match="costs of"):
        simulate(from_text("F0 B0\nF0 B0"), TWO, even_costs(Layout(3), (1, 1, 1, 0), 1.0))


def test_64_stages_and_512_micro_batches() -> None:
    layout, costs, timetable = make_schedule("zb-h1", 64, 512, (1.0, 1.0, 1.0, 0.1))
    began = time.process_time()
    simulation = simulate(timetable, layout, costs)
    assert time.process_time() - began < 0.8
    assert sum(map(len, simulation.ends)) == 3 * 64 * 512
    assert max(simulation.peak_memory) == 64
