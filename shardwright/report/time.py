"""Drawings of time and of what crosses the network."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from shardwright.report.layout import Bar, Column, Grid, Row, facts, heading, human_flops, percent
from shardwright.report.memory import words
from shardwright.schemas.plan import Collective, Prediction
from shardwright.schemas.units import human_bytes, human_count, human_seconds


def draw_time(prediction: Prediction) -> Group:
    """The parts of one optimizer step; they add up to it."""
    step = prediction.step_time_s
    largest = max((part.seconds for part in prediction.time), default=0.0) or 1.0
    rows = [
        Row(
            (
                words(part.name),
                human_seconds(part.seconds),
                percent(part.seconds / step),
                Bar(part.seconds / largest, 10) if part.seconds > 0.005 * step else "",
                part.note,
            )
        )
        for part in prediction.time
        if part.seconds > 0
    ]
    rows.append(Row(("step", human_seconds(step), percent(1.0), "", ""), "bold"))
    columns = (
        Column("part", "prose"),
        Column("time", "number"),
        Column("share", "number"),
        Column(""),
        Column("", "prose"),
    )
    return Group(heading("Time of one step"), Grid(columns, rows), Text(), facts(_rates(prediction)))


def _rates(prediction: Prediction) -> list[tuple[str, str]]:
    return [
        ("throughput", f"{human_count(prediction.tokens_per_s)} tokens/s of the whole cluster"),
        ("model work", f"{human_flops(prediction.model_flops_per_step)}FLOP a step"),
        ("MFU", f"{percent(prediction.mfu)} = {prediction.mfu_formula}"),
    ]


def draw_collectives(collectives: Sequence[Collective]) -> Group:
    """What one rank sends through the network in one optimizer step."""
    title = heading("Collectives of one step", "calls of one rank; bytes are those of the whole tensor of one call")
    if not collectives:
        return Group(title, Text(), Text("none: one process", style="dim"))
    columns = (
        Column("for"),
        Column("collective"),
        Column("group"),
        Column("bytes", "number"),
        Column("calls", "number"),
        Column("together", "number"),
    )
    rows = [
        Row(
            (
                words(one.purpose),
                words(one.kind),
                f"{one.axis} x {one.group_size}",
                human_bytes(one.bytes),
                f"{one.count}",
                human_bytes(one.bytes * one.count),
            )
        )
        for one in collectives
    ]
    return Group(title, Grid(columns, rows))
