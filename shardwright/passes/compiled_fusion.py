"""The kernels that inductor would make of a graph, estimated.

[Note: fused under compile]
As inductor does (`torch/_inductor/lowering.py`, `ir.py`, `scheduler.py` and `codegen/simd.py`, torch 2.13):

1. Matrix products, convolutions, attention, sorts and operators that inductor does not know are kernels of their own.
2. A pointwise result is computed where it is read, as often as it is read, unless a kernel of its own or the graph's
   output needs it, or it is read several times and costs more than 4 reads or 30 operations, or more than 8 reads.
   Constants and ranges are never stored. Results of reductions, scatters and random draws are.
3. What is stored is made by loops, told by the number of results and the elements reduced for each. Two loops that read
   the same tensor, or of which one reads what the other makes, become one kernel if both run over the same (results,
   reduced), or one is pointwise over the results of the other, or over all that it reduces if it reduces the last
   dimensions, and nothing has to run between them. The pairs that share most bytes come first, until none is left.

A kernel reads each tensor once and writes what others need once. Left out: other loop orders that do not fit together
(a transposed read), or that inductor reorders until they do; reductions split in two kernels; reductions of rows and of
columns in one; epilogues fused into matrix products; tensors read again because they do not fit on the chip; limits on
the size of a kernel; parts of a concatenation written apart.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from shardwright.passes import operators
from shardwright.passes.compiled_graph import Value, Values, base_of, is_view

_MAX_READS_IF_REUSED, _MAX_OPERATIONS_IF_REUSED, _MAX_READS = 4, 30, 8
"""`realize_reads_threshold`, `realize_opcount_threshold`, `realize_acc_reads_threshold` (torch/_inductor/config.py)."""
_EXTERN = frozenset(
    {"sort", "topk", "nonzero", "histc", "bincount", "searchsorted", "multinomial", "_fft_r2c", "_fft_c2r"}
)
_SCATTERS = frozenset({"index_add", "index_put", "_unsafe_index_put", "scatter", "scatter_add", "scatter_reduce"})
_GENERATED = ("aten", "prims")
"""Namespaces whose operators inductor makes loops of."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a stored tensor: through a view of it."""

    view: str
    limit: str | None = None
    """The node that reads no more of it than it returns."""

    def bytes(self, values: Values) -> int:
        """Bytes read."""
        (view,) = values.tensors(self.view)
        size = operators.tensor_bytes(view)
        return size if self.limit is None else min(size, sum(map(operators.tensor_bytes, values.tensors(self.limit))))


