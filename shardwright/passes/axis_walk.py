"""Carries axes through a graph of `torch.export`, operator by operator ([Note: axes])."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from shardwright.passes.axes import Dims, new, size_of, taint
from shardwright.passes.axis_calls import Call, Found, Result, arguments_of, operator_name
from shardwright.passes.axis_rules import MOVES_TOKENS, rule_of


def tensors_of(dims: Any) -> Iterator[Dims]:
    """The dimensions of one result, or of each of several."""
    yield from [dims] if isinstance(dims, list) else dims or ()


def walk(graph: fx.Graph, found: Found, active: set[fx.Node]) -> Any:
    """Applies the rules to every node in order. `active` are nodes whose values depend on parameters; grows. Returns
    the output's arguments."""
    for node in graph.nodes:
        if node.op == "output":
            return node.args[0]
        if node in found.dims:
            continue
        if node.op in ("placeholder", "get_attr"):
            if isinstance(value := node.meta.get("val"), torch.Tensor):
                found.dims[node] = [new(size) for size in value.shape]
            continue
        operands = node.all_input_nodes
        if any(operand in active for operand in operands):
            active.add(node)
        if node.target is operator.getitem:
            source = found.dims.get(operands[0])
            if isinstance(source, tuple):
                found.dims[node] = source[node.args[1]]
            _inherit(node, operands[0], found)
            continue
        if node.meta.get("val") is None:
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            _inside(node, found, active)
            continue
        found.dims[node] = _apply(node, found, active)
        _follow_values(node, found, active)
    raise AssertionError("a graph ends with its output")


def _inherit(node: fx.Node, source: fx.Node, found: Found) -> None:
    """A node is another name for a part of another one."""
    if source in found.weights:
        found.weights[node] = found.weights[source]
    if source in found.tokens:
        found.tokens.add(node)


def _inside(node: fx.Node, found: Found, active: set[fx.Node]) -> None:
    """A call of a part of the graph (`torch.no_grad`, `torch.autocast`): its operators are applied in place."""
    owner = node.graph.owning_module
    places = [at for at, value in enumerate(node.args) if isinstance(value, fx.Node) and value.op == "get_attr"]
    inner = getattr(owner, str(node.args[places[0]].target), None) if places else None  # type: ignore[union-attr]
    if not isinstance(inner, fx.GraphModule) or operator_label(node).startswith(("cond", "while", "map", "scan")):
        found.dims[node] = _not_known(node, found, active)
        return
    for placeholder, value in zip(inner.graph.find_nodes(op="placeholder"), node.args[places[0] + 1 :], strict=True):
        if isinstance(value, fx.Node) and value in found.dims:
            found.dims[placeholder] = found.dims[value]
            _inherit(placeholder, value, found)
            if value in active:
                active.add(placeholder)
    results = walk(inner.graph, found, active)
    if isinstance(results, fx.Node):
        found.dims[node] = found.dims[results]
    else:
        each = [found.dims.get(result) for result in results]
        found.dims[node] = tuple(dims if isinstance(dims, list) else [] for dims in each)


def operator_label(node: fx.Node) -> str:
    """An operator as people write it: `aten.mm`."""
    return str(node.target).removesuffix(".default")


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that calls a node."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _apply(node: fx.Node, found: Found, active: set[fx.Node]) -> Result:
    rule = rule_of(node.target)
    if rule is None:
        return _not_known(node, found, active)
    try:
        result = rule(Call(node, operator_name(node.target), arguments_of(node), found))
    except (NotImplementedError, LookupError, TypeError, ValueError):  # an overload that the rule does not foresee
        return _not_known(node, found, active)
    return result if _sizes(result) == _shapes(node.meta["val"]) else _not_known(node, found, active)


def _sizes(result: Result) -> list[tuple[int, ...]]:
    return [tuple(size_of(axes) for axes in dims) for dims in tensors_of(result)]


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in (value if isinstance(value, list | tuple) else [value])]


def _not_known(node: fx.Node, found: Found, active: set[fx.Node]) -> Result:
    """An operator without a rule. It matters only where it works on what depends on parameters."""
    results = [[new(size) for size in shape] for shape in _shapes(node.meta["val"])]
    if node in active:
        label = f"{operator_label(node)} in module {found.path(module_of(node)) or '(the model itself)'}"
        operands = [found.dims[each] for each in node.all_input_nodes if each in active and each in found.dims]
        for dims in (*operands, *results):
            for each in tensors_of(dims):
                for axes in each:
                    taint(axes, label)
    return tuple(results) if isinstance(node.meta["val"], list | tuple) else results[0]


def _follow_values(node: fx.Node, found: Found, active: set[fx.Node]) -> None:
    """Whether a node is made of parameters alone, and whether it carries tokens. What is written in place is known of
    the tensor that is written into, too."""
    operands = node.all_input_nodes
    if operands and all(operand in found.weights for operand in operands):
        found.weights[node] = found.weights[operands[0]]
    if operator_name(node.target) in MOVES_TOKENS and any(operand in found.tokens for operand in operands):
        found.tokens.add(node)
    for base in written_into(node):
        for group in (found.tokens, active):
            if node in group:
                group.add(base)


def writes(node: fx.Node) -> bool:
    """Whether an operator works in place."""
    schema: Any = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def written_into(node: fx.Node) -> Iterator[fx.Node]:
    """The tensor that an operator in place writes into, and those that it is a view of."""
    base: Any = node.args[0] if node.args and writes(node) else None
    while isinstance(base, fx.Node):
        yield base
        view = getattr(base.target, "is_view", False) or base.target is operator.getitem
        base = base.args[0] if view and base.args else None
