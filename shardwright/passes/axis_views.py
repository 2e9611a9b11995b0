"""What operators that move entries say about axes: views, concatenations, parts, look-ups ([Note: axes])."""

from __future__ import annotations

import torch
from torch import fx

from shardwright.passes.axes import (
    Axis,
    concatenation,
    cut,
    need_whole,
    new,
    pick,
    reshape,
    size_of,
    unify,
)
from shardwright.passes.axis_calls import Call, Lookup, Result, aligned, places_of


def fresh(call: Call) -> Result:
    """Nothing is known of the result."""
    value = call.node.meta["val"]
    if isinstance(value, torch.Tensor):
        return [new(size) for size in value.shape]
    return tuple([new(size) for size in shape] for shape in call.shapes())


def view(call: Call) -> Result:
    """The same entries in the same order."""
    return reshape(call.first(), call.shape())


def permute(call: Call) -> Result:
    """Dimensions in another order."""
    dims = call.first()
    return [dims[place] for place in call.arguments["dims"]]


def transpose(call: Call) -> Result:
    """Two dimensions change places."""
    dims = list(call.first())
    a, b = (call.arguments.get(name, default) for name, default in (("dim0", 0), ("dim1", 1)))
    if len(dims) > 1:
        dims[a], dims[b] = dims[b], dims[a]
    return dims


def mirrored(call: Call) -> Result:
    """The dimensions in reverse, or the last two of them."""
    dims = call.first()
    return [*dims[:-2], *reversed(dims[-2:])] if call.name in ("mT", "matrix_H") else list(reversed(dims))


def movedim(call: Call) -> Result:
    """Some dimensions go elsewhere, the others stay in order."""
    dims = call.first()
    sources, targets = (
        [place % len(dims) for place in ([value] if isinstance(value, int) else value)]
        for value in (call.arguments["source"], call.arguments["destination"])
    )
    rest = iter([axes for place, axes in enumerate(dims) if place not in sources])
    return [dims[sources[targets.index(at)]] if at in targets else next(rest) for at in range(len(dims))]


def expand(call: Call) -> Result:
    """Dimensions of size 1 are stretched."""
    return aligned([call.first()], call.shape())


