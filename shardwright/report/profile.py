"""Drawing of a model's profile: its units and what each costs."""

from __future__ import annotations

from rich.console import Group

from shardwright.report.layout import Column, Grid, Row, facts, grouped, heading, human_flops, page, plural
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile, Phase, Unit
from shardwright.schemas.units import human_bytes, human_count

_PHASES: tuple[Phase, ...] = ("forward", "input_gradient", "weight_gradient")
_COLUMNS = (
    Column("unit"),
    Column("count", "number"),
    Column("params", "number"),
    Column("forward\nFLOP", "number"),
    Column("input\ngrad.", "number"),
    Column("weight\ngrad.", "number"),
    Column("saved", "number"),
    Column("saved,\nckpt.", "number"),
    Column("share", "number"),
)


def draw_profile(profile: ModelProfile, micro_batch: int, dtype: ComputeDtypeName) -> Group:
    """The units in order of execution, for one micro-batch on one device with nothing sharded.

    `share` is of the FLOPs of forward and backward. Raises KeyError for a dtype that was not profiled.
    """
    work = {
        index: [unit.count * unit.costs[dtype].flops(phase, micro_batch) for phase in _PHASES]
        for index, unit in enumerate(profile.units)
    }
    total = sum(map(sum, work.values())) or 1
    rows = [
        _unit_row(profile, index, unit, work[index], total, micro_batch, dtype)
        for index, unit in enumerate(profile.units)
    ]
    outside = _parameters(profile, -1)
    rows += [Row(("no block", "", human_count(outside), *[""] * 6))] if outside else []
    rows.append(_total_row(profile, list(work.values()), micro_batch, dtype))
    title = heading(
        f"{profile.name}: {dtype}, micro-batch {micro_batch} of {profile.sequence_length} tokens, on one device",
        "of all repetitions together; saved: bytes kept from forward to backward, without and with checkpointing",
    )
    return page(Group(title, Grid(_COLUMNS, rows)), facts(_about(profile, dtype)))


def _parameters(profile: ModelProfile, unit: int) -> int:
    return sum(parameter.numel for parameter in profile.parameters if parameter.unit == unit)


def _unit_row(
    profile: ModelProfile,
    index: int,
    unit: Unit,
    flops: list[int],
    total: int,
    micro_batch: int,
    dtype: ComputeDtypeName,
) -> Row:
    cost = unit.costs[dtype]
    own = _parameters(profile, index)
    saved = [
        human_bytes(unit.count * cost.saved[policy].at(micro_batch)) if policy in cost.saved else "-"
        for policy in ("none", "full")
    ]
    return Row(
        (
            unit.kind,
            str(unit.count),
            human_count(own) if own else "",
            *map(human_flops, flops),
            *saved,
            f"{100 * sum(flops) / total:.0f} %",
        )
    )


def _total_row(profile: ModelProfile, work: list[list[int]], micro_batch: int, dtype: ComputeDtypeName) -> Row:
    flops = [human_flops(sum(column)) for column in zip(*work, strict=True)]
    saved = [
        human_bytes(
            sum(
                unit.count * (unit.costs[dtype].saved.get(policy) or unit.costs[dtype].saved["none"]).at(micro_batch)
                for unit in profile.units
            )
        )
        for policy in ("none", "full")
    ]
    return Row(
        (
            "total",
            str(sum(unit.count for unit in profile.units)),
            human_count(profile.numel),
            *flops,
            *saved,
            "100 %",
        ),
        "bold",
    )


def _about(profile: ModelProfile, dtype: ComputeDtypeName) -> list[tuple[str, str]]:
    blocks = len(profile.block_paths)
    trainable = sum(parameter.numel for parameter in profile.parameters if parameter.trainable)
    return [
        (
            "parameters",
            f"{grouped(profile.numel)} in {plural(len(profile.parameters), 'tensor')}, {grouped(trainable)} trainable",
        ),
        ("blocks", f"{blocks}: {profile.block_paths[0]} to {profile.block_paths[-1]}" if blocks else "none found"),
        ("attention", profile.attention[dtype]),
        ("buffers", human_bytes(profile.buffer_bytes)),
        ("weights start", profile.init),
    ]
