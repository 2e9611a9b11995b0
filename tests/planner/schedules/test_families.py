"""Every family, over ranks, micro-batches, chunks and costs."""

from itertools import pairwise

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from shardwright.planner.schedules.families.family import Family
from shardwright.planner.schedules.families.units import in_units
from shardwright.planner.schedules.problem import make_problem
from shardwright.planner.schedules.simulator import check, rank_work, simulate, steady_period
from shardwright.planner.schedules.table import SCHEDULES, make_schedule
from shardwright.planner.schedules.text import from_text, to_text
from shardwright.planner.schedules.timetable import Costs, Layout
from shardwright.schemas.diagnostics import InputError

FIXED = [name for name in SCHEDULES if name != "zb-auto"]
UNIT = (1.0, 1.0, 1.0, 0.0)


def chunk_counts(family: Family) -> list[int]:
    return [chunks for chunks in range(1, 7) if family.allowed_chunks(chunks)]


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[Layout, int, Costs]:
    family = SCHEDULES[name]
    layout = Layout(draw(st.integers(1, 6)), draw(st.sampled_from(chunk_counts(family))), family.placement)
    micro_batches = draw(st.integers(1, 20).filter(lambda number: not family.refuses(layout, number)))
    stages = layout.stages

    def each(least: float) -> list[float]:
        # Even or uneven: of uneven ones hypothesis finds hard ones, even ones are what the papers draw.
        values = st.floats(least, 3.0, allow_subnormal=False)
        return draw(
            st.one_of(values.map(lambda one: [one] * stages), st.lists(values, min_size=stages, max_size=stages))
        )

    activations = each(0.1)
    share = draw(st.floats(0.0, 1.0))
    costs = Costs(each(0.1), each(0.1), each(0.0), each(0.0)[1:], activations, [share * one for one in activations])
    return layout, micro_batches, costs


