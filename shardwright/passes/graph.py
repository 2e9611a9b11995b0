"""The model as a graph, by `torch.export` (non-strict) on the meta device, of the model with one block of each kind.

Blocks that are equal to an earlier one in the same list are left out. Where forward does not work without them, because
it counts its blocks (a U-Net pairs those that go down with those that go up), nothing is left out.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import networkx as nx
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from shardwright.passes.axis_walk import module_of, operator_label, writes, written_into
from shardwright.passes.build import Built
from shardwright.passes.contract import Contract
from shardwright.passes.step_run import EMBEDDING, HEAD
from shardwright.passes.tensor_parallel import Analysis, Division, Override, divisions

MOST_BLOCKS = 64
"""More blocks than this are not exported: it takes a fifth of a second for each."""


@dataclass(frozen=True, slots=True)
class Exported:
    """The graph of a model, and whose its nodes are."""

    program: ExportedProgram
    blocks: Mapping[str, str]
    """Paths of the blocks in the graph to their paths in the model, in order of execution."""
    parameters: Mapping[fx.Node, str]
    """Nodes of the parameters to their names in the model; tied ones have one name."""

    def path(self, path: str) -> str:
        """A module's path in the model."""
        own = next((block for block in self.blocks if path == block or path.startswith(f"{block}.")), None)
        return path if own is None else self.blocks[own] + path.removeprefix(own)


def export(built: Built, contract: Contract, like: Mapping[str, str]) -> Exported:
    """The graph of a model. `like` maps every block, in order of execution, to the first one that is equal to it.
    Raises whatever `torch.export` raises for a model that it cannot trace, and ValueError for too many blocks."""
    blocks = list(like)
    kept = [path for path in blocks if like[path] == path or not _is_numbered(built.module, path)]
    if len(kept) > MOST_BLOCKS:
        raise ValueError(f"it has {len(kept)} blocks of which none stands for another, and {MOST_BLOCKS} are the limit")
    try:
        return _export(built, contract, blocks, kept)
    except Exception:  # errors of the user's forward have no common class
        if len(kept) == len(blocks) or len(blocks) > MOST_BLOCKS:
            raise
        return _export(built, contract, blocks, blocks)


def _is_numbered(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path.rpartition(".")[0]), nn.ModuleList | nn.Sequential)


def _export(built: Built, contract: Contract, blocks: Sequence[str], kept: Sequence[str]) -> Exported:
    names: dict[int, str] = {}
    for name, parameter in built.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    with _without(built.module, set(blocks) - set(kept)) as paths:
        short = {name: names[id(p)] for name, p in built.module.named_parameters(remove_duplicate=False)}
        quiet = contextlib.redirect_stdout(sys.stderr)
        with torch.device("meta"), quiet, warnings.catch_warnings(action="ignore"), _lean():
            args, kwargs = contract.arguments(contract.batch(1))
            program = torch.export.export(built.module, args, kwargs, strict=False)
    signature = program.graph_signature.inputs_to_parameters
    inputs = program.graph.find_nodes(op="placeholder")
    return Exported(
        program,
        {paths.get(path, path): path for path in kept},
        {node: short[signature[node.name]] for node in inputs if node.name in signature},
    )


@contextlib.contextmanager
def _lean() -> Iterator[None]:
    """Without what nobody reads, a third of the time: the Python code of a dozen graph modules that export makes on its
    way is generated when it is called for, and nodes do not record their stack traces."""
    before = fx.config.do_not_emit_stack_traces
    fx.config.do_not_emit_stack_traces = True
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        fx.config.do_not_emit_stack_traces = before


@contextlib.contextmanager
def _without(model: nn.Module, dropped: set[str]) -> Iterator[dict[str, str]]:
    """The model without these entries of its lists, for a while. Yields where the entries behind them are meanwhile."""
    before = {path: dict(model.get_submodule(path)._modules) for path in {p.rpartition(".")[0] for p in dropped}}
    moved = {}
    try:
        for path, children in before.items():
            registry = model.get_submodule(path)._modules
            registry.clear()
            prefix = f"{path}." if path else ""
            for name, child in children.items():
                if f"{prefix}{name}" not in dropped:
                    number = str(len(registry)) if name.isdigit() else name
                    moved[f"{prefix}{name}"] = f"{prefix}{number}"
                    registry[number] = child
        yield moved
    finally:
        for path, children in before.items():
            registry = model.get_submodule(path)._modules
            registry.clear()
            registry.update(children)


def divide(
    exported: Exported, *, next_token: bool, overrides: Mapping[str, Override] | None = None
) -> dict[str, Division]:
    """How tensor parallelism would divide every parameter in the graph. With `next_token` the loss is the cross-entropy
    of the logits that forward returns; `overrides` gives modules, by patterns of their paths, a role."""
    return analyse(exported, next_token=next_token, overrides=overrides).divisions