Reads = dict[Value, frozenset[Reading]]
"""What is read of each stored tensor."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """Loops that run as one kernel, or one operator that is a kernel of its own."""

    nodes: tuple[fx.Node, ...]
    results: int
    reduced: int
    is_by_rows: bool
    """Whether what is reduced lies together: the last dimensions."""
    reads: Reads
    writes: tuple[Value, ...]
    is_extern: bool
    first: int
    """Place in the graph of its first node."""

    def bytes(self, values: Values) -> int:
        """Read plus written, each tensor at most once."""
        read = (
            min(values.storage_bytes(value), sum(one.bytes(values) for one in how)) for value, how in self.reads.items()
        )
        return sum(read) + sum(map(values.storage_bytes, self.writes))


@dataclass
class _Inlined:
    """A pointwise result that is not stored: what computing it reads, and the nodes that compute it."""

    reads: Reads = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()

    def add(self, other: _Inlined) -> None:
        """Computing it also takes the other."""
        self.nodes = tuple(dict.fromkeys((*self.nodes, *other.nodes)))
        self.reads = _joined(self.reads, other.reads)


def _joined(a: Reads, b: Reads) -> Reads:
    return {value: a.get(value, frozenset()) | b.get(value, frozenset()) for value in a | b}


@dataclass
class _Lowering:
    """From nodes to loops: rules 1 and 2 of [Note: fused under compile]."""

    inlined: dict[str, _Inlined] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)

    def add(self, index: int, node: fx.Node) -> None:
        """Lowers the next node of the graph."""
        if node.op != "call_function" or node.target is operator.getitem or is_view(node):
            return
        at = _Inlined()
        for operand, reading in _operands(node):
            base = base_of(operand)
            if base is not None:
                at.add(self.inlined.get(base[0]) or _Inlined({base: frozenset({reading})}))
        at.add(_Inlined(nodes=(node,)))
        if not _is_stored(node) and not _is_worth_storing(node, at):
            self.inlined[node.name] = at
            return
        reduced = _reduced(node)
        self.kernels.append(
            Kernel(
                nodes=at.nodes,
                results=_iterations(node) // reduced,
                reduced=reduced,
                is_by_rows=reduced == 1 or _reduces_last(node),
                reads=at.reads,
                writes=tuple((node.name, place) for place, _ in _results(node)),
                is_extern=is_extern(node),
                first=index,
            )
        )


def _is_worth_storing(node: fx.Node, at: _Inlined) -> bool:
    """Rule 2."""
    readers = set(_readers(node))
    if any(reader.op == "output" or is_extern(reader) for reader in readers):
        return True
    is_heavy = len(at.reads) > _MAX_READS_IF_REUSED or len(at.nodes) > _MAX_OPERATIONS_IF_REUSED
    return len(at.reads) > _MAX_READS or (len(readers) > 1 and is_heavy)


def kernels_of_graph(graph: fx.Graph) -> list[Kernel]:
    """The kernels in an order in which they can run ([Note: fused under compile])."""
    lowering = _Lowering()
    for index, node in enumerate(graph.nodes):
        lowering.add(index, node)
    fusion = _Fusion(dict(enumerate(lowering.kernels)), Values(graph))
    while fusion.round():
        pass
    kernels = fusion.in_order()
    needed = {base_of(node) for node in graph.output_node().all_input_nodes}.union(*(k.reads for k in kernels))
    return [
        kernel if kernel.is_extern else replace(kernel, writes=tuple(v for v in kernel.writes if v in needed))
        for kernel in kernels
    ]


def _name(node: fx.Node) -> str:
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, OpOverload) else ""


def is_extern(node: fx.Node) -> bool:
    """Rule 1."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if not isinstance(node.target, OpOverload) or node.target.namespace not in _GENERATED:
        return True
    call = operators.operation(node.target)
    return call.formula is not None or call.kind == "attention" or _name(node) in _EXTERN


