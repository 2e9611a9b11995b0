"""Drawing of a profile operator by operator."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group

from shardwright.report.layout import Column, Grid, Row, heading, human_flops, page
from shardwright.report.units import unit_kinds
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile, Operator, Phase, UnitCost
from shardwright.schemas.units import human_bytes

_COLUMNS = (
    Column("operator", "prose"),
    Column("shapes", "prose"),
    Column("calls", "number"),
    Column("FLOP", "number"),
    Column("moved", "number"),
    Column("kept", "number"),
)
_PHASES: dict[Phase, str] = {
    "forward": "forward",
    "input_gradient": "input gradient",
    "weight_gradient": "weight gradient",
}


def draw_operators(profile: ModelProfile, micro_batch: int, dtype: ComputeDtypeName) -> Group:
    """Each kind of unit once, its operators by cost: FLOPs first, then bytes. Raises KeyError for a dtype that was not
    profiled."""
    parts = []
    for kind in unit_kinds(profile):
        note = kind.says(profile) if kind.unit.kind == "block" else ""
        note += f"; one of {kind.count}" if kind.count > 1 else ""
        rows = list(_rows(kind.unit.costs[dtype], micro_batch))
        parts.append(Group(heading(kind.name, note), Grid(_COLUMNS, rows)))
    about = "shapes at micro-batch 1; moved: bytes read and written; kept: bytes of results that backward needs"
    return page(heading(f"operators, {dtype}, micro-batch {micro_batch}", about), *parts)


def _rows(cost: UnitCost, micro_batch: int) -> Iterator[Row]:
    for phase, title in _PHASES.items():
        found = [operator for operator in cost.operators if operator.phase == phase]
        if found:
            yield Row((title, *[""] * 5), "bold")
        for operator in sorted(found, key=lambda at: (-at.flops.at(micro_batch), -at.bytes.at(micro_batch))):
            yield _row(operator, micro_batch)


def _row(operator: Operator, micro_batch: int) -> Row:
    kept = operator.kept.at(micro_batch)
    return Row(
        (
            f"{operator.module}: {operator.name}" if operator.module else operator.name,
            ", ".join("x".join(map(str, shape)) or "scalar" for shape in operator.shapes),
            str(operator.count),
            human_flops(operator.flops.at(micro_batch)),
            human_bytes(operator.bytes.at(micro_batch)),
            human_bytes(kept) if kept else "",
        )
    )
