"""What is drawn, compared line by line at 80 columns, and held to the width of narrower and wider terminals.

After a wanted change: `UPDATE_DRAWINGS=1 pytest tests/report`, then read the difference.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from support.golden import golden_plans

from report import samples
from shardwright import report
from shardwright.report.parallel import draw_sharing
from shardwright.report.states import draw_states
from shardwright.schemas import catalogue
from shardwright.schemas.plan import Plan

KEPT = Path(__file__).parent / "drawings"
PARALLEL = golden_plans()["experts-tensor-fsdp2"]


def drawn_sharing(plan: Plan) -> Group:
    """Of a plan in which devices share layers or experts."""
    found = draw_sharing(plan)
    assert found is not None
    return found


DRAWINGS: dict[str, Callable[[], RenderableType]] = {
    "job": lambda: report.draw_job(samples.JOB, samples.PLAN.defaults),
    "profile": lambda: report.draw_profile(samples.PROFILE, 2, "fp32"),
    "alternating": lambda: report.draw_profile(samples.alternating(), 1, "fp32"),
    "operators": lambda: report.draw_operators(samples.PROFILE, 2, "fp32"),
    "plan": lambda: report.draw_plan(samples.PLAN),
    "inspection": lambda: report.draw_inspection(samples.PLAN),
    "amsp": lambda: Group(report.draw_summary(samples.AMSP), draw_states(samples.AMSP)),
    "sharing": lambda: Group(*(draw(PARALLEL) for draw in (report.draw_summary, drawn_sharing, draw_states))),
    "why": lambda: report.draw_why(samples.PLAN, "micro_batch"),
    "infeasible": lambda: report.draw_infeasible(samples.INFEASIBLE),
    "emission": lambda: report.draw_emission(samples.PLAN, "run", {"train.py": "a\nb\n", "plan.json": "{}\n"}),
    "rehearsal": lambda: report.draw_rehearsal(samples.rehearsal()),
}


def drawn(drawing: RenderableType, width: int, encoding: str = "utf-8") -> str:
    """The text that a terminal without colour gets."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=stream, width=width, highlight=False).print(drawing)
    stream.seek(0)
    return "\n".join(line.rstrip() for line in stream.read().splitlines()) + "\n"


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_at_80_columns(name: str) -> None:
    text = drawn(DRAWINGS[name](), 80)
    kept = KEPT / f"{name}.txt"
    if os.environ.get("UPDATE_DRAWINGS"):
        kept.write_text(text, encoding="utf-8")
    assert text == kept.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("name", DRAWINGS)
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    lines = drawn(DRAWINGS[name](), width).splitlines()
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("name", DRAWINGS)
def test_narrow_drawing_loses_no_number(name: str) -> None:
    """Tables become lists, in which every number of the wide drawing is found again."""
    numbers = [word for word in drawn(DRAWINGS[name](), 200).split() if any(map(str.isdigit, word))]
    narrow = drawn(DRAWINGS[name](), 40)
    folded = "".join(narrow.split())
    assert not [number for number in numbers if number not in folded]
    assert "…" not in narrow


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_survives_a_terminal_without_unicode(name: str) -> None:
    assert drawn(DRAWINGS[name](), 80, encoding="ascii").isascii()


def test_catalogue_fits_80_columns() -> None:
    devices = [(catalogue.device(name)[0], catalogue.title(name)) for name in catalogue.device_names()]
    text = drawn(report.draw_devices(devices), 80)
    assert max(map(cell_len, text.splitlines())) <= 80
    assert all(name in text for name in catalogue.device_names())


def test_colour_only_adds_colour() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system="standard", highlight=False)
    with console.capture() as capture:
        console.print(report.draw_plan(samples.PLAN))
    assert "\x1b[" in capture.get()
    assert "\x1b[" not in drawn(report.draw_plan(samples.PLAN), 80)


def test_without_parallelism_of_the_model_nobody_shares() -> None:
    assert draw_sharing(samples.PLAN) is None
