"""Drawing of where the model states lie on the mesh."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.text import Text

from shardwright.planner.space import PIPELINE_AXIS, TENSOR_AXIS
from shardwright.report.layout import Cell, Column, Grid, Row, heading
from shardwright.report.parallel import expert_axes
from shardwright.schemas.plan import MeshAxis, Plan, States, StateSharding

_NOTE = "axes of the mesh, fastest first: over each, a state is divided further, or lies in equal copies"


def draw_states(plan: Plan) -> Group:
    """One row a state, one column an axis: what a device has of the state once the axes so far are counted."""
    axes = plan.decision.mesh.axes[::-1]
    title = heading("Where the model states lie", _NOTE if axes else "")
    if not axes:
        return Group(title, Text(), Text("whole on the only device", style="dim"))
    columns = [Column(""), *(Column(f"{axis.name} x {axis.size}\n{' '.join(axis.levels)}") for axis in axes)]
    rows = [*_rows(plan.decision.states, axes)]
    if (experts := plan.decision.expert_parallel.degree) > 1:
        rows += _rows(plan.decision.states, axes, experts)
    return Group(title, Grid(columns, rows, continued=True))


def _rows(states: States, axes: tuple[MeshAxis, ...], experts: int = 1) -> Iterator[Row]:
    """Of all else, or of what so many devices share the experts of."""
    named = {
        "parameters": states.parameters,
        "second copy": states.secondary,
        "gradients": states.gradients,
        "optimizer states": states.optimizer_states,
    }
    for name, state in named.items():
        if state is not None:
            yield Row((f"experts' {name}" if experts > 1 else name, *_cells(state, axes, experts)))


def _cells(state: StateSharding, axes: tuple[MeshAxis, ...], experts: int) -> Iterator[Cell]:
    inner, degree = 1, max(1, state.degree // experts)
    sharing = expert_axes(axes, experts)
    for axis in axes:
        if axis.name == PIPELINE_AXIS:
            yield "its stages"
            continue
        if axis.name == TENSOR_AXIS:
            yield "its part of each layer"
            continue
        end = inner * axis.size // sharing[axis.name]
        shards, copies = min(degree, end), end // max(degree, inner)
        parts = [Text("own experts", style="cyan")] if sharing[axis.name] > 1 else []
        parts += [Text(f"1/{shards}", style="cyan")] if shards > inner else []
        parts += [Text(f"{copies} copies", style="dim")] if copies > 1 else []
        yield Text(", ").join(parts) if parts else "whole"
        inner = end
