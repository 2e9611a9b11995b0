"""Timetables of pipelines, drawn to files."""

from __future__ import annotations

import json
from pathlib import Path

from shardwright import report
from shardwright.cli.files import check_drawing_target, write_atomically
from shardwright.cli.terminal import say
from shardwright.report.schedule import Schedule


def check_targets(svg: Path | None, trace: Path | None) -> None:
    """Of --svg and --trace, where given. Raises InputError."""
    if svg is not None:
        check_drawing_target(svg, (".svg",), "--svg")
    if trace is not None:
        check_drawing_target(trace, (".json",), "--trace")


def draw_to_files(schedule: Schedule, svg: Path | None, trace: Path | None) -> None:
    """To those that are given. Raises InputError."""
    if svg is not None:
        write_atomically(svg, report.schedule_svg(schedule))
        say(f"wrote {svg}")
    if trace is not None:
        write_atomically(trace, json.dumps(report.schedule_trace(schedule), allow_nan=False))
        say(f"wrote {trace}")
