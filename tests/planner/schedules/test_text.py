"""Timetables as text."""

import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.table import make_schedule
from shardwright.planner.schedules.text import from_text, to_text, to_torch_csv
from shardwright.planner.schedules.timetable import Action

ACTIONS = st.builds(Action, st.sampled_from("FIWB"), st.integers(0, 12), st.integers(0, 1000))


@given(st.lists(st.lists(ACTIONS).map(tuple), min_size=1).map(tuple))
def test_there_and_back(timetable: tuple[tuple[Action, ...], ...]) -> None:
    assert from_text(to_text(timetable)) == timetable


def test_by_hand() -> None:
    text = "F0 1:F0 1:I0 I0 1:W0 W0\n-\n"
    timetable = from_text("# a V on one rank, and one that does nothing\n\n" + text.replace("\n", "  # so\n"))
    assert timetable[0][2] == Action("I", 1, 0)
    assert timetable[1] == ()
    assert to_text(timetable) == text


@pytest.mark.parametrize("word", ["X0", "F", "f0", "F-1", "F0:1", "F0,", "-", "1:", "F٣"])
def test_what_is_no_action(word: str) -> None:
    with pytest.raises(ScheduleError, match="is no action") as caught:
        from_text(f"F0 B0\nF0 {word}")
    assert (caught.value.rank, caught.value.index) == (1, 1)


NAMES = ["gpipe", "1f1b", "interleaved-1f1b", "breadth-first", "zb-h1", "zb-2p", "zb-v", "v-half", "v-min"]


@pytest.mark.parametrize("name", [*NAMES, "dualpipe-v", "hanayo", "zeropp"])
def test_torch_takes_it(name: str) -> None:
    """Its validator and its lowering to sends and receives, which fails where that deadlocks."""
    torch = importlib.import_module("torch.distributed.pipelining.schedules")
    layout, _, timetable = make_schedule(name, 4, 8, (1.0, 1.1, 0.9, 0.1))
    rows = to_torch_csv(timetable, layout).splitlines()
    actions = {rank: [torch._Action.from_str(each) for each in row.split(",")] for rank, row in enumerate(rows)}
    places = {stage: layout.place(stage)[0] for stage in range(layout.stages)}
    assert torch._validate_schedule(actions, layout.ranks, layout.stages, 8) == places
    lowered = torch._add_send_recv(actions, lambda stage: places[stage], layout.stages)
    torch._simulate_comms_compute(lowered, lambda stage: places[stage], layout.stages)


def test_dualpipe_v_is_torchs() -> None:
    """But for the overlapped pairs, which here run one after the other."""
    torch = importlib.import_module("torch.distributed.pipelining.schedules")
    for ranks, micro_batches in ((1, 3), (2, 4), (3, 9), (4, 8), (5, 13)):
        layout, _, timetable = make_schedule("dualpipe-v", ranks, micro_batches, (1.0, 1.0, 1.0, 0.0))
        schedule = object.__new__(torch.ScheduleDualPipeV)
        schedule.pp_group_size, schedule._n_microbatches = ranks, micro_batches
        for rank, row in enumerate(to_torch_csv(timetable, layout).splitlines()):
            theirs = schedule._calculate_single_rank_operations(rank)
            flat = [part for each in theirs for part in (each.sub_actions or (each,))]
            assert row.split(",") == [str(each) for each in flat]
