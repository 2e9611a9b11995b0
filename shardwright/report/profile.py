"""Drawing of a model's profile: its units and what each costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType

from shardwright.report.layout import Column, Grid, Row, facts, grouped, heading, human_flops, page, plural
from shardwright.report.parallel import draw_divisions, sharing_facts
from shardwright.report.units import OUTSIDE, UnitKind, order, run_title, unit_kinds
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile, Parameter, Phase, Policy, UnitCost
from shardwright.schemas.units import human_bytes, human_count

PHASES: tuple[Phase, ...] = ("forward", "input_gradient", "weight_gradient")
POLICIES: tuple[Policy, ...] = ("none", "selective", "full")
_WORK = (
    Column("unit"),
    Column("count", "number"),
    Column("params", "number"),
    Column("share", "number"),
    Column("forward\nFLOP", "number"),
    Column("input\ngradient", "number"),
    Column("weight\ngradient", "number"),
    Column("share", "number"),
)
_KEPT = (
    Column("unit"),
    *(column for policy in POLICIES for column in (Column(policy, "number"), Column("share", "number"))),
    Column("output\nof one", "number"),
)
_COMPILED = (
    Column("unit"),
    Column("launches", "number"),
    Column("compiled", "number"),
    Column("moved", "number"),
    Column("compiled", "number"),
    Column("kept", "number"),
    Column("compiled", "number"),
)
_ROLES = ("role", "dtype", "tensor_parallel")


@dataclass(frozen=True, slots=True)
class View:
    """A profile as it is looked at: one micro-batch, one dtype, what repeats together."""

    profile: ModelProfile
    kinds: tuple[UnitKind, ...]
    micro_batch: int
    dtype: ComputeDtypeName

    def sum(self, kind: UnitKind, amount: Callable[[UnitCost], int]) -> int:
        """An amount of all repetitions together."""
        return kind.count * amount(kind.unit.costs[self.dtype])

    def saved(self, kind: UnitKind, policy: Policy) -> int:
        """Bytes kept from forward to backward; those of `none` where a policy is unknown."""
        return self.sum(kind, lambda cost: cost.saved.get(policy, cost.saved["none"]).at(self.micro_batch))

    def flops(self, kind: UnitKind, phase: Phase) -> int:
        """FLOPs of one phase."""
        return self.sum(kind, lambda cost: cost.flops(phase, self.micro_batch))


def draw_profile(profile: ModelProfile, micro_batch: int, dtype: ComputeDtypeName) -> Group:
    """The units in order of execution, equal ones together, for one micro-batch on one device with nothing sharded.

    Raises KeyError for a dtype that was not profiled.
    """
    view = View(profile, unit_kinds(profile), micro_batch, dtype)
    title = heading(
        f"{run_title(profile, micro_batch, dtype)}, on one device",
        "of all repetitions together; shares of parameters and of FLOPs",
    )
    kept = heading(
        "kept from forward to backward",
        "by what is checkpointed in every block; selective keeps matrix products and attention",
    )
    parts: list[RenderableType] = [
        Group(title, Grid(_WORK, _work_rows(view))),
        Group(kept, Grid(_KEPT, _kept_rows(view))),
    ]
    if any(dtype in kind.unit.compiled for kind in view.kinds):
        parts.append(_draw_compiled(view))
    divisions = draw_divisions(profile)
    if divisions is not None:
        parts.append(divisions)
    parts.append(facts(_about(view)))
    if profile.warnings:
        parts.append(Group(*(facts([("warning", warning)]) for warning in profile.warnings)))
    return page(*parts)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / (whole or 1):.0f} %"


def _numel(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel for parameter in parameters)


def _work_rows(view: View) -> list[Row]:
    work = {kind.name: [view.flops(kind, phase) for phase in PHASES] for kind in view.kinds}
    total, numel = sum(map(sum, work.values())), view.profile.numel
    rows = []
    for kind in view.kinds:
        own, flops = _numel(kind.parameters(view.profile)), work[kind.name]
        params = (human_count(own), _share(own, numel)) if own else ("", "")
        rows.append(Row((kind.name, str(kind.count), *params, *map(human_flops, flops), _share(sum(flops), total))))
    outside = _numel(parameter for parameter in view.profile.parameters if parameter.unit == OUTSIDE)
    if outside:
        rows.append(Row(("no block", "", human_count(outside), _share(outside, numel), *[""] * 4)))
    sums = [human_flops(sum(column)) for column in zip(*work.values(), strict=True)]
    count = str(sum(kind.count for kind in view.kinds))
    return [*rows, Row(("total", count, human_count(numel), "100 %", *sums, "100 %"), "bold")]


def _kept_rows(view: View) -> list[Row]:
    saved = {kind.name: [view.saved(kind, policy) for policy in POLICIES] for kind in view.kinds}
    totals = [sum(column) for column in zip(*saved.values(), strict=True)]

    def cells(values: Sequence[int]) -> list[str]:
        pairs = zip(values, totals, strict=True)
        return [cell for value, total in pairs for cell in (human_bytes(value), _share(value, total))]

    rows = []
    for kind in view.kinds:
        output = human_bytes(kind.unit.costs[view.dtype].output.at(view.micro_batch))
        rows.append(Row((kind.name, *cells(saved[kind.name]), output)))
    return [*rows, Row(("total", *cells(totals), ""), "bold")]


def _draw_compiled(view: View) -> Group:
    """What `torch.compile` makes of each unit, beside what runs without it."""

    def amounts(cost: UnitCost) -> list[int]:
        launches = sum(operator.count for operator in cost.operators)
        moved = sum(operator.bytes.at(view.micro_batch) for operator in cost.operators)
        return [launches, moved, cost.saved["none"].at(view.micro_batch)]

    rows = []
    for kind in view.kinds:
        compiled = kind.unit.compiled.get(view.dtype)
        before = amounts(kind.unit.costs[view.dtype])
        after = amounts(compiled) if compiled is not None else before
        pairs = [[kind.count * value for value in pair] for pair in zip(before, after, strict=True)]
        launches, *sizes = pairs
        cells = [*map(grouped, launches), *(human_bytes(value) for pair in sizes for value in pair)]
        rows.append(Row((kind.name, *cells)))
    title = heading(
        "under torch.compile",
        "kernels launched and bytes moved in forward and backward, bytes kept with nothing checkpointed",
    )
    return Group(title, Grid(_COMPILED, rows))


def _about(view: View) -> list[tuple[str, str]]:
    profile = view.profile
    trainable = _numel(parameter for parameter in profile.parameters if parameter.trainable)
    numel = f"{grouped(profile.numel)} in {plural(len(profile.parameters), 'tensor')}, {grouped(trainable)} trainable"
    blocks = [(kind.name, kind.says(profile)) for kind in view.kinds if kind.unit.kind == "block"]
    alternating = order(profile, view.kinds)
    tied = [f"{at.name} = {', '.join(at.also)}" for at in profile.parameters if at.also]
    return [
        *(blocks or [("blocks", "none found")]),
        *([("order", alternating)] if alternating else []),
        ("parameters", numel),
        *((key.replace("_", " "), said) for key in _ROLES if (said := _by(profile.parameters, key))),
        *([("tied", "; ".join(tied))] if tied else []),
        ("attention", f"{profile.attention[view.dtype]}, as assumed for {profile.device_kind} in {view.dtype}"),
        *_crossings(profile),
        *sharing_facts(profile),
        ("buffers", human_bytes(profile.buffer_bytes)),
        ("weights start", profile.init),
    ]


def _by(parameters: Iterable[Parameter], key: str) -> str:
    """Elements of all parameters by one of their attributes, the most first."""
    found: Counter[str] = Counter()
    for parameter in parameters:
        found[getattr(parameter, key)] += parameter.numel
    return ", ".join(f"{name} {human_count(numel)}" for name, numel in found.most_common())


def _crossings(profile: ModelProfile) -> list[tuple[str, str]]:
    """What crosses the cuts, and what skips units."""
    if not profile.cuts:
        return []
    least, most = (pick(profile.cuts, key=lambda cut: cut.bytes) for pick in (min, max))
    size = (
        human_bytes(most.bytes)
        if least.bytes == most.bytes
        else f"{human_bytes(least.bytes)} to {human_bytes(most.bytes)}"
    )
    skips = [edge for edge in profile.edges if edge.kind == "skip"]
    lines = [("cuts", f"{len(profile.cuts)}, crossed by {size} a sequence in the dtypes that the model declares")]
    refused = [cut.refused for cut in profile.cuts if cut.refused]
    if refused and profile.block_paths:
        lines.append(("no stage", f"can begin at {len(refused)} of the cuts: {refused[0]}"))
    if skips:
        lines.append(("skips", f"{len(skips)}, {human_bytes(sum(edge.bytes for edge in skips))} a sequence together"))
    return lines
