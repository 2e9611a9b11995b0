"""Operator calls in a graph, as the rules see them, and what they find out ([Note: axes])."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from shardwright.passes.axes import Axes, Axis, Dims, new, size_of, unify

Result = Dims | tuple[Dims, ...]
"""The dimensions of one result, or of each of several."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of an activation with a parameter."""

    parameter: str
    contracted: Axes
    """Of the parameter: what is summed over."""
    free: Axes
    """Of the parameter: what the result has of it."""
    node: fx.Node | None = None
    """The call."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """Rows taken out of a table."""

    parameter: str
    table: Dims
    tokens: bool
    """Whether the rows are chosen by values of the batch as they are, not by positions."""


@dataclass
class Found:
    """What the operators of a graph say."""

    path: Callable[[str], str] = str
    """The path in the model of a module in the graph."""
    dims: dict[fx.Node, Dims | tuple[Dims, ...]] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    classes: list[Axes] = field(default_factory=list)
    """Dimensions over which a cross-entropy is taken."""
    weights: dict[fx.Node, str] = field(default_factory=dict)
    """Parameters, and what is made of parameters alone, with the name of the (first) parameter."""
    tokens: set[fx.Node] = field(default_factory=set)
    """Inputs of the model, and what moves their values without changing them."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call in the graph."""

    node: fx.Node
    name: str
    arguments: dict[str, Any]
    """By the names of the operator's schema, defaults included."""
    found: Found

    def dims(self, name: str) -> Dims:
        """Dimensions of a tensor argument."""
        found = self.found.dims[self.arguments[name]]
        if not isinstance(found, list):
            raise TypeError(f"{name} is not one tensor")
        return found

    def first(self) -> Dims:
        """Dimensions of the first argument."""
        return self.dims(next(iter(self.arguments)))

    def tensors_of(self, name: str) -> list[Dims]:
        """Dimensions of the tensors in an argument that is a list."""
        return [found for node in self.arguments[name] if isinstance(found := self.found.dims[node], list)]

    def tensors(self) -> list[Dims]:
        """Dimensions of all tensors among the arguments."""
        return [found for node in self.node.all_input_nodes if isinstance(found := self.found.dims.get(node), list)]

    def is_weight(self, name: str) -> bool:
        """Whether an argument is made of parameters alone."""
        return self.arguments[name] in self.found.weights

    def note_product(self, weight: str, contracted: Axes, free: Axes) -> None:
        """The call multiplies an activation with the parameter in this argument."""
        parameter = self.found.weights[self.arguments[weight]]
        self.found.products.append(Product(parameter, contracted, free, self.node))

    def shape(self) -> tuple[int, ...]:
        """Shape of the only result."""
        return tuple(self.node.meta["val"].shape)

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of several results."""
        return [tuple(value.shape) for value in self.node.meta["val"]]


def operator_name(target: Any) -> str:
    """Of an operator in the graph, as `RULES` has it."""
    name = str(target._schema.name).split("::")[1]
    return name if name.startswith("__") else name.rstrip("_") or name


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """An operator call's arguments by the names of its schema, defaults included."""
    target: Any = node.target
    schema = target._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return {argument.name: {**defaults, **given, **node.kwargs}.get(argument.name) for argument in schema}


def aligned(tensors: Sequence[Dims], shape: Sequence[int]) -> Dims:
    """Broadcasting: dimensions are counted from the last one, and those of size 1 stretched."""
    result: Dims = []
    for place, size in enumerate(shape):
        at = len(shape) - place
        wide = [dims[-at] for dims in tensors if at <= len(dims) and size_of(dims[-at]) == size]
        for axes in wide[1:]:
            unify(wide[0], axes)
        result.append(wide[0] if wide else new(size))
    return result


def places_of(dims: Dims, wanted: Any) -> list[int]:
    """The dimensions that an argument names: one, several, or all."""
    if wanted is None or wanted == []:
        return list(range(len(dims)))
    return sorted(place % len(dims) for place in ([wanted] if isinstance(wanted, int) else wanted)) if dims else []


def all_whole(shape: Sequence[int]) -> Dims:
    """The dimensions of a result that is needed whole, whatever it was made of."""
    return [[Axis(size, whole=True)] if size != 1 else [] for size in shape]
