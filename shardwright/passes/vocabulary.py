"""The styles of tables of tokens and of heads, whose rows are divided.

Nothing else of the model depends on whether they are: what cannot be divided stays whole, with all that shares a
parameter or a module with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
from torch import fx, nn

from shardwright.passes.dataflow import Dataflow, operator_name_of
from shardwright.passes.graph import Exported
from shardwright.passes.layers import holds, is_linear
from shardwright.schemas.profile import ModuleStyle

_NO_STYLE = "."
"""Stands for a use that no style is for; no parameter or module is named so."""


def vocabulary_styles(model: nn.Module, exported: Exported, flow: Dataflow) -> tuple[list[ModuleStyle], set[str]]:
    """The styles, and the parameters that stay whole."""
    divisions = flow.analysis.divisions
    links: nx.Graph[str] = nx.Graph()
    links.add_nodes_from(name for name, division in divisions.items() if division.role == "vocabulary")
    names = set(links)
    styles: dict[str, ModuleStyle] = {}
    for node in flow.nodes:
        used = {flow.parameter(each) for each in flow.takes[node] if flow.is_weight(each)}
        tables = sorted(used & names)
        if tables:
            style = _style(model, exported.path(flow.module(node)), node, tables)
            nx.add_path(links, [*tables, style.path if style else _NO_STYLE])
            styles.update({style.path: style} if style else {})
    found: list[ModuleStyle] = []
    whole: set[str] = set()
    for linked in nx.connected_components(links):
        mine = [styles[each] for each in sorted(linked) if each in styles]
        if _NO_STYLE in linked or not mine:
            whole |= linked & names
        else:
            found += mine
    return found, whole


def _style(model: nn.Module, path: str, node: fx.Node, tables: Iterable[str]) -> ModuleStyle | None:
    """The style of a module that takes rows of a table, or multiplies with it; None if there is none for it."""
    module = model.get_submodule(path)
    if not all(holds(model, path, name) for name in tables):
        return None
    if operator_name_of(node) == "embedding":
        plain = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
        return ModuleStyle(path=path, style="vocabulary") if plain else None
    return ModuleStyle(path=path, style="column", enters=True) if is_linear(module) else None
