"""Drawing of a rehearsal: what was shrunk, what was compared, PASS or FAIL."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from shardwright.report.layout import Column, Grid, Row, facts, heading, page, plural

if TYPE_CHECKING:
    from shardwright.rehearse.report_types import RehearsalReport

_VERDICTS = {True: ("PASS", "bold green"), False: ("FAIL", "bold red")}


def draw_rehearsal(report: RehearsalReport) -> Group:
    """The plan that ran, the changes that made it small enough, every comparison, and the verdict last."""
    parts: list[RenderableType] = [
        Group(
            heading(f"Rehearsal of {report.plan}"),
            facts(
                (
                    ("ran", report.rehearsed),
                    ("on", f"{plural(report.processes, 'process', 'processes')}, {plural(report.steps, 'step')}"),
                    *((run.name, f"{run.seconds:.1f} s") for run in report.runs),
                    *([("kept in", report.kept)] if report.kept else []),
                )
            ),
        )
    ]
    parts += [_draw_changes(report)] if report.shrunk else []
    parts += [_draw_checks(report)] if report.checks else []
    parts += [_draw_error(report)] if report.error else []
    return page(*parts, _verdict(report))


def rehearsal_fields(report: RehearsalReport) -> dict[str, Any]:
    """The rehearsal as plain JSON values."""
    return {"passed": report.passed, **asdict(report)}


def _draw_changes(report: RehearsalReport) -> Group:
    columns = (Column("key"), Column("plan", "prose"), Column("rehearsed", "prose"), Column("because", "prose", "dim"))
    rows = [Row((change.key, change.before, change.after, change.because)) for change in report.shrunk]
    return Group(heading("Shrunk for this machine"), Grid(columns, rows))


def _draw_checks(report: RehearsalReport) -> Group:
    columns = (
        Column("compared", "prose"),
        Column("expected", "prose"),
        Column("found", "prose"),
        Column("tolerance"),
        Column(""),
    )
    tables: list[RenderableType] = []
    for name in dict.fromkeys(check.run for check in report.checks):
        rows = [
            Row((check.name, check.expected, check.found, check.tolerance, Text(*_VERDICTS[check.passed])))
            for check in report.checks
            if check.run == name
        ]
        tables.append(Group(heading(f"Compared with one process: {name}"), Grid(columns, rows)))
    return page(*tables)


def _draw_error(report: RehearsalReport) -> Group:
    return Group(Text(report.error, style="red"), *(Text(f"  {line}", style="dim") for line in report.log))


def _verdict(report: RehearsalReport) -> Text:
    failed = sum(not check.passed for check in report.checks)
    outcome = f"  {len(report.checks) - failed} of {plural(len(report.checks), 'check')} hold"
    return Text.assemble(_VERDICTS[report.passed], outcome)
