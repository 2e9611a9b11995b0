"""Programs as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.lowering import Gathers, Program, Step, lower
from shardwright.planner.schedules.table import make_schedule
from shardwright.planner.schedules.text import PROGRAM_HEAD, program_from_text, program_to_text

NUMBERS = st.integers(0, 500)
STEPS = st.builds(
    Step, st.sampled_from(["F", "I", "W", "B", "GATHER", "RELEASE", "REDUCE"]), NUMBERS, NUMBERS, st.just(-1)
)
MESSAGES = st.builds(Step, st.sampled_from(["SEND_F", "RECV_F", "SEND_I", "RECV_I"]), NUMBERS, NUMBERS, NUMBERS)


@given(st.lists(st.lists(STEPS | MESSAGES).map(tuple), min_size=1).map(tuple))
def test_there_and_back(programs: tuple[Program, ...]) -> None:
    assert program_from_text(program_to_text(programs)) == programs


@pytest.mark.parametrize("name", ["1f1b", "zb-v", "zeropp"])
def test_lowered_timetables_survive(name: str) -> None:
    layout, costs, timetable = make_schedule(name, 4, 8, (1.0, 1.0, 1.0, 0.1))
    programs = lower(timetable, layout, costs=costs, reduce_every=1, gathers=Gathers())
    assert program_from_text(program_to_text(programs)) == programs


def test_by_hand() -> None:
    text = "F:0:0 SEND_F:0:0:1 RECV_I:0:0:1 B:0:0 REDUCE:0:0\n-\n"
    first, second = program_from_text(PROGRAM_HEAD + "\n" + text)
    assert first[:2] == (Step("F", 0, 0), Step("SEND_F", 0, 0, 1))
    assert second == ()
    assert program_to_text((first, second)) == PROGRAM_HEAD + text


@pytest.mark.parametrize(
    "word", ["X:0:0", "F", "F:0", "F:0:0:1", "SEND_F:0:0", "SEND_W:0:0:1", "f:0:0", "F:-1:0", "F:٣:0", "-"]
)
def test_what_is_no_step(word: str) -> None:
    with pytest.raises(ScheduleError, match="is no step") as caught:
        program_from_text(f"F:0:0 B:0:0\nF:1:0 {word}")
    assert (caught.value.rank, caught.value.index) == (1, 1)