def analyse(exported: Exported, *, next_token: bool, overrides: Mapping[str, Override] | None = None) -> Analysis:
    """The same, with the dataflow that it follows from."""
    program = exported.program
    users = set(program.graph_signature.user_inputs)
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name in users]
    logits = logits_of(program) if next_token else ()
    roles = _roles(exported, overrides or {})
    return divisions(program.graph, exported.parameters, inputs, logits, exported.path, roles)


def _roles(exported: Exported, overrides: Mapping[str, Override]) -> dict[str, Override]:
    """The role that the job gives a parameter: that of the first pattern that its module matches."""
    found: dict[str, Override] = {}
    for name in exported.parameters.values():
        module = name.rpartition(".")[0]
        patterns = [pattern for pattern in overrides if fnmatchcase(module, pattern)]
        if patterns:
            found[name] = overrides[patterns[0]]
    return found


def logits_of(program: ExportedProgram) -> Iterator[fx.Node]:
    """The result that `loss: next_token` is computed of ([Note: model contract])."""
    (output,) = program.graph.find_nodes(op="output")
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    results: Any = output.args[0]
    leaves = [node for node, kind in zip(results, kinds, strict=True) if kind == OutputKind.USER_OUTPUT]
    value = pytree.tree_unflatten(leaves, program.call_spec.out_spec)
    node = getattr(value, "logits", value)
    if isinstance(node, fx.Node):
        yield node


def make_graph(exported: Exported) -> nx.DiGraph[str]:
    """The graph as networkx has it. Nodes are named as in the exported graph, in order of execution, with these
    attributes:

    - `kind`: `parameter`, `buffer`, `input`, `constant`, `operator` or `output`
    - `operator`: `aten.linear`; empty for what is no operator
    - `module`: path of the innermost module that calls it
    - `unit`: `embedding`, a block's path, or `head`; empty for what is no operator. What runs between two blocks
      belongs to the later one
    - `bytes`: of the result at micro-batch 1
    - `storage`: the node that made the storage in which the result lies
    - `parameters`: names of the parameters that it takes

    Edges lead from what a node takes to the node. A tied parameter is one node; what writes in place comes before
    everything that reads the same storage after it."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    representative, units = _one_of_each(exported.parameters), _units(exported)
    kinds = _input_kinds(exported)
    last_write: dict[str, str] = {}
    for node in exported.program.graph.nodes:
        calls = node.op == "call_function"
        tied = node in exported.parameters and representative[exported.parameters[node]] is not node
        if tied or (calls and node.meta.get("val") is None):
            continue
        sources = [representative.get(exported.parameters.get(each, ""), each) for each in node.all_input_nodes]
        base = _base(node) if calls else None
        graph.add_node(
            node.name,
            kind="operator" if calls else kinds.get(node.name, "output" if node.op == "output" else "constant"),
            operator=operator_label(node) if calls else "",
            module=exported.path(module_of(node)),
            unit=units.get(node, ""),
            bytes=_bytes(node),
            storage=node.name if base is None else graph.nodes[sources[0].name]["storage"],
            parameters=tuple(exported.parameters[each] for each in sources if each in exported.parameters),
        )
        for each in sources:
            if each.name in graph:
                graph.add_edge(each.name, node.name)
                written = last_write.get(graph.nodes[each.name]["storage"], node.name)
                if written != node.name:
                    graph.add_edge(written, node.name)
        for each in written_into(node) if calls else ():
            if each.name in graph:
                last_write[graph.nodes[each.name]["storage"]] = node.name
    return graph


def _one_of_each(parameters: Mapping[fx.Node, str]) -> dict[str, fx.Node]:
    result: dict[str, fx.Node] = {}
    for node, name in parameters.items():
        result.setdefault(name, node)
    return result


def _input_kinds(exported: Exported) -> dict[str, str]:
    signature = exported.program.graph_signature
    return {
        **dict.fromkeys(signature.inputs_to_parameters, "parameter"),
        **dict.fromkeys(signature.inputs_to_buffers, "buffer"),
        **dict.fromkeys([name for name in signature.user_inputs if isinstance(name, str)], "input"),
    }


def _units(exported: Exported) -> dict[fx.Node, str]:
    """The unit of every operator: [Note: segments]."""
    calls = [node for node in exported.program.graph.nodes if node.op == "call_function"]
    inside = [_block(node, exported.blocks) for node in calls]
    first = next((at for at, block in enumerate(inside) if block is not None), 0)
    units: dict[fx.Node, str] = {}
    later = HEAD
    for at in reversed(range(len(calls))):
        later = inside[at] or later
        units[calls[at]] = EMBEDDING if at < first else later
    return units


def _block(node: fx.Node, blocks: Mapping[str, str]) -> str | None:
    stack = node.meta.get("nn_module_stack") or {}
    paths = {str(entry[0]) for entry in stack.values()}
    return next((block for path, block in blocks.items() if path in paths), None)


def _base(node: fx.Node) -> fx.Node | None:
    """What the result of a view, or of an operator in place, lies in."""
    view = getattr(node.target, "is_view", False) or node.target is operator.getitem
    inner = node.args[0] if (view or writes(node)) and node.args else None
    return inner if isinstance(inner, fx.Node) else None


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
