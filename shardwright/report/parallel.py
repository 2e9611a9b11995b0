"""Drawings of how devices share the work of one copy of the model: which ones, and what becomes of its modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import gcd, prod

from rich.console import Group

from shardwright.report.layout import Column, Grid, Row, grouped, heading, plural
from shardwright.schemas.plan import Decision, MeshAxis, Plan
from shardwright.schemas.profile import ExpertLayer, ModelProfile, ModuleStyle, Parameter

_METHODS = {
    "ring": "keys and values travel around while each part is attended to",
    "gather": "keys and values are gathered",
    "ulysses": "an all-to-all gives each device whole sequences of some heads",
    "none": "",
}


def parallel_lines(decision: Decision) -> Iterator[tuple[str, str]]:
    """What was decided of tensor, context and expert parallelism; nothing where there is none."""
    tensor, context, experts = decision.tensor_parallel, decision.context_parallel, decision.expert_parallel
    if tensor.degree > 1:
        too = ", and between its layers the sequence" if tensor.sequence else ""
        yield "tensor parallel", f"{tensor.degree} devices share every layer{too}"
    if context.degree > 1:
        how = _METHODS[context.method]
        yield "context parallel", f"{context.degree} devices share each sequence ({context.method}: {how})"
    if experts.degree > 1:
        yield "expert parallel", f"{experts.degree} devices share the experts of each layer; tokens travel to them"


def draw_sharing(plan: Plan) -> Group | None:
    """Which devices share what: for each kind of group, the one of device 0. None without parallelism of the model."""
    decision = plan.decision
    if not any(True for _ in parallel_lines(decision)):
        return None
    columns = (Column("axis"), Column("devices", "number"), Column("those of device 0"), Column("they", "prose"))
    title = heading("Which devices share what", "ranks count along the axes of the mesh, fastest first")
    return Group(title, Grid(columns, list(_sharing(plan))))


def _sharing(plan: Plan) -> Iterator[Row]:
    decision = plan.decision
    tp, cp, ep = (
        decision.tensor_parallel.degree,
        decision.context_parallel.degree,
        decision.expert_parallel.degree,
    )
    if tp > 1:
        yield _sharers("tp", tp, 1, "have parts of every layer, and read the same samples")
    if cp > 1:
        yield _sharers("cp", cp, tp, "have parts of each sequence")
    if ep > 1:
        counts = sorted({modules.experts // ep for modules in plan.model.expert_modules})
        each = (
            f"{' or '.join(map(str, counts))} of the experts of a layer each" if counts else "some of the experts each"
        )
        yield _sharers("ep", ep, tp, f"have {each}")
    data = prod(axis.size for axis in decision.mesh.axes if axis.name.startswith("dp_"))
    if data > 1:
        yield _sharers("dp", data, tp, "have the same part of every layer, and its states sharded among them")
    if decision.pipeline.ranks > 1:
        yield _sharers("pp", decision.pipeline.ranks, tp * data, "have stages of the model")


def _sharers(axis: str, size: int, stride: int, they: str) -> Row:
    ranks = [stride * number for number in range(size)]
    shown = ", ".join(map(str, ranks if size <= 8 else [*ranks[:3], "..."])) + (f", {ranks[-1]}" if size > 8 else "")
    return Row((axis, grouped(size), shown, they))


def expert_axes(axes: Sequence[MeshAxis], ep: int) -> dict[str, int]:
    """Of each data axis, fastest first, how many of its devices share experts rather than have the same ones."""
    found, left = {}, ep
    for axis in axes:
        if axis.name.startswith("dp_"):
            found[axis.name] = gcd(left, axis.size)
            left //= found[axis.name]
    return found


def draw_divisions(profile: ModelProfile) -> Group | None:
    """What tensor parallelism does to each kind of module; None where it does nothing."""
    styles = profile.tensor_parallelism.styles
    if not styles or profile.tensor_parallelism.refused:
        return None
    found: dict[tuple[str, ...], int] = {}
    own: dict[str, list[Parameter]] = {}
    for parameter in profile.parameters:
        own.setdefault(parameter.name.rpartition(".")[0], []).append(parameter)
    for style in styles:
        cells = (pattern_of(style.path), _role(style), _parameters(own.get(style.path, [])))
        found[cells] = found.get(cells, 0) + 1
    columns = (Column("module"), Column("count", "number"), Column("role", "prose"), Column("divided", "prose"))
    rows = [Row((module, str(count), role, divided)) for (module, role, divided), count in found.items()]
    return Group(heading("tensor parallelism", "what each process has a part of"), Grid(columns, rows))


def pattern_of(path: str) -> str:
    """The path with numbers in place of `*`, as the table of a script has it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _role(style: ModuleStyle) -> str:
    enters = ", values enter here" if style.enters or style.style == "region" else ""
    sequence = "" if style.sequence_dim is None else f", sequence in dimension {style.sequence_dim}"
    counts = f", {', '.join(style.attributes)} divided" if style.attributes else ""
    return f"{style.style}{enters}{sequence}{counts}"


def _parameters(parameters: Sequence[Parameter]) -> str:
    divided = (each for each in parameters if each.tensor_parallel in ("column", "row", "vocabulary"))
    return "; ".join(_divided(each) for each in divided)


def _divided(parameter: Parameter) -> str:
    parts = len(parameter.tensor_parallel_parts)
    several = f", {parts} matrices" if parts > 1 else ""
    size, dim = parameter.shape[parameter.tensor_parallel_dim], parameter.tensor_parallel_dim
    of = f" in units of {size // parameter.tensor_parallel_units}" if parameter.tensor_parallel == "column" else ""
    return f"{parameter.name.rpartition('.')[2]} along {dim} ({size}{of if parts < 2 else ''}{several})"


def sharing_facts(profile: ModelProfile) -> list[tuple[str, str]]:
    """Whether and how tensor, context and expert parallelism can run the model, or why not."""
    tensor, context = profile.tensor_parallelism, profile.context_parallelism
    lines = []
    if tensor.refused:
        lines.append(("tensors over", f"refused: {tensor.refused}"))
    elif tensor.degrees:
        sequence = "the sequence too" if tensor.sequence else f"not the sequence: {tensor.sequence_reason}"
        lines.append(("tensors over", f"{', '.join(map(str, tensor.degrees))} devices; {sequence}"))
    if context.refused:
        lines.append(("sequences over", f"refused: {context.refused}"))
    else:
        heads = f"{plural(context.heads, 'head')}, {context.kv_heads} of keys and values"
        lines.append(("sequences over", f"any devices; {heads}; {'causal' if context.causal else 'not causal'}"))
    if profile.expert_layers:
        lines.append(("experts", _experts(profile.expert_layers)))
    return lines


def _experts(layers: Sequence[ExpertLayer]) -> str:
    kinds = {(layer.experts, layer.chosen): 0 for layer in layers}
    for layer in layers:
        kinds[layer.experts, layer.chosen] += 1
    return "; ".join(
        f"{plural(count, 'layer')} of {experts}, {chosen} of them for each token"
        for (experts, chosen), count in kinds.items()
    )
