"""What tensor parallelism does to each module of an exported graph, from the dataflow ([Note: regions])."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import fx, nn

from shardwright.passes.dataflow import Dataflow, operator_name_of, tensors
from shardwright.passes.graph import Exported
from shardwright.passes.layers import holds, is_conv1d, is_linear
from shardwright.passes.regions import Component, Entrance, components, entrance, has_axes
from shardwright.passes.tensor_parallel import Division, Group
from shardwright.passes.vocabulary import vocabulary_styles
from shardwright.schemas.profile import ModuleStyle, Style

OVERRIDES = "strategy.tensor_parallel.overrides"


class Refused(Exception):
    """The model cannot be divided; the message names the module."""


@dataclass
class Styles:
    """The styles of the modules in a graph, under their paths in the model."""

    by_path: dict[str, ModuleStyle] = field(default_factory=dict)
    divided: set[fx.Node] = field(default_factory=set)
    """Nodes whose values are divided."""
    regions: set[fx.Node] = field(default_factory=set)
    """These, and what modules make of their inputs before they meet the divided part."""
    whole: set[str] = field(default_factory=set)
    """Parameters with a division that stay whole all the same."""

    def put(self, path: str, style: Style, *, enters: bool = False, sequence_dim: int | None = None) -> None:
        """Gives a module a style. Raises Refused if it has another one."""
        before = self.by_path.get(path)
        if before is not None and before.style != style:
            both = " and ".join(sorted((before.style, style)))
            raise Refused(f"module {path} itself would be {both}: give its weights modules of their own")
        enters = enters or (before is not None and before.enters)
        self.by_path[path] = ModuleStyle(path=path, style=style, enters=enters, sequence_dim=sequence_dim)


def find_styles(model: nn.Module, exported: Exported, flow: Dataflow) -> Styles:
    """The styles that divide the model as the divisions say, without attributes. Raises Refused."""
    finder = _Finder(model, exported, flow)
    finder.refuse_unknown()
    for group in flow.analysis.groups:
        finder.refuse_constants(group)
        for part in components(finder.flow, group):
            finder.parts.append(part)
    finder.rows = {row for part in finder.parts for row in part.rows}
    for part in finder.parts:
        finder.add(part)
    if not finder.parts:
        raise Refused("no matrices of it pair up as columns and rows")
    styles, finder.styles.whole = vocabulary_styles(model, exported, finder.flow)
    for style in styles:
        finder.styles.put(style.path, style.style, enters=style.enters)
    finder.check_owners()
    return finder.styles


class _Finder:
    def __init__(self, model: nn.Module, exported: Exported, flow: Dataflow) -> None:
        self.model, self.exported, self.flow, self.analysis = model, exported, flow, flow.analysis
        self.styles = Styles()
        self.parts: list[Component] = []
        self.rows: set[fx.Node] = set()

    def path(self, node: fx.Node) -> str:
        """The module that calls a node, by its path in the model."""
        return self.exported.path(self.flow.module(node))

    def refuse_unknown(self) -> None:
        """Raises Refused for the first matrix whose use is not understood."""
        for name, division in self.analysis.divisions.items():
            if division.role == "unknown":
                module = name.rpartition(".")[0]
                raise Refused(
                    f"how to divide module {module} is unknown, because of {division.reason}; "
                    f"{OVERRIDES} can say what it is"
                )

    def refuse_constants(self, group: Group) -> None:
        """Raises Refused for values that follow from the batch, or are constants, and differ from head to head: nobody
        gives each process its own (ALiBi's slopes)."""
        for node in self.exported.program.graph.nodes:
            if node in self.analysis.active or not has_axes(self.analysis, node, group):
                continue
            sources = [each for each in node.all_input_nodes if has_axes(self.analysis, each, group)]
            if not sources and operator_name_of(node) not in _ALIKE:
                raise Refused(
                    f"{node.name} in module {self.path(node) or type(self.model).__name__} has values of its own for "
                    "each head or feature that is divided, and they come from no parameter"
                )

    def divided(self, parameter: str) -> bool:
        """Whether a parameter is divided."""
        return self.analysis.divisions[parameter].role in ("column", "row", "vocabulary")

    def add(self, part: Component) -> None:
        """The styles of columns and rows."""
        if len({self.path(node) for node in (*part.columns, *part.rows)}) == 1:
            self._add_experts(part)
            return
        for node in (*part.columns, *part.rows):
            self._own(node)
        for row in part.rows:
            self._check_row(row)
            self.styles.put(self.path(row), "row", sequence_dim=sequence_dim([self._result(row)]))
        entrances = self._entrances(part)
        for column in part.columns:
            found = entrances.get(self.path(column))
            if found is None:
                self.styles.put(self.path(column), "column")
            else:
                dim = sequence_dim(found.inputs)
                self.styles.put(self.path(column), "column", enters=True, sequence_dim=dim)
        columns = {self.path(column) for column in part.columns}
        for path, found in entrances.items():
            if path not in columns:
                self.styles.put(path, "region", sequence_dim=sequence_dim(found.inputs))
        self._add_area(part, {node for found in entrances.values() for node in found.inside})

    def _add_area(self, part: Component, before: set[fx.Node]) -> None:
        self.styles.divided |= part.divided
        self.styles.regions |= part.divided | before
        for node in [*part.divided, *before]:
            for operand in self.flow.takes[node]:
                if self.flow.is_weight(operand) and not self.divided(self.flow.parameter(operand)):
                    if operator_name_of(node) == "embedding":
                        self._own(node, "scatter")
                        self.styles.put(self.path(node), "scatter")
                    else:
                        self._own(node, "shared")
                        self.styles.put(self.path(node), "shared")

    def _entrances(self, part: Component) -> dict[str, Entrance]:
        """By path in the model, the modules where everything enters: one around all, or else each column."""
        columns = [node for _, node in part.entries]
        for path in (self.flow.common([*part.columns, *part.rows]), self.flow.common(columns)):
            found = entrance(self.flow, path, part, self.rows) if path else None
            if found is not None and all(self.flow.inside(node, path) for _, node in part.entries):
                return {self.exported.path(path): found}
        result: dict[str, Entrance] = {}
        for value, node in part.entries:
            path = self.flow.module(node)
            found = entrance(self.flow, path, part, self.rows)
            if found is None or path not in {self.flow.module(column) for column in part.columns}:
                raise Refused(
                    f"in module {self.exported.path(path)} {operator_name_of(node)} takes a result of "
                    f"{operator_name_of(value) or 'an operator'} beside what is divided, whose gradient would be a part"
                )
            result[self.exported.path(path)] = found
        return result

    def _own(self, node: fx.Node, style: str = "") -> None:
        """Raises Refused unless the parameter of a call is one of the module's own that makes it."""
        path = self.path(node)
        names = [self.flow.parameter(each) for each in self.flow.takes[node] if self.flow.is_weight(each)]
        wrong = [name for name in names if not holds(self.model, path, name)]
        if wrong or (not style and next(self.model.get_submodule(path).children(), None)):
            raise Refused(
                f"module {path or type(self.model).__name__} calls an operator on {(wrong or names)[0]} itself: "
                f"give the weight a module of its own, or leave it whole with {OVERRIDES}"
            )

    def _result(self, node: fx.Node) -> fx.Node:
        """What a call's module returns of it."""
        path = self.flow.module(node)
        while (users := [user for user in self.flow.users[node] if self.flow.module(user) == path]) and users[
            0
        ] != node:
            node = users[0]
        return node

    def _check_row(self, node: fx.Node) -> None:
        """Raises Refused for a row that would add its bias once for each process."""
        module = self.model.get_submodule(self.path(node))
        if is_linear(module) or is_conv1d(module):
            return
        own = [name for name, parameter in module.named_parameters(recurse=False) if parameter is not None]
        if len(own) > 1:
            raise Refused(f"module {self.path(node)} is neither nn.Linear nor Conv1D, and adds a bias after its rows")

    def _add_experts(self, part: Component) -> None:
        """A module with stacks of matrices."""
        path, graph_path = self.path(part.rows[0]), self.flow.module(part.rows[0])
        names = [self.flow.parameter(w) for n in part.rows for w in self.flow.takes[n] if self.flow.is_weight(w)]
        sizes = {self._shape(name) for name in names}
        if sizes != {3} or not all(holds(self.model, path, name) for name in names):
            raise Refused(
                f"module {path} calls operators on its columns and rows itself: give them modules of their own, or "
                f"leave them whole with {OVERRIDES}"
            )
        wrong = next(self._not_linear(part, graph_path), None)
        if wrong is not None:
            raise Refused(f"module {path} does {operator_name_of(wrong)} on the sums of its rows before they are whole")
        inputs = {
            each
            for node in self.flow.nodes
            if self.flow.inside(node, graph_path)
            for each in self.flow.takes[node]
            if not self.flow.inside(each, graph_path) and self.flow.needs_gradient(each)
        }
        self.styles.put(path, "experts", sequence_dim=sequence_dim(inputs))
        inside = {node for node in self.flow.nodes if self.flow.inside(node, graph_path)}
        self.styles.divided |= part.divided
        self.styles.regions |= inside

    def _shape(self, name: str) -> int:
        return self.model.get_parameter(name).dim()

    def _not_linear(self, part: Component, path: str) -> Iterator[fx.Node]:
        """What is done to rows' results inside a module that cannot be done to each process's part of them."""
        after = set(part.rows)
        for node in self.flow.nodes:
            if node in after or not self.flow.inside(node, path):
                continue
            taken = [each for each in self.flow.takes[node] if each in after]
            if taken:
                after.add(node)
                name = operator_name_of(node)
                others = [e for e in self.flow.takes[node] if e not in after and e in self.analysis.active]
                linear = name in _LINEAR or (name in ("mul", "div") and len(taken) == 1)
                if not linear and not (name in _SUMS and not any(map(self._is_other, others))):
                    yield node

    def _is_other(self, node: fx.Node) -> bool:
        return self.flow.is_weight(node) or self.flow.needs_gradient(node)

    def check_owners(self) -> None:
        """Raises Refused for a parameter that is divided while no style of its module says so."""
        dividing = [path for path, s in self.styles.by_path.items() if s.style in _DIVIDING]
        for name, division in self.analysis.divisions.items():
            if division.role == "replicated" or name in self.styles.whole:
                continue
            if not any(holds(self.model, path, name) for path in dividing):
                raise Refused(
                    f"module {name.rpartition('.')[0]} holds {name.rpartition('.')[2]}, which is divided, and works on "
                    f"it itself: give it a module of its own"
                )


_ALIKE_NAMES = (
    "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty expand "
    "repeat repeat_interleave broadcast_to"
)
_ALIKE = frozenset(_ALIKE_NAMES.split())
"""Operators whose results are equal along dimensions that their operands do not have."""
_DIVIDING = ("column", "row", "vocabulary", "experts")
_LINEAR_NAMES = (
    "index view reshape sum to _to_copy contiguous clone unsqueeze squeeze expand transpose permute getitem "
    "index_select flatten unflatten narrow slice select neg"
)
_LINEAR = frozenset(_LINEAR_NAMES.split())
_SUMS = frozenset({"add", "index_add", "scatter_add", "cat", "stack", "index_put", "sub"})


def sequence_dim(values: Iterable[fx.Node]) -> int | None:
    """The dimension of (1, sequence, ...) or of (tokens, ...), where all values have the same."""
    found = {_sequence_dim(tuple(tensor.shape)) for node in values for tensor in tensors(node)}
    return found.pop() if len(found) == 1 else None


def _sequence_dim(shape: tuple[int, ...]) -> int:
    return 0 if len(shape) == 2 and shape[0] != 1 else 1


def with_equals(styles: Iterable[ModuleStyle], like: Mapping[str, str], model: nn.Module) -> tuple[ModuleStyle, ...]:
    """The styles for all modules in order of registration: a block has those of the first one that is equal to it."""
    found: dict[str, ModuleStyle] = {}
    given = list(styles)
    inside = {style.path: _block_of(style.path, like) for style in given}
    for style in given:
        if not inside[style.path]:
            found[style.path] = style
    for block, first in like.items():
        for style in given:
            if inside[style.path] == first:
                path = block + style.path.removeprefix(first)
                found[path] = replace(style, path=path)
    order = {path: at for at, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return tuple(found[path] for path in sorted(found, key=lambda path: order[path]))


def _block_of(path: str, blocks: Mapping[str, str]) -> str:
    return next((block for block in blocks if path == block or path.startswith(f"{block}.")), "")


def adjusted(divisions: Mapping[str, Division], whole: Iterable[str]) -> dict[str, Division]:
    """The divisions, with some parameters whole."""
    return {**divisions, **dict.fromkeys(whole, Division())}
