"""Drawing of where the model states lie on the mesh."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.text import Text

from shardwright.planner.space import PIPELINE_AXIS
from shardwright.report.layout import Cell, Column, Grid, Row, heading
from shardwright.schemas.plan import MeshAxis, Plan, States, StateSharding

_NOTE = "axes of the mesh, fastest first: over each, a state is divided further, or lies in equal copies"


def draw_states(plan: Plan) -> Group:
    """One row a state, one column an axis: what a device has of the state once the axes so far are counted."""
    axes = plan.decision.mesh.axes[::-1]
    title = heading("Where the model states lie", _NOTE if axes else "")
    if not axes:
        return Group(title, Text(), Text("whole on the only device", style="dim"))
    columns = [Column(""), *(Column(f"{axis.name} x {axis.size}\n{' '.join(axis.levels)}") for axis in axes)]
    return Group(title, Grid(columns, list(_rows(plan.decision.states, axes)), continued=True))


def _rows(states: States, axes: tuple[MeshAxis, ...]) -> Iterator[Row]:
    named = {
        "parameters": states.parameters,
        "second copy": states.secondary,
        "gradients": states.gradients,
        "optimizer states": states.optimizer_states,
    }
    for name, state in named.items():
        if state is not None:
            yield Row((name, *_cells(state, axes)))


def _cells(state: StateSharding, axes: tuple[MeshAxis, ...]) -> Iterator[Cell]:
    inner = 1
    for axis in axes:
        if axis.name == PIPELINE_AXIS:
            yield "its stages"
            continue
        end = inner * axis.size
        shards, copies = min(state.degree, end), end // max(state.degree, inner)
        parts = [Text(f"1/{shards}", style="cyan")] if shards > inner else []
        parts += [Text(f"{copies} copies", style="dim")] if copies > 1 else []
        yield Text(", ").join(parts) if parts else "whole"
        inner = end