def repeat(call: Call) -> Result:
    """The whole tensor several times in a row."""
    dims, shape = call.first(), call.shape()
    dims = [*([] for _ in range(len(shape) - len(dims))), *dims]
    return [[*new(size // size_of(axes)), *axes] for axes, size in zip(dims, shape, strict=True)]


def repeat_interleave(call: Call) -> Result:
    """Every entry of one dimension several times in a row."""
    dims, times, place = call.first(), call.arguments["repeats"], call.arguments.get("dim")
    if not isinstance(times, int) or place is None:
        for axes in dims:
            need_whole(axes)
        return fresh(call)
    place %= len(dims)
    return [[*axes, *new(times)] if at == place else axes for at, axes in enumerate(dims)]


def cat(call: Call) -> Result:
    """One dimension after the other."""
    tensors = [dims for dims in call.tensors_of("tensors") if [size_of(axes) for axes in dims] != [0]]
    place = places_of(tensors[0], call.arguments.get("dim", 0))[0]
    result = list(tensors[0])
    for dims in tensors[1:]:
        for at, axes in enumerate(dims):
            if at != place:
                unify(result[at], axes)
    result[place] = concatenation([dims[place] for dims in tensors])
    return result


def stack(call: Call) -> Result:
    """A new dimension that counts the tensors."""
    tensors = call.tensors_of("tensors")
    result = aligned(tensors, [size_of(axes) for axes in tensors[0]])
    place = call.arguments.get("dim", 0) % (len(result) + 1)
    result.insert(place, [Axis(len(tensors), whole=True)] if len(tensors) != 1 else [])
    return result


def split(call: Call) -> Result:
    """One dimension in consecutive parts."""
    dims = call.first()
    place = call.arguments.get("dim", 0) % len(dims)
    results, start = [], 0
    for shape in call.shapes():
        part = cut(dims[place], start, start + shape[place])
        results.append([part if at == place else axes for at, axes in enumerate(dims)])
        start += shape[place]
    return tuple(results)


def sliced(call: Call) -> Result:
    """A range of one dimension, or every n-th entry of it."""
    dims = list(call.first())
    place = call.arguments.get("dim", 0) % len(dims)
    size, length = size_of(dims[place]), call.shape()[place]
    step, start = call.arguments.get("step", 1), call.arguments.get("start") or 0
    start = max(0, start + size if start < 0 else start)
    if step == 1:
        dims[place] = cut(dims[place], start, start + length)
    elif size % step == 0 and size // step == length:
        dims[place], within = reshape([dims[place]], [length, step])
        pick(within)
    else:
        need_whole(dims[place])
        dims[place] = [Axis(length, whole=True)]
    return dims


def select(call: Call) -> Result:
    """One entry of one dimension."""
    dims = list(call.first())
    pick(dims.pop(call.arguments["dim"] % len(dims)))
    return dims


def unbind(call: Call) -> Result:
    """The entries of one dimension, each on its own."""
    dims = list(call.first())
    axes = dims.pop(call.arguments.get("dim", 0) % len(dims))
    pick(axes)
    return tuple(list(dims) for _ in range(size_of(axes)))


def glu(call: Call) -> Result:
    """One half of a dimension times a function of the other half."""
    dims = list(call.first())
    place = call.arguments.get("dim", -1) % len(dims)
    half = size_of(dims[place]) // 2
    first, second = cut(dims[place], 0, half), cut(dims[place], half, 2 * half)
    unify(first, second)
    dims[place] = first
    return dims


def index(call: Call) -> Result:
    """Entries that tensors of indices choose; in a parameter, by tokens, rows of a table."""
    dims, indices = call.first(), call.arguments["indices"]
    at = [place for place, index in enumerate(indices) if index is not None]
    nodes = [indices[place] for place in at]
    chosen = [found for node in nodes if isinstance(found := call.found.dims[node], list)]
    if at == [0] and call.is_weight("self") and nodes[0] in call.found.tokens:
        call.found.lookups.append(Lookup(call.found.weights[call.arguments["self"]], dims, tokens=True))
    else:
        for place in at:
            need_whole(dims[place])
    width = max(len(each) for each in chosen)
    rest = [axes for place, axes in enumerate(dims) if place not in at]
    adjacent = at == list(range(at[0], at[0] + len(at)))
    before = at[0] if adjacent else 0
    shape = call.shape()[before : before + width]
    return [*rest[:before], *aligned(chosen, shape), *rest[before:]]


def embedding(call: Call) -> Result:
    """Rows of a table."""
    table = call.dims("weight")
    if call.is_weight("weight"):
        parameter, tokens = call.found.weights[call.arguments["weight"]], call.arguments["indices"] in call.found.tokens
        call.found.lookups.append(Lookup(parameter, table, tokens))
    return [*call.dims("indices"), *table[1:]]


def along_index(call: Call) -> Result:
    """gather, scatter, index_add and their like: entries of one dimension are chosen by an index."""
    dims = call.first()
    if call.name == "index_put":
        places = [place for place, index in enumerate(call.arguments["indices"]) if index is not None]
    else:
        places = places_of(dims, call.arguments["dim"])
    for place in places:
        need_whole(dims[place])
    names = ("index", "src", "source", "values") if "gather" not in call.name else ("index",)
    for other in (call.arguments.get(name) for name in names):
        found = call.found.dims.get(other) if isinstance(other, fx.Node) else None
        for back, axes in enumerate(reversed(found if isinstance(found, list) else []), 1):
            place = len(dims) - back
            if place >= 0 and place not in places and size_of(axes) == size_of(dims[place]):
                unify(dims[place], axes)
    shape = call.shape()
    return [new(shape[at]) if at in places and call.name == "gather" else axes for at, axes in enumerate(dims)]


def index_select(call: Call) -> Result:
    """Entries of one dimension."""
    dims = list(call.first())
    place = call.arguments["dim"] % len(dims)
    need_whole(dims[place])
    dims[place] = new(call.shape()[place])
    return dims
