"""How tensor parallelism would divide every parameter, derived from the dataflow.

[Note: tensor-parallel roles]
Megatron-LM divides pairs of matrices (Shoeybi et al., arXiv 1909.08053, section 3): the first one by its output
features (`column`), so that each process works on its own features or attention heads, the second one by its input
features (`row`), after which the processes' results are summed; what lies between such pairs is replicated. Here the
pairs are found. An axis ([Note: axes]) that no operator needs whole, that at least one matrix has as output features
and at least one as input features, can be divided: those matrices are its columns and rows, and vectors on that axis
(biases of columns) are divided with them. Where two such axes would divide one matrix, the one that comes first wins,
so that in a chain of matrices columns and rows alternate.

The classes of a loss over tokens and the rows of a table that is looked up by tokens are `vocabulary`. Other tables are
replicated, as in Megatron-LM: positions, token types, and the relative positions of T5, whose result is scattered over
the heads (`T5Model.forward`, megatron/core/models/T5/t5_model.py). Convolutions are replicated.

Results of rows are taken to be summed at once. Where values that follow from the batch alone have a divided axis
(a bias for each head, as ALiBi's), each process takes its own part of them.

A matrix with an axis on which an operator works that `RULES` does not know is `unknown`, unless some other operator
needs that axis whole anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

import networkx as nx
from torch import fx

from shardwright.passes.axes import (
    Axes,
    Axis,
    Dims,
    innermost,
    leaves,
    name_vocabulary,
    need_whole,
    new,
    size_of,
)
from shardwright.passes.axis_calls import Found, Lookup, Product
from shardwright.passes.axis_walk import tensors_of, walk
from shardwright.schemas.profile import TensorParallelRole


@dataclass(frozen=True, slots=True)
class Division:
    """How a parameter is divided."""

    role: TensorParallelRole = "replicated"
    dim: int = 0
    units: int = 0
    parts: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Shard:
    """One contiguous part of a dimension that can be divided by its major axes."""

    size: int
    units: int
    first: Axis
    run: tuple[Axis, ...]
    """The major axes that can be divided, `first` among them."""


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices that are divided together, with the vectors that go with them."""

    divisions: Mapping[str, Division]
    axes: frozenset[Axis]
    """What is divided; empty for what the job pairs up itself."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """What the dataflow says of tensor parallelism."""

    divisions: dict[str, Division]
    """Of every parameter."""
    groups: tuple[Group, ...]
    """In order of first use, without the vocabulary."""
    found: Found
    active: frozenset[fx.Node]
    """What depends on parameters."""


Override = Literal["column", "row", "vocabulary", "replicated"]


def divisions(
    graph: fx.Graph,
    parameters: Mapping[fx.Node, str],
    inputs: Iterable[fx.Node],
    logits: Iterable[fx.Node],
    path: Callable[[str], str] = str,
    overrides: Mapping[str, Override] | None = None,
) -> Analysis:
    """The division of every parameter in a graph of `torch.export`. `parameters` names the parameters' nodes, tied ones
    alike; `inputs` are those of the batch; `logits` are results whose last dimension counts the loss's classes; `path`
    gives the path in the model of a module in the graph; `overrides` gives parameters a role."""
    overrides = overrides or {}
    found = Found(path=path, tokens=set(inputs), weights=dict(parameters))
    dims: dict[str, Dims] = {}
    for node, name in parameters.items():
        dims.setdefault(name, [new(size) for size in node.meta["val"].shape])
        found.dims[node] = dims[name]
    active = set(parameters)
    walk(graph, found, active)
    for node in logits:
        if isinstance(named := found.dims.get(node), list):
            name_vocabulary(named[-1])
    _name_classes(found)
    (output,) = graph.find_nodes(op="output")
    for node in output.all_input_nodes:
        for each in tensors_of(found.dims.get(node)):
            for axes in each:
                if not any(leaf.vocabulary for leaf in leaves(axes)):
                    need_whole(axes)
    for name, role in overrides.items():
        if role == "replicated":
            for axes in dims[name]:
                need_whole(axes)
    free = {name: each for name, each in dims.items() if name not in overrides}
    decided, groups = _decide(free, found)
    forced = _forced({name: dims[name] for name in overrides}, overrides, found.products)
    for name in overrides:
        decided[name] = Division()
    for group in forced:
        decided.update(group.divisions)
    pairs = tuple(group for group in (*groups, *forced) if {d.role for d in group.divisions.values()} >= _PAIR)
    return Analysis(decided, pairs, found, frozenset(active))


def _shards(axes: Iterable[Axis]) -> list[_Shard]:
    """The parts of a dimension that can be divided, each on its own; empty if it cannot be divided."""
    found = list(leaves(axes))
    copies = 1
    while len(found) > 1 and found[0].picked and not found[0].whole:
        copies *= found.pop(0).size
    if not found:
        return []
    rest = size_of(found[1:])
    if found[0].parts:
        inner = [_shards([part]) for part in found[0].parts]
        each = [_Shard(s.size * rest, s.units, s.first, s.run) for part in inner for s in part] if all(inner) else []
        return each * copies
    run: list[Axis] = []
    for leaf in found:
        if leaf.whole or leaf.picked or leaf.unknown or leaf.parts:
            break
        run.append(leaf)
    return [_Shard(size_of(found), size_of(run), run[0], tuple(run))] * copies if run else []


_PAIR = {"column", "row"}


def _forced(dims: Mapping[str, Dims], roles: Mapping[str, Override], products: Sequence[Product]) -> list[Group]:
    """Groups of parameters that the job gives roles: columns up to the rows that follow them, in order of use."""
    result: list[Group] = []
    open_group: dict[str, Division] = {}
    for name, each in dims.items():
        if roles[name] == "vocabulary":
            result.append(Group({name: Division("vocabulary", 0, size_of(each[0]))}, frozenset()))
    for product in products:
        name = product.parameter
        if roles.get(name) not in _PAIR or any(name in group.divisions for group in result):
            continue
        role: TensorParallelRole = "column" if roles[name] == "column" else "row"
        if role == "column" and any(division.role == "row" for division in open_group.values()):
            result.append(Group(open_group, frozenset()))
            open_group = {}
        wanted = {*leaves(product.free if role == "column" else product.contracted)}
        at = next(at for at, axes in enumerate(dims[name]) if {*leaves(axes)} == wanted)
        open_group[name] = Division(role, at, size_of(dims[name][at]))
        for bias, axes in dims.items() if role == "column" else ():
            if bias.rpartition(".")[0] == name.rpartition(".")[0] and len(axes) == 1:
                open_group[bias] = Division("column", 0, size_of(axes[0]))
    return [*result, Group(open_group, frozenset())] if open_group else result


def _decide(dims: Mapping[str, Dims], found: Found) -> tuple[dict[str, Division], list[Group]]:
    tables = {lookup.parameter for lookup in found.lookups}
    _name_tables(found.lookups)
    result = {}
    for name, each in dims.items():
        at = next((at for at, axes in enumerate(each) if _is_vocabulary(axes)), None)
        if at is not None:
            result[name] = Division("vocabulary", at, size_of(each[at]))
            for place, axes in enumerate(each):
                if place != at:
                    need_whole(axes)
    rest = {name: each for name, each in dims.items() if name not in result}
    candidates = {name: each for name, each in rest.items() if name not in tables}
    groups = _divided(candidates, found)
    for group in groups:
        result.update(group.divisions)
    for name in rest:
        result.setdefault(name, _undivided(rest[name]))
    return result, groups


def _name_tables(lookups: Sequence[Lookup]) -> None:
    """A table that tokens are looked up in is divided by its rows, if there are more of them than features."""
    for lookup in lookups:
        rows, *features = lookup.table
        if lookup.tokens and size_of(rows) > size_of(axis for axes in features for axis in axes):
            for leaf in leaves(rows):
                leaf.vocabulary, leaf.whole = True, False


def _name_classes(found: Found) -> None:
    """The classes of a cross-entropy are the vocabulary if there are as many as tokens in a table; the few labels of a
    classifier are not divided."""
    tokens = {size_of(lookup.table[0]) for lookup in found.lookups if lookup.tokens}
    for axes in found.classes:
        if size_of(axes) in tokens:
            name_vocabulary(axes)
        else:
            need_whole(axes)


def _is_vocabulary(axes: Axes) -> bool:
    found = list(leaves(axes))
    return bool(found) and all(leaf.vocabulary and not leaf.whole for leaf in found)


def _undivided(dims: Dims) -> Division:
    reasons = [leaf.unknown for axes in dims for leaf in innermost(axes) if leaf.unknown and not leaf.whole]
    return Division("unknown", reason=reasons[0]) if reasons else Division()


def _divided(dims: Mapping[str, Dims], found: Found) -> list[Group]:
    """Columns, rows, and the vectors that go with them."""
    shards = {name: [_shards(axes) for axes in each] for name, each in dims.items()}
    links: nx.Graph[Axis] = nx.Graph()
    for each in shards.values():
        for parts in each:
            nx.add_path(links, [shard.first for shard in parts])
    result: list[Group] = []
    taken: set[str] = set()
    groups = [frozenset(group) for group in nx.connected_components(links)]
    for group in sorted(groups, key=lambda group: _first_use(found.products, group)):
        if not _is_pair(found, group) or _meets_itself(found.dims.values(), group):
            continue
        divided = _divide_by(group, dims, shards, found.products)
        if divided is not None and not divided.keys() & taken:
            result.append(Group(divided, group))
            taken |= divided.keys()
    return result


def _first_use(products: Sequence[Product], group: frozenset[Axis]) -> int:
    uses = (at for at, product in enumerate(products) if group & {*innermost((*product.contracted, *product.free))})
    return next(uses, len(products))


def _is_pair(found: Found, group: frozenset[Axis]) -> bool:
    """Whether there are both columns and rows, and every product takes the group's axes as major ones only."""
    columns = rows = False
    for product in found.products:
        for axes, is_row in ((product.contracted, True), (product.free, False)):
            present = group & {*innermost(axes)}
            if present - {axis for shard in _shards(axes) for axis in shard.run}:
                return False
            if present & {shard.first for shard in _shards(axes)}:
                rows, columns = rows or is_row, columns or not is_row
    return rows and columns


