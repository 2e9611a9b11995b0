"""Runs an exported model as several processes of tensor parallelism would, on real tensors, in one process.

Every value is a list with one tensor for each process. A division says how parameters are cut; nothing else is known of
the model. Where the graph states sizes (views, splits), those of the dimension that is divided shrink with it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from shardwright.passes.axis_calls import operator_name
from shardwright.passes.graph import Exported
from shardwright.passes.tensor_parallel import Division

Values = list[Any]
_FACTORS = {"linear": (0, 1, 2), "addmm": (1, 2, 0), "mm": (0, 1, None), "matmul": (0, 1, None), "bmm": (0, 1, None)}
_FACTORS |= dict.fromkeys(("grouped_mm", "grouped_mm_fallback", "_grouped_mm"), (0, 1, None))
"""Where a product takes the activation, the parameter and the bias."""


def shard(tensor: torch.Tensor, division: Division, rank: int, size: int) -> torch.Tensor:
    """One process's part of a parameter."""
    if division.role == "replicated":
        return tensor
    parts = tensor.split(list(division.parts or (tensor.shape[division.dim],)), division.dim)
    assert division.units % size == 0
    return torch.cat([part.chunk(size, division.dim)[rank] for part in parts], division.dim)


class Processes:
    """So many processes, with one set of weights."""

    def __init__(self, exported: Exported, divided: Mapping[str, Division], size: int) -> None:
        self.exported, self.divided, self.size = exported, divided, size
        self.sums = 0
        self._divisions: dict[fx.Node, Division] = {}

    def run(self, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> Values:
        """What the first result is on every process."""
        program = self.exported.program
        given = iter(inputs)
        values: dict[fx.Node, Values] = {}
        for node in program.graph.find_nodes(op="placeholder"):
            name = self.exported.parameters.get(node)
            if name is not None:
                self._divisions[node] = self.divided[name]
                values[node] = [shard(weights[name], self.divided[name], r, self.size) for r in range(self.size)]
            elif node.name in program.graph_signature.inputs_to_buffers:
                values[node] = [weights[program.graph_signature.inputs_to_buffers[node.name]]] * self.size
            elif isinstance(node.meta.get("val"), torch.Tensor):
                values[node] = [next(given)] * self.size
        results: Values = self._walk(program.graph, values)[0]
        return results

    def _walk(self, graph: fx.Graph, values: dict[fx.Node, Values]) -> list[Values]:
        for node in graph.nodes:
            if node.op == "output":
                results = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
                return [values[each] for each in results if isinstance(each, fx.Node)]
            if node.op == "get_attr":
                constant = getattr(graph.owning_module, node.target, None)
                values[node] = [constant] * self.size
            if node.op != "call_function" or node.meta.get("val") is None:
                continue
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                inner = next(values[arg][0] for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr")
                places = inner.graph.find_nodes(op="placeholder")
                arguments = [values[arg] for arg in node.args[-len(places) :]]
                results = self._walk(inner.graph, dict(zip(places, arguments, strict=True)))
                values[node] = [[result[rank] for result in results] for rank in range(self.size)]
                continue
            values[node] = self._call(node, values)
            self._follow(node)
        raise AssertionError("no output")

    def _follow(self, node: fx.Node) -> None:
        """A transposed parameter is divided as the parameter is."""
        sources = node.all_input_nodes
        if sources and all(source in self._divisions for source in sources):
            self._divisions[node] = self._divisions[sources[0]]

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Values]) -> Values:
        def local(rank: int) -> tuple[list[Any], dict[str, Any]]:
            args = list(fx.map_arg(node.args, lambda each: values[each][rank]))
            kwargs = dict(fx.map_arg(node.kwargs, lambda each: values[each][rank]))
            on_cpu = [torch.device("cpu") if isinstance(arg, torch.device) else arg for arg in args]
            return on_cpu, {**kwargs, **({"device": "cpu"} if "device" in kwargs else {})}

        if node.target is operator.getitem:
            return [local(rank)[0][0][node.args[1]] for rank in range(self.size)]
        name = operator_name(node.target)
        places = _FACTORS.get(name)
        division = self._divisions.get(node.args[places[1]]) if places else None  # type: ignore[arg-type, call-overload]
        if places and division is not None and division.role == "row":
            return self._reduced(node, places, [local(rank) for rank in range(self.size)])
        if name == "embedding" and self._divisions[node.args[0]].role == "vocabulary":  # type: ignore[index]
            return self._sum([_own_rows(*local(rank)[0][:2], rank) for rank in range(self.size)])
        return [self._one(node, name, *local(rank), rank) for rank in range(self.size)]

    def _sum(self, partial: Values) -> Values:
        self.sums += 1
        return [sum(partial) for _ in partial]  # a tensor of its own for each: it may be written into

    def _reduced(self, node: fx.Node, places: Any, calls: Sequence[tuple[list[Any], dict[str, Any]]]) -> Values:
        """A product whose contraction is divided: the processes' results are summed, the bias is added once."""
        x, weight, bias = places
        partial, biases = [], []
        for args, kwargs in calls:
            biases.append(args[bias] if bias is not None and bias < len(args) else None)
            if operator_name(node.target) == "linear":
                partial.append(args[x] @ args[weight].mT)
            else:
                factors = [args[x], args[weight]]
                product: Any = torch.mm if bias is not None else node.target
                partial.append(product(*factors, *(args[2:] if bias is None else ()), **kwargs))
        return [total if b is None else total + b for total, b in zip(self._sum(partial), biases, strict=True)]

    def _one(self, node: fx.Node, name: str, args: list[Any], kwargs: dict[str, Any], rank: int) -> Any:
        source = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
        shape = tuple(source.shape) if isinstance(source, torch.Tensor) else ()
        target: Any = node.target
        if name in ("dropout", "_assert_tensor_metadata"):
            return args[0]
        if shape and tuple(args[0].shape) != shape:
            args = _shrunk(name, args, shape, tuple(node.meta["val"].shape) if name in _VIEWS else ())
        if name == "scaled_dot_product_attention":
            args, kwargs = _scattered_mask(args[:4] + [0.0 for _ in args[4:5]] + args[5:], kwargs, rank)
        if name == "copy":
            args[1] = _own_part(args[1], args[0].shape, rank)
        if name == "histc":  # of integers only on CUDA
            args[0] = args[0].float()
        return target(*args, **kwargs)