def _is_reduction(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.reduction in node.target.tags


def _is_stored(node: fx.Node) -> bool:
    random = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return is_extern(node) or _is_reduction(node) or random or _name(node) in _SCATTERS | {"inductor_random"}


def _operands(node: fx.Node) -> Iterator[tuple[fx.Node, Reading]]:
    """The tensors that a node takes, and how it reads them."""
    rows_only = isinstance(node.target, OpOverload) and operators.operation(node.target).reads_rows
    for position, operand in enumerate(node.all_input_nodes):
        if isinstance(operand.meta.get("val"), torch.Tensor):
            yield operand, Reading(operand.name, node.name if rows_only and position == 0 else None)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a node's results, through views."""
    for user in node.users:
        if user.target is operator.getitem or is_view(user):
            yield from _readers(user)
        else:
            yield user


def _results(node: fx.Node) -> list[tuple[int, torch.Tensor]]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [(place, tensor) for place, tensor in enumerate(values) if isinstance(tensor, torch.Tensor)]


def _iterations(node: fx.Node) -> int:
    """Elements that a node's loop runs over."""
    sizes = [tensor.numel() for _, tensor in _results(node)]
    if _is_reduction(node) or _name(node) in _SCATTERS:
        sizes += [operand.meta["val"].numel() for operand, _ in _operands(node)]
    return max(sizes, default=0)


def _reduced(node: fx.Node) -> int:
    """Elements that each result of a reduction takes; 1 for anything else."""
    if not _is_reduction(node):
        return 1
    return max(1, _iterations(node) // max(1, *(tensor.numel() for _, tensor in _results(node))))


def _reduces_last(node: fx.Node) -> bool:
    operand: Any = node.args[0]
    dims: Any = node.args[1] if len(node.args) > 1 else None
    total = operand.meta["val"].dim()
    chosen = {dim % total for dim in ([dims] if isinstance(dims, int) else dims or range(total))}
    return chosen == set(range(total - len(chosen), total))


def _fit_together(a: Kernel, b: Kernel) -> bool:
    """Whether two loops can be one, by what they run over."""
    if a.is_extern or b.is_extern:
        return False
    if (a.reduced > 1 and b.reduced > 1) or a.reduced == b.reduced == 1:
        return (a.results, a.reduced, a.is_by_rows) == (b.results, b.reduced, b.is_by_rows)
    pointwise, reduction = (a, b) if a.reduced == 1 else (b, a)
    rows = reduction.results * reduction.reduced if reduction.is_by_rows else reduction.results
    return pointwise.results in (reduction.results, rows)


@dataclass
class _Fusion:
    """From loops to kernels: rule 3 of [Note: fused under compile]."""

    kernels: dict[int, Kernel]
    values: Values

    def round(self) -> bool:
        """Fuses the pairs there are, those that share most first; whether there was one."""
        merged = {index: index for index in self.kernels}
        found = False
        for _, i, j in sorted(self._pairs()):
            a, b = merged[i], merged[j]
            if a == b or not _fit_together(self.kernels[a], self.kernels[b]):
                continue
            if self._leads_around(a, b) or self._leads_around(b, a):
                continue
            self.kernels[a] = self._fused(self.kernels[a], self.kernels.pop(b))
            merged = {index: a if at == b else at for index, at in merged.items()}
            found = True
        return found

    def _pairs(self) -> Iterator[tuple[int, int, int]]:
        """Kernels that share tensors and fit together, with minus the bytes that they share."""
        touching = {index: {*kernel.reads, *kernel.writes} for index, kernel in self.kernels.items()}
        for i, j in combinations(self.kernels, 2):
            shared = touching[i] & touching[j]
            if shared and _fit_together(self.kernels[i], self.kernels[j]):
                yield -sum(map(self.values.storage_bytes, shared)), i, j

    def _needs(self) -> dict[int, set[int]]:
        maker = {value: index for index, kernel in self.kernels.items() for value in kernel.writes}
        return {
            index: {maker[value] for value in kernel.reads if value in maker} for index, kernel in self.kernels.items()
        }

    def _leads_around(self, start: int, end: int) -> bool:
        """Whether `end` needs `start` by way of another kernel."""
        needs = self._needs()
        todo = [index for index in needs[end] if index != start]
        seen = set(todo)
        while todo:
            for index in needs[todo.pop()] - seen:
                if index == start:
                    return True
                seen.add(index)
                todo.append(index)
        return False

    def _fused(self, a: Kernel, b: Kernel) -> Kernel:
        loops = a if a.reduced >= b.reduced else b
        writes = (*a.writes, *b.writes)
        return Kernel(
            nodes=tuple(dict.fromkeys((*a.nodes, *b.nodes))),
            results=loops.results,
            reduced=loops.reduced,
            is_by_rows=loops.is_by_rows,
            reads={value: how for value, how in _joined(a.reads, b.reads).items() if value not in writes},
            writes=writes,
            is_extern=False,
            first=min(a.first, b.first),
        )

    def in_order(self) -> list[Kernel]:
        """The kernels, each after those it needs, else as in the graph."""
        needs = self._needs()
        ready = [(self.kernels[index].first, index) for index, needed in needs.items() if not needed]
        heapq.heapify(ready)
        ordered = []
        while ready:
            _, done = heapq.heappop(ready)
            ordered.append(self.kernels[done])
            for index, needed in needs.items():
                if done in needed:
                    needed.remove(done)
                    if not needed:
                        heapq.heappush(ready, (self.kernels[index].first, index))
        return ordered
