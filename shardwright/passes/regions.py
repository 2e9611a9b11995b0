"""Where values enter the divided part of a model and leave it, from the dataflow ([Note: regions])."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import networkx as nx
from torch import fx

from shardwright.passes.axes import innermost
from shardwright.passes.axis_walk import tensors_of
from shardwright.passes.dataflow import Dataflow
from shardwright.passes.tensor_parallel import Analysis, Group


@dataclass(frozen=True, slots=True)
class Component:
    """Columns and the rows after them."""

    columns: tuple[fx.Node, ...]
    """Their products, in order."""
    rows: tuple[fx.Node, ...]
    divided: frozenset[fx.Node]
    """What is divided: the results of the columns, and everything up to the rows."""
    entries: tuple[tuple[fx.Node, fx.Node], ...]
    """Activations with a gradient that are not divided, and what is, or sums over it, and takes them."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """A module at whose inputs everything enters that is divided inside of it."""

    path: str
    inputs: frozenset[fx.Node]
    inside: frozenset[fx.Node]
    """What the module makes of its inputs before they meet the divided part."""


def components(flow: Dataflow, group: Group) -> Iterator[Component]:
    """The parts of a group that share no columns. What all of them share (a bias that all layers' attention gets) is
    divided, but connects nothing."""
    products = [product for product in flow.analysis.found.products if product.node is not None]
    columns = [p.node for p in products if _role(group, p.parameter) == "column"]
    rows = [p.node for p in products if _role(group, p.parameter) == "row"]
    divided = _divided(flow, group, columns, rows)
    before = {row: _upwards(flow, flow.takes[row], lambda node: node in divided) for row in rows if row is not None}
    links: nx.Graph[fx.Node] = nx.Graph()
    for row, above in before.items():
        links.add_node(row)
        links.add_edges_from((row, column) for column in columns if column in above)
    for found in nx.connected_components(links):
        mine = tuple(row for row in before if row in found)
        area = frozenset().union(*(before[row] for row in mine))
        yield Component(
            tuple(column for column in columns if column is not None and column in found),
            mine,
            area,
            tuple(_entries(flow, area, mine)),
        )


def _role(group: Group, parameter: str) -> str:
    division = group.divisions.get(parameter)
    return division.role if division is not None else ""


def _divided(
    flow: Dataflow, group: Group, columns: Collection[fx.Node | None], rows: Collection[fx.Node | None]
) -> set[fx.Node]:
    if group.axes:
        return {node for node in flow.nodes if not flow.is_weight(node) and has_axes(flow.analysis, node, group)}
    found: set[fx.Node] = set()
    queue = [column for column in columns if column is not None]
    while queue:
        node = queue.pop()
        if node not in found and node not in rows:
            found.add(node)
            queue.extend(user for user in flow.users[node] if user.op == "call_function")
    return found


def has_axes(analysis: Analysis, node: fx.Node, group: Group) -> bool:
    """Whether a dimension of a node's value is divided."""
    return any(
        axis in group.axes
        for dims in tensors_of(analysis.found.dims.get(node))
        for axes in dims
        for axis in innermost(axes)
    )


def _upwards(flow: Dataflow, start: Iterable[fx.Node], wanted: Callable[[fx.Node], bool]) -> frozenset[fx.Node]:
    """What leads to some nodes, as far as it is wanted."""
    found: set[fx.Node] = set()
    queue = [node for node in start if wanted(node)]
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue.extend(each for each in flow.takes[node] if wanted(each))
    return frozenset(found)


def _entries(flow: Dataflow, area: Collection[fx.Node], rows: Collection[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    for node in [*(node for node in flow.nodes if node in area), *rows]:
        for operand in flow.takes[node]:
            if operand not in area and flow.needs_gradient(operand):
                yield operand, node


def entrance(flow: Dataflow, path: str, part: Component, rows: Collection[fx.Node]) -> Entrance | None:
    """The module as a place where everything enters that enters inside of it; None if something comes another way, or
    the module uses its inputs for something else, too. `rows` are those of all components."""
    entries = [(value, node) for value, node in part.entries if flow.inside(node, path)]
    inputs: set[fx.Node] = set()
    before: set[fx.Node] = set()
    queue = [value for value, _ in entries]
    while queue:
        node = queue.pop()
        if not flow.inside(node, path):
            inputs.add(node)
        elif node not in before:
            before.add(node)
            queue.extend(each for each in flow.takes[node] if flow.needs_gradient(each))
    area = {*before, *part.divided, *part.rows}
    leading = {user for node in before for user in _living(flow, node)}
    leading |= {user for node in inputs for user in _living(flow, node) if flow.inside(user, path)}
    if not inputs or leading - area or before & {*rows, *part.divided}:
        return None
    for node in flow.nodes:
        if flow.inside(node, path):
            foreign = [each for each in flow.takes[node] if not flow.inside(each, path) and flow.needs_gradient(each)]
            if any(each not in inputs for each in foreign):
                return None
    return Entrance(path, frozenset(inputs), frozenset(before))


def _living(flow: Dataflow, node: fx.Node) -> Iterator[fx.Node]:
    """Users whose results are used."""
    return (user for user in flow.users[node] if user.op == "output" or flow.users[user])
