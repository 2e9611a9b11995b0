"""The model as a graph, and the places between units where it could be divided into pipeline stages.

The graph is that of `torch.export` (non-strict) on the meta device, of the model with no more than two blocks of each
unit. Nodes that depend on no parameter (masks, positions, rotary tables) can be computed by every stage from the batch,
so they are not carried across a cut.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence

import networkx as nx
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from shardwright.passes.build import Built
from shardwright.passes.contract import Contract
from shardwright.passes.step_run import EMBEDDING
from shardwright.schemas.profile import Cut, Unit


def find_cuts(built: Built, contract: Contract, units: Sequence[Unit]) -> tuple[Cut, ...]:
    """A cut after the embedding and after each block. Raises whatever `torch.export` raises for a model that it cannot
    trace."""
    runs = [unit.paths for unit in units if unit.kind == "block"]
    if not runs:
        return ()
    kept = [path for paths in runs for path in {*paths[:1], *paths[-1:]}]
    with _shortened(built.module, kept, [path for paths in runs for path in paths]) as new_paths:
        quiet = contextlib.redirect_stdout(sys.stderr)
        with torch.device("meta"), quiet, warnings.catch_warnings(action="ignore"):
            args, kwargs = contract.arguments(contract.batch(1))
            program = torch.export.export(built.module, args, kwargs, strict=False)
        crossing = _live_sets(program, [new_paths[path] for paths in runs for path in _ends(paths)])
    cuts = [Cut(after=EMBEDDING, tensors=crossing[""][0], bytes=crossing[""][1])]
    for paths in runs:
        inner, last = crossing[new_paths[paths[0]]], crossing[new_paths[paths[-1]]]
        cuts += [Cut(after=path, tensors=inner[0], bytes=inner[1]) for path in paths[:-1]]
        cuts.append(Cut(after=paths[-1], tensors=last[0], bytes=last[1]))
    return tuple(cuts)


def _ends(paths: Sequence[str]) -> list[str]:
    return [paths[0], paths[-1]] if len(paths) > 1 else [paths[0]]


@contextlib.contextmanager
def _shortened(model: nn.Module, kept: Sequence[str], blocks: Sequence[str]) -> Iterator[dict[str, str]]:
    """The model without the blocks that are not kept, for a while. Yields the kept blocks' paths in it."""
    containers = {path.rpartition(".")[0] for path in blocks}
    before = {path: dict(model.get_submodule(path)._modules) for path in containers}
    dropped = set(blocks) - set(kept)
    new_paths = {}
    try:
        for container, children in before.items():
            registry = model.get_submodule(container)._modules
            registry.clear()
            prefix = f"{container}." if container else ""
            for name, child in children.items():
                if f"{prefix}{name}" not in dropped:
                    new_name = str(len(registry)) if name.isdigit() else name
                    new_paths[f"{prefix}{name}"] = f"{prefix}{new_name}"
                    registry[new_name] = child
        yield new_paths
    finally:
        for container, children in before.items():
            registry = model.get_submodule(container)._modules
            registry.clear()
            registry.update(children)


def _live_sets(program: ExportedProgram, blocks: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Number and bytes of the activations alive after each block, and (under the empty path) before the first."""
    order = [node for node in program.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    graph = nx.DiGraph((source, user) for source in program.graph.nodes for user in source.users)
    parameters = set(program.graph_signature.inputs_to_parameters)
    sources = [node for node in graph if node.op == "placeholder" and node.name in parameters]
    activations = set().union(*(nx.descendants(graph, source) for source in sources)).intersection(order)
    position = {node: index for index, node in enumerate(order)}
    last_use = {node: max((position.get(user, len(order)) for user in node.users), default=-1) for node in order}

    def after(index: int) -> tuple[int, int]:
        alive = [node for node in order[: index + 1] if node in activations and last_use[node] > index]
        storages: dict[fx.Node, int] = {}
        for node in alive:
            base = _base(node)
            storages[base] = max(storages.get(base, 0), _bytes(node))
        return len(storages), sum(storages.values())

    ends = {path: max(i for i, node in enumerate(order) if _inside(node, path)) for path in blocks}
    start = min(i for i, node in enumerate(order) if any(_inside(node, path) for path in blocks))
    return {"": after(start - 1), **{path: after(end) for path, end in ends.items()}}


def _inside(node: fx.Node, path: str) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    return any(entry[0] == path for entry in stack.values())


def _base(node: fx.Node) -> fx.Node:
    """The node whose storage this one is a view of."""
    while getattr(node.target, "is_view", False) or getattr(node.target, "__name__", "") == "getitem":
        inner = node.args[0]
        if not isinstance(inner, fx.Node):
            break
        node = inner
    return node


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
