"""How far timetables get: all the way, as the simulator says, or to the first action that cannot run."""

from __future__ import annotations

import pytest

from shardwright.planner.schedules.simulator import progress, simulate
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.text import from_text, to_text
from shardwright.planner.schedules.timetable import Layout, even_costs


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_right_timetable_runs_to_its_end_at_the_simulated_times(name: str) -> None:
    family = SCHEDULES[name]
    layout = Layout(4, family.chunks, family.placement)
    costs = even_costs(layout, (1.5, 2.0, 0.75, 0.25), 0.5)
    timetable = family.make(layout, 8, costs, None)
    assert progress(timetable, layout, costs) == simulate(timetable, layout, costs).ranks


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("F0 W0 I0\n", "F0\n"),  # W before I
        ("F0 F0 I0 W0\n", "F0\n"),  # twice
        ("F0 I0 W0 I0\n", "F0 I0 W0\n"),
        ("F0 B0 W0\n", "F0 B0\n"),  # B has done it
        ("F0 I0 B0\n", "F0 I0\n"),
        ("F0 1:F0 I0\n", "F0\n"),  # no such chunk
        ("F0 F1 I0 W0 I1 W1\nF1 F0 I0 W0 I1 W1\n", "F0 F1 I0 W0 I1 W1\nF1 F0 I0 W0 I1 W1\n"),  # in another order
        ("F0 I0 F1 W0 I1 W1\nF1 F0 I0 W0 I1 W1\n", "F0\n-\n"),  # they wait for each other
    ],
)
def test_it_stops_where_an_action_cannot_run(text: str, runs: str) -> None:
    timetable = from_text(text)
    layout = Layout(len(timetable))
    lanes = progress(timetable, layout, even_costs(layout, (1.0, 1.0, 1.0, 0.0), 0.5))
    assert to_text(tuple(tuple(action for action, _, _ in lane) for lane in lanes)) == runs
