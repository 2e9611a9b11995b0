"""Who uses what in an exported graph, and inside of which modules.

Casts to the dtype that a tensor has and the like return the tensor itself; `torch.export` then takes every later use of
it for a use of the cast, wherever that lies. Such nodes are aliases here: what they stand for is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from shardwright.passes.axis_calls import operator_name
from shardwright.passes.axis_walk import written_into
from shardwright.passes.tensor_parallel import Analysis

_SAME = frozenset({"to", "_to_copy", "contiguous", "alias", "type_as", "float"})
"""Operators that may return their operand."""
_FRESH_NAMES = "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty"
_FRESH = frozenset(_FRESH_NAMES.split())
"""Operators that take no values from their operand."""


class Dataflow:
    """An exported graph without its aliases."""

    def __init__(self, graph: fx.Graph, analysis: Analysis) -> None:
        self.analysis = analysis
        self.nodes: list[fx.Node] = []
        """Calls, in order of execution."""
        self.takes: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        """What each node reads; of a tensor that is written into, also what writes into it."""
        self.users: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        self._stacks: dict[fx.Node, tuple[str, ...]] = {}
        for node in graph.nodes:
            if node.op == "output":
                self._link(node)
            if node.op != "call_function" or node.meta.get("val") is None or _is_alias(node):
                continue
            self.nodes.append(node)
            self._link(node)
            for base in written_into(node):
                if base.op == "call_function":
                    self.takes[real(base)].add(node)
                    self.users[node].add(real(base))

    def _link(self, node: fx.Node) -> None:
        for operand in map(real, node.all_input_nodes):
            self.takes[node].add(operand)
            self.users[operand].add(node)

    def stack(self, node: fx.Node) -> tuple[str, ...]:
        """Paths in the graph of the modules that call a node, the outermost first."""
        if node not in self._stacks:
            entries = (node.meta.get("nn_module_stack") or {}).values()
            self._stacks[node] = tuple(dict.fromkeys(str(entry[0]) for entry in entries))
        return self._stacks[node]

    def module(self, node: fx.Node) -> str:
        """The innermost of them."""
        stack = self.stack(node)
        return stack[-1] if stack else ""

    def inside(self, node: fx.Node, path: str) -> bool:
        """Whether a module calls a node."""
        return path in self.stack(node)

    def common(self, nodes: Iterable[fx.Node]) -> str:
        """The innermost module that calls them all."""
        stacks = [self.stack(node) for node in nodes]
        shared: Sequence[str] = stacks[0] if stacks else ()
        for stack in stacks[1:]:
            shared = [path for path in shared if path in stack]
        return shared[-1] if shared else ""

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a node is a parameter, or made of parameters alone."""
        return node in self.analysis.found.weights

    def needs_gradient(self, node: fx.Node) -> bool:
        """Whether a node is an activation with a gradient."""
        if node not in self.analysis.active or self.is_weight(node) or node.op != "call_function":
            return False
        if operator_name_of(node) in _FRESH and not any(other in self.analysis.active for other in self._writers(node)):
            return False
        return any(value.is_floating_point() for value in tensors(node))

    def _writers(self, node: fx.Node) -> Iterator[fx.Node]:
        return (other for other in self.takes[node] if node in map(real, written_into(other)))

    def parameter(self, node: fx.Node) -> str:
        """The parameter that a node is, or is made of."""
        return self.analysis.found.weights[node]


def real(node: fx.Node) -> fx.Node:
    """What an alias stands for."""
    while _is_alias(node):
        node = node.all_input_nodes[0]
    return node


def operator_name_of(node: fx.Node) -> str:
    """Of a call; empty for what is no operator of torch."""
    return operator_name(node.target) if hasattr(node.target, "_schema") else ""


def tensors(node: fx.Node) -> list[torch.Tensor]:
    """The values of a node."""
    value: Any = node.meta.get("val")
    return [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, torch.Tensor)]


def _is_alias(node: fx.Node) -> bool:
    if node.op != "call_function" or operator_name_of(node) not in _SAME or len(node.all_input_nodes) != 1:
        return False
    mine, its = tensors(node), tensors(node.all_input_nodes[0])
    if len(mine) != 1 or len(its) != 1:
        return False
    return [(t.dtype, t.shape, t.stride()) for t in mine] == [(t.dtype, t.shape, t.stride()) for t in its]
