"""Drawing of what `compile` wrote."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group
from rich.text import Text

from shardwright.report.layout import Column, Grid, Row, page
from shardwright.report.plan import draw_summary
from shardwright.schemas.plan import Plan


def draw_emission(plan: Plan, folder: str, files: Mapping[str, str]) -> Group:
    """The plan in short, and the files with their sizes."""
    rows = [Row((f"{folder}/{name}", f"{text.count(chr(10))}")) for name, text in sorted(files.items())]
    return page(draw_summary(plan), Group(Text("Written", style="bold"), Grid(_COLUMNS, rows)))


_COLUMNS = (Column("file"), Column("lines", "number"))