@pytest.mark.parametrize("name", FIXED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_runs_whole_in_order_and_within_its_memory(name: str, data: st.DataObject) -> None:
    layout, micro_batches, costs = data.draw(cases(name))
    family = SCHEDULES[name]
    made = make_schedule(name, layout.ranks, micro_batches, costs, chunks=layout.chunks)
    assert made[:2] == (layout, costs)
    timetable = made[2]
    check(timetable, layout, micro_batches)
    simulation = simulate(timetable, layout, costs)
    assert simulation.span <= simulation.makespan
    busiest = max(rank_work(costs, layout, micro_batches))
    assert simulation.span >= busiest * (1 - 1e-9)
    period = steady_period(timetable, layout, costs)
    assert busiest * (1 - 1e-9) <= period <= simulation.makespan * (1 + 1e-9)
    assert from_text(to_text(timetable)) == timetable
    for steps in simulation.memory:
        assert min(held for _, held in steps) > -1e-9
        assert abs(steps[-1][1]) < 1e-9
    if family.memory is not None and len({*costs.activations}) == 1:
        limit = family.memory(layout) * layout.chunks * costs.activations[0]
        assert max(simulation.peak_memory) <= limit * (1 + 1e-9)


@pytest.mark.parametrize("name", [name for name in FIXED if SCHEDULES[name].searches])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_keeps_a_limit_or_says_that_it_cannot(name: str, data: st.DataObject) -> None:
    layout, micro_batches, costs = data.draw(cases(name))
    limits = data.draw(st.lists(st.floats(0.1, 20.0), min_size=layout.ranks, max_size=layout.ranks))
    try:
        made = make_schedule(name, layout.ranks, micro_batches, costs, chunks=layout.chunks, memory_limit=limits)
    except InputError:
        # The zero-bubble searches can always run one micro-batch after the other; the others need more.
        needed = make_problem(layout, costs, 1 if name.startswith("zb") else micro_batches, None).limits
        assert any(limit < most for limit, most in zip(limits, needed, strict=True))
        event("does not fit")
        return
    peaks = simulate(made[2], layout, costs).peak_memory
    assert all(peak <= limit * (1 + 1e-8) for peak, limit in zip(peaks, limits, strict=True))


@pytest.mark.parametrize("name", FIXED)
def test_peak_at_equal_times_is_what_the_paper_says(name: str) -> None:
    """m = 4p, of 8 ranks; the peak is reached, not only kept."""
    family = SCHEDULES[name]
    layout, costs, timetable = make_schedule(name, 8, 32, UNIT, held_by_weight=1.0)
    peak = max(simulate(timetable, layout, costs).peak_memory)
    assert peak == pytest.approx(
        {"gpipe": 32, "breadth-first": 32, "zeropp": 11.5, "hanayo": 14}.get(name) or family.memory(layout)
    )


@pytest.mark.parametrize(
    ("name", "chunks", "bubble"),
    [
        # Bubbles per iteration of the papers' formulas, in units of T_F = T_I = T_W = 1, with p = 4.
        ("gpipe", 1, 3 * 3),
        ("1f1b", 1, 3 * 3),
        ("zb-h1", 1, 3),
        ("zb-h2", 1, 0),
        ("zb-1p", 1, 3),
        ("zb-2p", 1, 0),
        ("zb-v", 2, 0),
        ("interleaved-1f1b", 2, 3 * 3 / 2),
        ("interleaved-1f1b", 3, 3 * 3 / 3),
        ("breadth-first", 2, 3 * 3 / 2),
        ("breadth-first", 4, 3 * 3 / 4),
    ],
)
def test_bubble_at_equal_times(name: str, chunks: int, bubble: float) -> None:
    layout, costs, timetable = make_schedule(name, 4, 16, UNIT, chunks=chunks)
    assert simulate(timetable, layout, costs).span == pytest.approx(48 + bubble)


@pytest.mark.parametrize(("ranks", "rates"), [(4, (0.333, 0.213, 0.119)), (8, (0.368, 0.238, 0.135))])
def test_waves_of_as_many_micro_batches_as_ranks(ranks: int, rates: tuple[float, ...]) -> None:
    """From two waves on near (2P - 2) / (3PW + P - 1), the bubble of arXiv 2308.15762 where T_B = 2 T_F and sending is
    free; one wave does better than that. Peak: P micro-batches."""
    for waves, rate in zip((1, 2, 4), rates, strict=True):
        layout, costs, timetable = make_schedule("hanayo", ranks, ranks, UNIT, chunks=2 * waves)
        simulation = simulate(timetable, layout, costs)
        assert round(simulation.bubble_rate(), 3) == rate
        formula = (2 * ranks - 2) / (3 * ranks * waves + ranks - 1)
        assert rate < formula or rate == pytest.approx(formula, abs=0.002)
        assert max(simulation.peak_memory) == ranks
        longer = make_schedule("hanayo", ranks, 4 * ranks, UNIT, chunks=2 * waves)
        assert simulate(longer[2], layout, costs).bubble_rate() <= simulation.bubble_rate() + 1e-9


def test_units_need_parameters_twice_each() -> None:
    """On each rank the forwards of a chunk's unit, and its input gradients, come before those of the next unit; larger
    units hold more, and more chunks make a smaller bubble."""
    layout, costs, _ = make_schedule("zeropp", 4, 16, UNIT, chunks=2)
    peaks = []
    for unit in (4, 8, 16):
        timetable = in_units(layout, 16, unit, 1, 1)
        check(timetable, layout, 16)
        for actions in timetable:
            for kind in "FI":
                for chunk in (0, 1):
                    order = [each.micro_batch // unit for each in actions if (each.kind, each.chunk) == (kind, chunk)]
                    assert order == sorted(order)
        runs = [(each.chunk, each.micro_batch // unit) for each in timetable[0] if each.kind == "F"]
        assert sum(before != after for before, after in pairwise(runs)) + 1 == 2 * 16 // unit
        peaks.append(max(simulate(timetable, layout, costs).peak_memory))
    assert peaks == sorted(set(peaks))
    spans = [
        simulate(in_units(Layout(4, v), 16, 4, 1, 1), *make_schedule("zeropp", 4, 16, UNIT, chunks=v)[:2]).span
        for v in (1, 2, 4)
    ]
    assert spans == [48 + 3 / v for v in (1, 2, 4)]


def test_units_grow_with_the_memory() -> None:
    """Under a limit the largest units of those that are as fast."""
    peaks = [
        max(simulate(timetable, layout, costs).peak_memory)
        for limit in (4.0, 6.0, 8.0, 12.0)
        for layout, costs, timetable in [make_schedule("zeropp", 4, 16, UNIT, memory_limit=limit)]
    ]
    assert peaks == sorted(peaks)
    assert peaks[0] <= 4.0
    assert peaks[-1] > 8.0


@pytest.mark.parametrize(
    ("arguments", "keywords", "says"),
    [
        (("zb", 4, 8, UNIT), {}, "no schedule zb"),
        (("1f1b", 4, 8, UNIT), {"chunks": 2}, "2 chunks"),
        (("hanayo", 4, 8, UNIT), {"chunks": 3}, "3 chunks"),
        (("interleaved-1f1b", 4, 6, UNIT), {}, "multiple of the ranks, 4"),
        (("dualpipe-v", 4, 7, UNIT), {}, "as many micro-batches as stages, 8"),
        (("1f1b", 0, 7, UNIT), {}, "0 stages"),
        (("1f1b", 4, 8, UNIT), {"memory_limit": 3.0}, "holds 4 on rank 0"),
        (("1f1b", 4, 8, UNIT), {"memory_limit": [4.0, 3.0]}, "2 memory limits"),
        (("zb-1p", 4, 8, UNIT), {"memory_limit": 0.5}, "memory"),
        (("zb-v", 4, 8, UNIT), {"memory_limit": 0.5}, "memory"),
        (("hanayo", 4, 8, UNIT), {"memory_limit": 1.0}, "memory"),
        (("zeropp", 4, 8, UNIT), {"memory_limit": 1.0}, "memory"),
    ],
)
def test_says_what_is_wrong(arguments: tuple, keywords: dict, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        make_schedule(*arguments, **keywords)
    assert caught.value.diagnostics[0].suggestion
    assert caught.value.diagnostics[0].key == "strategy.schedule"


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("limit", [None, 4.0])
def test_the_search_is_in_the_table(chunks: int, limit: float | None) -> None:
    """Straight or on a V; without a limit none of the micro-batches need wait for memory."""
    layout, costs, timetable = make_schedule("zb-auto", 4, 8, UNIT, chunks=chunks, memory_limit=limit)
    check(timetable, layout, 8)
    simulation = simulate(timetable, layout, costs)
    assert max(simulation.peak_memory) <= (limit or 8.0)
    straight = chunks == 1 and limit is not None
    assert simulation.span == pytest.approx(27 if straight else 24)