def _meets_itself(values: Iterable[Dims | tuple[Dims, ...]], group: frozenset[Axis]) -> bool:
    """Whether some tensor has an axis of the group twice: its entries meet there."""
    for value in values:
        for dims in tensors_of(value):
            found = [group & {*innermost(axes)} for axes in dims]
            if sum(map(bool, found)) > 1:
                return True
    return False


def _divide_by(
    group: frozenset[Axis],
    dims: Mapping[str, Dims],
    shards: Mapping[str, Sequence[Sequence[_Shard]]],
    products: Sequence[Product],
) -> dict[str, Division] | None:
    """Divides every parameter that has an axis of the group; None if one has it in a place where it cannot be cut."""
    result: dict[str, Division] = {}
    for name, each in dims.items():
        places = [at for at, axes in enumerate(each) if group & {*innermost(axes)}]
        if not places:
            continue
        at = places[0]
        if len(places) > 1 or not {shard.first for shard in shards[name][at]} <= group or not shards[name][at]:
            return None
        parts = shards[name][at]
        sides = {_side(product, group) for product in products if product.parameter == name}
        if len(sides) > 1:
            return None
        result[name] = Division(
            role=next(iter(sides), "column"),
            dim=at,
            units=gcd(*(shard.units for shard in parts)),
            parts=tuple(shard.size for shard in parts) if len(parts) > 1 else (),
        )
    return result


def _side(product: Product, group: frozenset[Axis]) -> TensorParallelRole:
    return "row" if group & {*innermost(product.contracted)} else "column"
