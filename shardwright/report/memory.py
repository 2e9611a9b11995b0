"""Drawings of memory: phases against categories, and what stands against the limit."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from shardwright.report.layout import Bar, Column, Grid, Row, facts, heading, percent
from shardwright.schemas.plan import Memory, MemoryPhase, StageMemory
from shardwright.schemas.units import human_bytes

_SCALES = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
_WHEN = {"gradients": " when the optimizer steps"}


def words(name: str) -> str:
    """A key of the plan as people say it: `optimizer_states` to `optimizer states`."""
    return name.replace("_", " ")


def common_unit(largest: int) -> tuple[str, int]:
    """The unit in which a whole table is written, so that its numbers can be compared at a glance."""
    return next((unit, scale) for unit, scale in _SCALES if largest >= scale or scale == 1)


def in_unit(value: int, scale: int) -> str:
    """A number of that unit; `-` for nothing at all, and `<0.01` for what would look like nothing."""
    if value == 0:
        return "-"
    if scale == 1:
        return str(value)
    return "<0.01" if value / scale < 0.005 else f"{value / scale:.2f}"


def against_limit(used: int, limit: int) -> Text:
    """One line: how much of the limit is used."""
    return Text(f"{human_bytes(used)} of {human_bytes(limit)} ({percent(used / limit)})")


def categories(phases: tuple[MemoryPhase, ...]) -> tuple[str, ...]:
    """Categories that hold anything in any phase, in the order of the plan."""
    return tuple(dict.fromkeys(name for phase in phases for name, size in phase.bytes.items() if size))


def draw_stage(stage: StageMemory, scale: int) -> Grid:
    """Rows are what takes the bytes, columns are the phases of the step; the peak is the largest total."""
    columns = [Column("")]
    columns += [
        Column(words(phase.name).replace(" ", "\n"), "number", _peak_style(phase, stage)) for phase in stage.phases
    ]
    rows = [
        Row((words(name), *(in_unit(phase.bytes.get(name, 0), scale) for phase in stage.phases)))
        for name in categories(stage.phases)
    ]
    total = Row(("total", *(in_unit(phase.total_bytes, scale) for phase in stage.phases)), "bold")
    return Grid(columns, (*rows, total), continued=True)


def draw_others(memory: Memory, scale: int) -> Group:
    """One row a rank of the pipeline, one column for what takes the bytes at its peak."""
    peaks = tuple(map(_peak_of, memory.stages))
    names = categories(peaks)
    columns = [Column("rank", "number"), *(Column(words(name).replace(" ", "\n"), "number") for name in names)]
    rows = [
        Row((str(stage.stage), *(in_unit(peak.bytes.get(name, 0), scale) for name in names)))
        for stage, peak in zip(memory.stages, peaks, strict=True)
    ]
    return Group(Text(), Text("each rank at its own peak", style="dim"), Grid(columns, rows, continued=True))


def _peak_style(phase: MemoryPhase, stage: StageMemory) -> str:
    return "yellow" if phase.name == stage.peak_phase else ""


def _peak_of(stage: StageMemory) -> MemoryPhase:
    return next(phase for phase in stage.phases if phase.name == stage.peak_phase)


def fullest_of(memory: Memory) -> StageMemory:
    """The rank of the pipeline that the budget limits; without a pipeline, the only one."""
    return max(memory.stages, key=lambda stage: (stage.peak_reserved_bytes, stage.peak_allocated_bytes))


def draw_memory(memory: Memory, limit: int) -> Group:
    """Everything that the plan says about memory; `limit` is what the allocator may reserve."""
    unit, scale = common_unit(memory.peak_allocated_bytes)
    fullest = fullest_of(memory)
    peak = _peak_of(fullest)
    on = f", on rank {fullest.stage}" if len(memory.stages) > 1 else ""
    parts: list[RenderableType] = [
        heading("Memory of the fullest device", f"at the peak of the step: {words(peak.name)}{on}"),
        draw_categories(peak.bytes, memory.peak_reserved_bytes, limit),
        Text(),
        heading(f"Memory by phase, in {unit}", f"alive at the worst moment of each phase{on}"),
        draw_stage(fullest, scale),
    ]
    if on:
        parts.append(draw_others(memory, scale))
    at_rest = [(words(name), human_bytes(size) + _WHEN.get(name, "")) for name, size in memory.at_rest.items()]
    host = ("host memory", f"{human_bytes(memory.host_bytes)} a node")
    return Group(*parts, Text(), heading("At rest", "between two steps, on rank 0; exact"), facts([*at_rest, host]))


def draw_categories(sizes: Mapping[str, int], reserved: int, limit: int) -> Grid:
    """What fills one moment, largest first, against what the allocator may reserve."""
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    beyond = reserved - sum(sizes.values())
    rows = [_category(words(name), size, limit) for name, size in ordered if size]
    rows += [_category("lost to fragmentation", beyond, limit)] if beyond > 0 else []
    rows.append(_category("reserved", reserved, limit, "bold"))
    return Grid((Column(""), Column("bytes", "number"), Column("of the limit", "number"), Column("")), rows)


def _category(name: str, size: int, limit: int, style: str = "") -> Row:
    return Row((name, human_bytes(size), percent(size / limit), Bar(size / limit, 30, track=bool(style))), style)
