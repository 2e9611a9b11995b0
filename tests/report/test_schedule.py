"""Pipeline schedules drawn: the grid compared line by line with kept files, the numbers with their definitions, SVG and
trace with the simulation.

After a wanted change: `UPDATE_DRAWINGS=1 pytest tests/report`, then look at the pictures.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console, RenderableType

from shardwright import report
from shardwright.planner.schedules.bounds import lower_bound
from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.simulator import progress, simulate, steady_period
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.text import from_text
from shardwright.planner.schedules.timetable import Layout, even_costs
from shardwright.report.schedule import Misfit, Schedule

KEPT = Path(__file__).parent / "drawings"
SVG = "{http://www.w3.org/2000/svg}"
TIMES = (1.0, 1.0, 1.0, 0.0)


def schedule(name: str, ranks: int, micro_batches: int, times: tuple[float, float, float, float] = TIMES) -> Schedule:
    family = SCHEDULES[name]
    layout = Layout(ranks, family.chunks, family.placement)
    costs = even_costs(layout, times, held_by_weight=0.5)
    timetable = family.make(layout, micro_batches, costs, None)
    return Schedule(
        family=name,
        simulation=simulate(timetable, layout, costs),
        period=steady_period(timetable, layout, costs),
        lower_bound=lower_bound(layout, costs, micro_batches, None),
    )


def stop(text: str) -> RenderableType:
    """The drawing of a timetable that does not run."""
    timetable = from_text(text)
    layout = Layout(len(timetable))
    costs = even_costs(layout, TIMES, 0.5)
    with pytest.raises(ScheduleError) as caught:
        simulate(timetable, layout, costs)
    return report.draw_stop(timetable, progress(timetable, layout, costs), caught.value)


DRAWINGS: dict[str, Callable[[], RenderableType]] = {
    "schedule": lambda: report.draw_schedule(schedule("zb-h1", 4, 8)),
    "schedule-dense": lambda: report.draw_schedule(schedule("zb-h1", 8, 24, (18.522, 18.086, 9.337, 0.601))),
    "schedule-chunks": lambda: report.draw_schedule(schedule("interleaved-1f1b", 4, 8)),
    "schedule-wrong": lambda: stop("F0 F1 I0 W0 I1 W1\nF0 I0 F1 W1 W0 I1\n"),
    "schedule-deadlock": lambda: stop("F0 I0 W0 F1 I1 W1\nF0 F1 I0 I1 W0 W1\n"),
    "schedule-missing": lambda: stop("F0 F1 I0 W0 I1 W1\nF0 I0 F1 I1 W0\n"),
    "schedule-misfit": lambda: report.draw_misfit(Misfit("zb-h1", (3.5,) * 4, (4.0,) * 4, ("v-min", "zb-auto"))),
}


def drawn(drawing: RenderableType, width: int, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=stream, width=width, highlight=False).print(drawing)
    stream.seek(0)
    return "\n".join(line.rstrip() for line in stream.read().splitlines()) + "\n"


def kept(name: str, text: str) -> str:
    path = KEPT / name
    if os.environ.get("UPDATE_DRAWINGS"):
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_at_80_columns(name: str) -> None:
    text = drawn(DRAWINGS[name](), 80)
    assert text == kept(f"{name}.txt", text)


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", DRAWINGS)
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    text = drawn(DRAWINGS[name](), width, encoding="ascii")
    assert max(map(len, text.splitlines())) <= width
    assert text.isascii()


def cells(text: str) -> list[str]:
    """The rows of the grid without rank and peak."""
    return [line.split()[1] for line in text.splitlines() if line[:4].strip().isdecimal()]


def test_a_column_shows_what_runs_then() -> None:
    """27 units of time on 27 columns (4 for the rank and 5 for its peak, with blanks): each column is one action."""
    made = schedule("zb-h1", 4, 8)
    rows = cells(drawn(report.draw_schedule(made), 5 + 27 + 5))
    for row, lane in zip(rows, made.simulation.ranks, strict=True):
        expected = ["."] * 27
        for action, start, _ in lane:
            expected[int(start)] = action.kind
        assert row == "".join(expected)


def test_where_there_is_room_actions_are_written_with_their_micro_batch() -> None:
    wide = cells(drawn(report.draw_schedule(schedule("1f1b", 2, 3)), 80))
    assert re.findall("[A-Z][0-9]", wide[1]) == ["F0", "B0", "F1", "B1", "F2", "B2"]


def test_idle_time_is_as_long_as_simulated() -> None:
    made = schedule("gpipe", 4, 4)
    rows = cells(drawn(report.draw_schedule(made), 5 + 210 + 5))  # 21 units of time, ten columns each
    assert [row.count(".") for row in rows] == [90] * 4


def test_colour_only_adds_colour() -> None:
    stream = io.StringIO()
    drawing = report.draw_schedule(schedule("1f1b", 2, 3))
    Console(file=stream, width=80, force_terminal=True, color_system="standard", highlight=False).print(drawing)
    assert "\x1b[" in stream.getvalue()
    assert "\x1b[" not in drawn(drawing, 80)


def test_numbers_are_those_of_the_definitions() -> None:
    """1F1B: (p - 1) / (m + p - 1) of the span is bubble, nothing overlaps between iterations, and p micro-batches are
    held on the first rank."""
    fields = report.schedule_fields(schedule("1f1b", 4, 8))
    assert list(fields) == [
        "family", "bubble_rate", "makespan", "steady_state_bubble", "peak_memory", "lower_bound", "gap", "timetable",
    ]  # fmt: skip
    assert fields["bubble_rate"] == pytest.approx(3 / 11)
    assert fields["steady_state_bubble"] == pytest.approx(3 / 11)
    assert fields["makespan"] == 33.0
    assert fields["peak_memory"] == [4.0, 3.0, 2.0, 1.0]
    assert fields["gap"] == pytest.approx(33 / fields["lower_bound"] - 1)
    assert fields["timetable"][3][:2] == [
        {"kind": "F", "chunk": 0, "micro_batch": 0, "start": 3.0, "end": 4.0},
        {"kind": "B", "chunk": 0, "micro_batch": 0, "start": 4.0, "end": 6.0},
    ]


def test_a_span_leaves_out_that_ranks_start_one_after_the_other() -> None:
    """ZB-H2 has no bubble by the papers' definition and in the steady state; its makespan is longer by the ramp."""
    fields = report.schedule_fields(schedule("zb-h2", 4, 8))
    assert (fields["bubble_rate"], fields["steady_state_bubble"], fields["gap"]) == (0.0, 0.0, 0.0)
    assert fields["makespan"] == 27.0


