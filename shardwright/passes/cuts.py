"""Places where a model without repeated blocks could be divided into stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import networkx as nx

from shardwright.schemas.profile import Cut

_NO_BLOCKS = "stages begin and end at repeated blocks, and the model has none"


def live_sets(graph: nx.DiGraph[str]) -> dict[str, tuple[int, int]]:
    """Number and bytes of the activations alive after each operator of a model's graph, in order: those that depend on
    parameters and are used later. Views count for the storage that they lie in, as large as the largest of them."""
    order = [name for name, kind in graph.nodes(data="kind") if kind == "operator"]
    position = {name: at for at, name in enumerate(order)}
    sources = [name for name, kind in graph.nodes(data="kind") if kind == "parameter"]
    carried = set().union(*(nx.descendants(graph, name) for name in sources)) & position.keys()
    last_use = {name: max((position.get(user, len(order)) for user in graph[name]), default=-1) for name in carried}
    ending: dict[int, list[str]] = {}
    for name, at in last_use.items():
        ending.setdefault(at, []).append(name)
    alive: dict[str, int] = {}
    result = {}
    for at, name in enumerate(order):
        for gone in ending.get(at, ()):
            alive.pop(gone, None)
        if last_use.get(name, -1) > at:
            alive[name] = graph.nodes[name]["bytes"]
        storages: dict[str, int] = {}
        for each, size in alive.items():
            storage = graph.nodes[each]["storage"]
            storages[storage] = max(min(size, graph.nodes[storage]["bytes"]), storages.get(storage, 0))
        result[name] = (len(storages), sum(storages.values()))
    return result


def inner_cuts(graph: nx.DiGraph[str]) -> tuple[Cut, ...]:
    """Cuts at the ends of modules, where no more bytes are alive than at the ends before and after."""
    alive = live_sets(graph)
    *ends, _ = _module_ends(graph, list(alive)) or [("", "")]
    sizes = [alive[node] for _, node in ends]
    return tuple(
        Cut(after=path, tensors=tensors, bytes=size, refused=_NO_BLOCKS)
        for at, ((path, _), (tensors, size)) in enumerate(zip(ends, sizes, strict=True))
        if tensors and size <= min(other for _, other in sizes[max(0, at - 1) : at + 2])
    )


def _module_ends(graph: nx.DiGraph[str], order: Sequence[str]) -> list[tuple[str, str]]:
    """The modules with parameters that run in one piece, each with its last operator; the outermost of those that end
    together."""
    places: dict[str, list[int]] = {}
    with_parameters: set[str] = set()
    for at, name in enumerate(order):
        for path in _around(graph.nodes[name]["module"]):
            places.setdefault(path, []).append(at)
            if graph.nodes[name]["parameters"]:
                with_parameters.add(path)
    ends: dict[int, str] = {}
    for path, (first, *rest) in places.items():
        last = rest[-1] if rest else first
        if path in with_parameters and last - first == len(rest):
            ends[last] = min(path, ends.get(last, path), key=len)
    return [(ends[at], order[at]) for at in sorted(ends)]


def _around(path: str) -> Iterator[str]:
    parts = path.split(".") if path else []
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])
