"""Drawings of a plan's pipeline: which rank has what of the model, when it runs, and what its stages cost."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from shardwright.report.layout import Bar, Column, Grid, Row, facts, heading, page, percent
from shardwright.report.memory import common_unit, fullest_of, in_unit, words
from shardwright.report.stages import Piped
from shardwright.report.time_grid import TimeGrid, beginning, legend
from shardwright.schemas.plan import Memory, Plan, StageTime
from shardwright.schemas.units import human_seconds

_READABLE = 100
"""Actions of a rank up to which the whole time is drawn on 80 columns."""
_BEGINNING = 64
"""Actions of a rank that are drawn of a longer time, its ramp and some rounds of what follows."""
_FEW_RANKS = 16
"""Ranks up to which the short form draws all."""
_AT_THE_END = 2
"""Ranks of more that the short form ends with."""


def schedule_line(plan: Plan) -> str:
    """`zb-h1: bubble 4.3 %, makespan 812 ms, 0.0 % over the lower bound`; empty without a pipeline."""
    found = plan.prediction.pipeline
    if found is None:
        return ""
    bubble, over = (percent(round(share, 6) + 0.0) for share in (found.bubble_rate, found.gap))  # never `-0.0 %`
    name = plan.decision.pipeline.schedule
    return f"{name}: bubble {bubble}, makespan {human_seconds(found.makespan_s)}, {over} over the lower bound"


def draw_stages(pipe: Piped, *, short: bool = False) -> Group:
    """One row a rank, one column a chunk: which part of the model lies where."""
    ranks = range(pipe.layout.ranks)
    rows = [Row(_placed(pipe, rank)) for rank in ranks]
    if short and len(rows) > _FEW_RANKS:
        left_out = Row(("...", *[""] * (pipe.layout.chunks + 1)))
        rows = [*rows[: _FEW_RANKS - _AT_THE_END], left_out, *rows[-_AT_THE_END:]]
    columns = [Column("rank", "number"), Column("devices"), *_chunk_columns(pipe)]
    skips = [f"{source} to {target}" for source, target in pipe.prediction.edges if target != source + 1]
    more: list[RenderableType] = [Text(), facts([("skip connections", f"stage {', '.join(skips)}")])] if skips else []
    return Group(heading("Stages on devices", pipe.title()), Grid(columns, rows, continued=True), *more)


def _placed(pipe: Piped, rank: int) -> tuple[str, ...]:
    """Rank, devices, and for each chunk its stage with what it has."""
    devices_of_rank = pipe.plan.decision.mesh.world_size // pipe.layout.ranks
    first, last = rank * devices_of_rank, (rank + 1) * devices_of_rank - 1
    devices = str(first) if first == last else f"{first}-{last}"
    return str(rank), devices, *(f"{stage}: {pipe.contents[stage]}" for stage in pipe.stages_of(rank))


def _chunk_columns(pipe: Piped) -> list[Column]:
    """With their direction where the stages lie back and forth."""
    if pipe.layout.chunks == 1:
        return [Column("stage")]
    back = pipe.layout.placement == "wave"
    ways = ["down" if chunk % 2 == 0 else "up" for chunk in range(pipe.layout.chunks)]
    return [Column(f"chunk {chunk}" + (f", {way}wards" if back else "")) for chunk, way in enumerate(ways)]


def draw_timetable(pipe: Piped, *, short: bool = False) -> Group:
    """What each rank does when, with the most activations that it holds; of much, the beginning."""
    name = f"Timetable of {pipe.plan.decision.pipeline.schedule}"
    if short and pipe.layout.ranks > _FEW_RANKS:
        return heading(name, "`inspect` draws it, `inspect --svg FILE.svg` every action")
    simulation, unit = pipe.simulation, pipe.memory_unit[0]
    actions, whole = max(map(len, simulation.timetable)), simulation.makespan
    until = whole if actions <= _READABLE else float(f"{whole * _BEGINNING / actions:.2g}")
    peaks = [f"{peak:.2f}" for peak in simulation.peak_memory]
    note = f"peak: the most activations that a rank holds, in {unit}"
    if until < whole:
        note = f"the first {until:g} of {whole:.4g} ms, `inspect --svg FILE.svg` draws all; {note}"
    lanes = beginning(simulation.ranks, until)
    return Group(heading(name, note), TimeGrid(lanes, peaks, unit=" ms"), legend(simulation.timetable))


def draw_stage_costs(pipe: Piped) -> Group:
    """One row a stage: what it has, and what a micro-batch takes there."""
    stages = pipe.prediction.stages
    unit, scale = common_unit(max(stage.activation_bytes for stage in stages))
    columns = (
        Column("stage", "number"),
        Column("rank", "number"),
        Column("has"),
        Column("recom-\nputed", "number"),
        Column("forward", "number"),
        Column("input\ngradient", "number"),
        Column("weight\ngradient", "number"),
        Column("send", "number"),
        Column("activations\nuntil I", "number"),
        Column("held\nuntil W", "number"),
        Column("in flight\nbefore I", "number"),
        Column("in flight\nbefore W", "number"),
    )
    rows = [Row(_costs(pipe, stage, scale)) for stage in stages]
    note = f"of one micro-batch, in ms and {unit}; in flight: the most micro-batches at once"
    return Group(heading("Stages", note), Grid(columns, rows, continued=True))


def _costs(pipe: Piped, stage: StageTime, scale: int) -> Sequence[str]:
    times = (stage.forward_s, stage.input_gradient_s, stage.weight_gradient_s, stage.send_s)
    kept = (stage.activation_bytes, stage.held_by_weight_bytes)
    has = pipe.contents[stage.stage].replace("blocks ", "").replace("block ", "") or "-"
    return (
        str(stage.stage),
        str(stage.rank),
        has,
        str(pipe.plan.decision.pipeline.checkpointed[stage.stage] or "-"),
        *(_milliseconds(seconds) for seconds in times),
        *(in_unit(size, scale) for size in kept),
        *(str(count or "-") for count in pipe.most_at_once(stage.stage)),
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds and seconds < 1 else f"{1e3 * seconds:.0f}" if seconds else "-"


def draw_ranks(memory: Memory, limit: int) -> Group:
    """One row a rank of the pipeline: what stands against the limit there. The fullest is marked."""
    unit, scale = common_unit(memory.peak_allocated_bytes)
    fullest = fullest_of(memory)
    rows = [
        Row(
            (
                str(rank.stage),
                words(rank.peak_phase),
                in_unit(rank.peak_allocated_bytes, scale),
                in_unit(rank.peak_reserved_bytes, scale),
                percent(rank.peak_reserved_bytes / limit),
                Bar(rank.peak_reserved_bytes / limit, 14, track=True),
                "fullest" if rank is fullest else "",
            ),
            "bold yellow" if rank is fullest else "",
        )
        for rank in memory.stages
    ]
    columns = (
        Column("rank", "number"),
        Column("peak in"),
        Column("allocated", "number"),
        Column("reserved", "number"),
        Column("of the\nlimit", "number"),
        Column(""),
        Column(""),
    )
    note = f"of the fullest device of each rank of the pipeline, in {unit}"
    return Group(heading("Memory of the ranks", note), Grid(columns, rows))


def draw_pipeline(pipe: Piped) -> Group:
    """The short form: where the stages lie, and when they run."""
    return page(draw_stages(pipe, short=True), draw_timetable(pipe, short=True))


def pipeline_parts(pipe: Piped, limit: int) -> tuple[RenderableType, ...]:
    """The sections of the long form."""
    memory = draw_ranks(pipe.plan.prediction.memory, limit)
    return draw_stages(pipe), draw_timetable(pipe), draw_stage_costs(pipe), memory