_VIEWS = ("view", "reshape", "_unsafe_view", "expand", "new_empty")


def _scattered_mask(args: list[Any], kwargs: dict[str, Any], rank: int) -> tuple[list[Any], dict[str, Any]]:
    """Each process takes its own heads of a bias that has one for each head (T5), which comes without dropout."""
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    heads = args[0].shape[1]
    if mask is None or mask.dim() < 4 or mask.shape[1] in (1, heads):
        return args, kwargs
    rest = {name: value for name, value in kwargs.items() if name != "attn_mask"}
    return [*args[:3], mask[:, rank * heads : (rank + 1) * heads]], rest


def _own_part(source: torch.Tensor, shape: Sequence[int], rank: int) -> torch.Tensor:
    """What a process writes of a replicated tensor into its part of a divided one."""
    for at, size in enumerate(shape):
        if source.shape[at] > max(1, size):
            source = source.narrow(at, rank * size, size)
    return source


def _own_rows(table: torch.Tensor, indices: torch.Tensor, rank: int) -> torch.Tensor:
    """The rows that a process has, and zeros for the others."""
    rows = len(table)
    mine = (indices >= rank * rows) & (indices < (rank + 1) * rows)
    return table[torch.where(mine, indices - rank * rows, 0)] * mine[..., None]


def _shrunk(name: str, args: list[Any], shape: Sequence[int], result: Sequence[int]) -> list[Any]:
    """The arguments of an operator whose first operand has one dimension of `shape` divided."""
    x = args[0]
    (place,) = [at for at, size in enumerate(shape) if x.shape[at] != size]
    ratio = shape[place] // x.shape[place]
    if name in ("view", "reshape", "_unsafe_view"):
        return [x, _divided_view(shape, result, place, ratio)]
    if name in ("expand", "new_empty"):
        at = place + len(result) - x.dim()
        return [x, [*result[:at], result[at] // ratio, *result[at + 1 :]]]
    if name in ("split", "split_with_sizes") and (args[2] if len(args) > 2 else 0) % x.dim() == place:
        sizes = args[1]
        return [x, sizes // ratio if isinstance(sizes, int) else [size // ratio for size in sizes], *args[2:]]
    if name == "slice" and args[1] % x.dim() == place:
        ratio = ratio if len(args) < 5 or args[4] == 1 else 1
        ends = [value // ratio if isinstance(value, int) and abs(value) < 2**40 else value for value in args[2:4]]
        return [x, args[1], *ends, *args[4:]]
    return args


def _divided_view(shape: Sequence[int], result: Sequence[int], place: int, ratio: int) -> list[int]:
    """The sizes of a view when one dimension of its operand is divided: the major dimension of those that it becomes,
    or the one that it is a part of."""
    before = prod(shape[:place])
    done = 1
    for at, size in enumerate(result):
        if size != 1 and done * size > before:
            return [*result[:at], size // ratio, *result[at + 1 :]]
        done *= size
    raise AssertionError("no dimension to divide")