@pytest.mark.parametrize("name", ["zb-h1", "interleaved-1f1b"])
def test_svg_is_the_kept_one(name: str) -> None:
    text = report.schedule_svg(schedule(name, 4, 8))
    assert text == kept(f"schedule-{name}.svg", text)


def test_svg_draws_every_action_in_its_place() -> None:
    made = schedule("zb-h1", 4, 8, (18.522, 18.086, 9.337, 0.601))
    root = ElementTree.fromstring(report.schedule_svg(made))
    boxes = [each for each in root.iter(f"{SVG}rect") if each.get("class") == "action"]
    lanes: dict[str, list[tuple[float, float]]] = {}
    for box in boxes:
        lanes.setdefault(box.attrib["y"], []).append((float(box.attrib["x"]), float(box.attrib["width"])))
    assert len(lanes) == 4
    for drawn_lane, lane in zip(lanes.values(), made.simulation.ranks, strict=True):
        assert len(drawn_lane) == len(lane)
        scale = (drawn_lane[-1][0] - drawn_lane[0][0]) / (lane[-1][1] - lane[0][1])
        for (x, width), (_, start, end) in zip(drawn_lane, lane, strict=True):
            assert x - drawn_lane[0][0] == pytest.approx((start - lane[0][1]) * scale, abs=0.2)
            assert width == pytest.approx((end - start) * scale, abs=0.2)
    assert max(float(box.attrib["x"]) + float(box.attrib["width"]) for box in boxes) <= float(root.attrib["width"])


def test_svg_of_many_actions_stays_small() -> None:
    made = schedule("1f1b", 32, 320)
    text = report.schedule_svg(made)
    ElementTree.fromstring(text)
    assert len(text) < 1_500_000


def test_trace_holds_every_action_and_the_memory() -> None:
    made = schedule("interleaved-1f1b", 4, 8)
    events = report.schedule_trace(made)["traceEvents"]
    for rank, lane in enumerate(made.simulation.ranks):
        slices = [each for each in events if each["ph"] == "X" and each["tid"] == rank]
        assert [(each["ts"], each["dur"]) for each in slices] == [
            (pytest.approx(1000 * start), pytest.approx(1000 * (end - start))) for _, start, end in lane
        ]
        assert all(here["ts"] + here["dur"] <= after["ts"] + 1e-6 for here, after in pairwise(slices))
        assert {each["args"]["stage"] for each in slices} == {rank, rank + 4}
        counted = [each["args"]["micro-batches"] for each in events if each["name"] == f"memory of rank {rank}"]
        assert max(counted) == made.peak_memory[rank]
    names = {each["args"]["name"] for each in events if each["name"] == "thread_name"}
    assert names == {f"rank {rank}" for rank in range(4)}


def test_misfit_names_the_rank_that_lacks_most() -> None:
    misfit = Misfit("given", (4.0, 2.0, 4.0), (5.0, 4.0, 3.0), given=True)
    assert report.misfit_fields(misfit) == {
        "family": "given", "memory_limit": [4.0, 2.0, 4.0], "needed": [5.0, 4.0, 3.0], "rank": 1, "excess": 2.0,
    }  # fmt: skip
    assert "This timetable does not fit" in drawn(report.draw_misfit(misfit), 80)
    assert "No schedule fits" in drawn(report.draw_misfit(replace(misfit, given=False)), 80)
