"""Drawings of plans with pipeline stages: compared line by line with kept files, and with what the plans say.

After a wanted change: `UPDATE_DRAWINGS=1 pytest tests/report`, then look at the pictures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len
from rich.console import Group
from typer.testing import CliRunner

from report.pipeline_samples import deep, long, straight, uneven, v_shaped
from report.samples import HOSTILE, PLAN
from report.test_drawings import drawn
from report.test_schedule import kept
from shardwright import report
from shardwright.cli import app
from shardwright.cli.terminal import json_text
from shardwright.report.memory import draw_memory
from shardwright.report.pipeline import draw_ranks, draw_stage_costs, draw_stages, schedule_line
from shardwright.report.stages import piped
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.plan import Plan, json_fields

SVG = "{http://www.w3.org/2000/svg}"

DRAWINGS: dict[str, Callable[[], str]] = {
    "pipeline-straight.txt": lambda: drawn(report.draw_inspection(straight()), 80),
    "pipeline-v.txt": lambda: drawn(report.draw_inspection(v_shaped()), 80),
    "pipeline-uneven.txt": lambda: drawn(report.draw_inspection(uneven()), 80),
    "pipeline-long.txt": lambda: drawn(report.draw_plan(long()), 80),
    "pipeline-deep.txt": lambda: drawn(report.draw_plan(deep()), 80),
    "pipeline-v.svg": lambda: report.schedule_svg(report.schedule_of(v_shaped())),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_is_the_kept_one(name: str) -> None:
    text = DRAWINGS[name]()
    assert text == kept(name, text)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("plan", [straight, v_shaped, uneven, long, deep])
def test_no_line_is_wider_than_the_terminal(plan: Callable[[], Plan], width: int) -> None:
    for drawing in (report.draw_plan(plan()), report.draw_inspection(plan())):
        assert max(map(cell_len, drawn(drawing, width).splitlines())) <= width


@pytest.mark.parametrize("plan", [straight, v_shaped, uneven, long])
def test_drawing_survives_a_terminal_without_unicode(plan: Callable[[], Plan]) -> None:
    assert drawn(report.draw_inspection(plan()), 80, encoding="ascii").isascii()


def test_the_document_shows_what_is_drawn() -> None:
    text = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text()
    (example,) = re.findall(r"```text\n(Stages on devices\n.*?)```", text, re.DOTALL)
    assert example in drawn(report.draw_plan(v_shaped()), 80)


def test_stages_lie_on_a_v_with_every_block_once() -> None:
    pipe = piped(v_shaped())
    assert pipe is not None
    assert [list(pipe.stages_of(rank)) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert pipe.contents == (
        "embedding, blocks 0-1", *(f"blocks {first}-{first + 1}" for first in range(2, 14, 2)), "blocks 14-15, head",
    )  # fmt: skip


def test_a_stage_may_have_the_embedding_or_the_head_alone() -> None:
    plan = uneven()
    cuts = plan.decision.pipeline.model_copy(update={"cuts": (0, 1, 12)})
    pipe = piped(plan.model_copy(update={"decision": plan.decision.model_copy(update={"pipeline": cuts})}))
    assert pipe is not None
    assert pipe.contents == ("embedding", "block 0", "blocks 1-11", "head")


@pytest.mark.parametrize("plan", [straight, v_shaped, uneven])
def test_the_timetable_takes_as_long_as_predicted(plan: Callable[[], Plan]) -> None:
    pipe = piped(plan())
    assert pipe is not None
    predicted = pipe.prediction
    assert pipe.simulation.makespan == pytest.approx(1e3 * predicted.makespan_s)
    assert pipe.schedule.bubble_rate == pytest.approx(predicted.bubble_rate, abs=1e-9)
    assert pipe.schedule.gap == pytest.approx(predicted.gap, abs=1e-9)


def test_micro_batches_in_flight() -> None:
    """1F1B: as many as there are ranks from this one to the last; and nothing waits for its weight gradients."""
    pipe = piped(deep())
    assert pipe is not None
    assert [pipe.most_at_once(stage) for stage in range(24)] == [(24 - stage, 0) for stage in range(24)]
    late = piped(straight())
    assert late is not None
    for stage in late.prediction.stages:
        before_i, before_w = late.most_at_once(stage.stage)
        peak = stage.activation_bytes * before_i
        held = peak + stage.held_by_weight_bytes * before_w
        at_once = late.simulation.peak_memory[stage.rank] * late.memory_unit[1]
        assert peak <= at_once * (1 + 1e-9)
        assert at_once <= held * (1 + 1e-9)


def test_line_of_the_schedule() -> None:
    found = straight().prediction.pipeline
    assert found is not None
    exact = found.model_copy(update={"bubble_rate": 0.043, "makespan_s": 0.812, "gap": -1e-15})
    prediction = straight().prediction.model_copy(update={"pipeline": exact})
    line = schedule_line(straight().model_copy(update={"prediction": prediction}))
    assert line == "zb-h1: bubble 4.3 %, makespan 812 ms, 0.0 % over the lower bound"
    assert schedule_line(PLAN) == ""


def test_the_fullest_rank_is_marked() -> None:
    memory = straight().prediction.memory
    first, second, *others = memory.stages
    fuller = second.model_copy(update={"peak_reserved_bytes": 2 * first.peak_reserved_bytes})
    text = drawn(draw_ranks(memory.model_copy(update={"stages": (first, fuller, *others)}), 8 << 30), 80)
    assert [line.split()[0] for line in text.splitlines() if line.endswith("fullest")] == ["1"]


def test_skip_connections_between_stages_are_told() -> None:
    plan = straight()
    found = plan.prediction.pipeline
    assert found is not None
    skipping = found.model_copy(update={"edges": (*found.edges, (0, 3), (1, 3))})
    prediction = plan.prediction.model_copy(update={"pipeline": skipping})
    text = drawn(report.draw_plan(plan.model_copy(update={"prediction": prediction})), 80)
    assert "skip connections  stage 0 to 3, 1 to 3" in text
    assert "skip connections" not in drawn(report.draw_plan(plan), 80)


def test_plan_without_stages_has_no_timetable() -> None:
    assert piped(PLAN) is None
    with pytest.raises(InputError, match="no pipeline stages"):
        report.schedule_of(PLAN)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("decision", {"cuts": (1, 2)}),
        ("decision", {"ranks": 2}),
        ("prediction", {"timetable": ("F0 B0", "F0 B0")}),
        ("prediction", {"timetable": ("F0 I0 W0", "what", "F0", "F0")}),
        ("prediction", {"timetable": ("F0 I0 W0",) * 3 + ("F0 W0 I0",)}),
        ("prediction", {"stages": ()}),
    ],
)
def test_parts_that_do_not_belong_together_are_said(part: str, change: dict[str, Any]) -> None:
    plan = straight()
    whole = getattr(plan, part)
    edited = whole.model_copy(update={"pipeline": whole.pipeline.model_copy(update=change)})
    with pytest.raises(InputError) as caught:
        drawn(report.draw_inspection(plan.model_copy(update={part: edited})), 80)
    assert caught.value.diagnostics[0].key == "prediction.pipeline"
    assert "predict it again" in caught.value.diagnostics[0].suggestion


def test_svg_says_what_runs_in_real_time() -> None:
    plan = straight()
    root = ElementTree.fromstring(report.schedule_svg(report.schedule_of(plan)))
    titles = [each[0].text or "" for each in root.iter(f"{SVG}rect") if each.get("class") == "action"]
    assert titles[0] == "F0: forward of stage 0 (chunk 0: embedding, blocks 0-2), 0 to 3 ms"
    texts = [each.text for each in root.iter(f"{SVG}text")]
    assert {"makespan: 82.2 ms", "peak memory: 40.00 MiB of activations", "20 ms"} <= set(texts)
    assert not any("steady state" in (text or "") for text in texts)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_break_out_of_the_svg(name: str) -> None:
    text = report.schedule_svg(report.schedule_of(straight().model_copy(update={"name": name})))
    root = ElementTree.fromstring(text.encode())
    assert not list(root.iter("script")) + list(root.iter(f"{SVG}script"))


def test_inspect_draws_to_files_and_hides_nothing(tmp_path: Path) -> None:
    plan = v_shaped().model_copy(update={"defaults": PLAN.defaults})
    source, svg, trace = tmp_path / "plan.json", tmp_path / "v.svg", tmp_path / "v.json"
    source.write_text(json_text(json_fields(plan)))
    command = ["inspect", str(source), "--svg", str(svg), "--trace", str(trace), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert svg.read_text() == report.schedule_svg(report.schedule_of(plan))
    assert json.loads(trace.read_text()) == report.schedule_trace(report.schedule_of(plan))
    assert Plan.model_validate_json(result.stdout) == plan
    assert CliRunner().invoke(app, command).exit_code == 0  # both are drawings of ours, and written again
    source.write_text(json_text(json_fields(PLAN)))
    refused = CliRunner().invoke(app, ["inspect", str(source), "--svg", str(tmp_path / "none.svg")])
    assert refused.exit_code == 2
    assert "no pipeline stages" in refused.stderr
    assert not (tmp_path / "none.svg").exists()


@pytest.mark.parametrize("plan", [straight, v_shaped, uneven, long])
def test_narrow_tables_lose_no_number(plan: Callable[[], Plan]) -> None:
    pipe = piped(plan())
    assert pipe is not None
    drawing = Group(draw_stages(pipe), draw_stage_costs(pipe), draw_memory(plan().prediction.memory, 8 << 30))
    numbers = [word for word in drawn(drawing, 200).split() if any(map(str.isdigit, word))]
    folded = "".join(drawn(drawing, 40).split())
    assert not [number for number in numbers if number not in folded]


def test_trace_is_in_real_time() -> None:
    trace = report.schedule_trace(report.schedule_of(v_shaped()))
    slices = [each for each in trace["traceEvents"] if each["ph"] == "X"]
    ends = [each["ts"] + each["dur"] for each in slices]
    found = v_shaped().prediction.pipeline
    assert found is not None
    assert max(ends) == pytest.approx(1e6 * found.makespan_s)
    assert {each["args"]["has"] for each in slices if each["tid"] == 0} == {
        "embedding, blocks 0-1", "blocks 14-15, head",
    }  # fmt: skip
    lanes = [[each for each in slices if each["tid"] == rank] for rank in range(4)]
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for lane in lanes for a, b in pairwise(lane))
    held = [each["args"]["MiB"] for each in trace["traceEvents"] if each["name"] == "memory of rank 0"]
    assert max(held) == pytest.approx(report.schedule_of(v_shaped()).peak_memory[0])
