"""What every operator says about the axes of its operands and results ([Note: axes])."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from shardwright.passes import axis_views as views
from shardwright.passes.axes import Axes, Axis, Dims, need_whole, reshape, size_of, unify
from shardwright.passes.axis_calls import Call, Product, Result, aligned, all_whole, operator_name, places_of


def elementwise(call: Call) -> Result:
    """Every entry on its own."""
    return aligned(call.tensors(), call.shape())


def _along(call: Call) -> Result:
    """Entries along one dimension meet, and stay as many: softmax, cumulative sums."""
    dims = call.first()
    for place in places_of(dims, call.arguments.get("dims", call.arguments.get("dim", -1))):
        need_whole(dims[place])
    outputs = [list(dims) for _ in call.shapes()] if isinstance(call.node.meta["val"], list | tuple) else None
    return dims if outputs is None else tuple(outputs)


def _topk(call: Call) -> Result:
    dims = call.first()
    (place,) = places_of(dims, call.arguments.get("dim", -1))
    need_whole(dims[place])
    result = [[Axis(int(call.arguments["k"]), whole=True)] if at == place else axes for at, axes in enumerate(dims)]
    return result, result


def _reduce(call: Call) -> Result:
    dims = call.first()
    places = places_of(dims, call.arguments.get("dim"))
    for place in places:
        need_whole(dims[place])
    keep = bool(call.arguments.get("keepdim", False))
    result: Dims = [[] if at in places else axes for at, axes in enumerate(dims) if keep or at not in places]
    several = isinstance(call.node.meta["val"], list | tuple)
    return tuple(list(result) for _ in call.shapes()) if several else result


def _multiply(call: Call, left: str, right: str) -> Dims:
    """The matrix product of two arguments, as `torch.matmul` defines it for two or more dimensions each."""
    a, b = call.dims(left), call.dims(right)
    unify(a[-1], b[-2])
    batch = aligned([a[:-2], b[:-2]], call.shape()[:-2])
    weights = [call.is_weight(name) for name in (left, right)]
    if weights[0] == weights[1]:
        for axes in (a[-1], b[-2], a[-2], b[-1]):
            need_whole(axes)
    elif weights[1]:
        call.note_product(right, b[-2], b[-1])
    else:
        call.note_product(left, a[-1], a[-2])
    return [*batch, a[-2], b[-1]]


def _matmul(call: Call) -> Result:
    left, right = list(call.arguments)[:2]
    if min(len(call.dims(left)), len(call.dims(right))) >= 2:
        return _multiply(call, left, right)
    for name in (left, right):
        for axes in call.dims(name):
            need_whole(axes)
    return all_whole(call.shape())


def _added_product(call: Call) -> Result:
    """addmm, baddbmm: the first argument is added to the product of the two others."""
    left, right = list(call.arguments)[1:3]
    return aligned([_multiply(call, left, right), call.first()], call.shape())


def _linear(call: Call) -> Result:
    x, weight = call.dims("input"), call.dims("weight")
    contracted, free = weight[-1], weight[0]
    unify(x[-1], contracted)
    if call.is_weight("weight") and not call.is_weight("input"):
        call.note_product("weight", contracted, free)
    else:
        for axes in (contracted, free, *x[:-1]):
            need_whole(axes)
    if call.arguments.get("bias") is not None:
        unify(free, call.dims("bias")[0])
    return [*x[:-1], free]


def _grouped(call: Call) -> Result:
    """Rows in groups, each times a matrix of its own: (rows, in) x (groups, in, out)."""
    left, right = list(call.arguments)[:2]
    a, b = call.dims(left), call.dims(right)
    if len(a) != 2 or len(b) != 3:
        return _multiply(call, left, right)
    unify(a[-1], b[-2])
    need_whole(b[0])
    call.note_product(right, b[-2], b[-1])
    return [a[0], b[-1]]


def _einsum(call: Call) -> Result:
    equation = call.arguments["equation"].replace(" ", "")
    tensors = call.tensors_of("tensors")
    if "." in equation or "->" not in equation or len(tensors) > 2:
        raise NotImplementedError
    inputs, output = equation.split("->")
    letters: dict[str, list[Axes]] = {}
    for word, dims in zip(inputs.split(","), tensors, strict=True):
        for letter, axes in zip(word, dims, strict=True):
            letters.setdefault(letter, []).append(axes)
    for same in letters.values():
        for axes in same[1:]:
            unify(same[0], axes)
    weights = [node in call.found.weights for node in call.arguments["tensors"]]
    if len(tensors) == 2 and weights[0] != weights[1]:
        word = inputs.split(",")[weights.index(True)]
        dims = tensors[weights.index(True)]
        summed = [axis for letter, axes in zip(word, dims, strict=True) if letter not in output for axis in axes]
        kept = [axis for letter, axes in zip(word, dims, strict=True) if letter in output for axis in axes]
        weight = call.arguments["tensors"][weights.index(True)]
        call.found.products.append(Product(call.found.weights[weight], summed, kept, call.node))
        meeting = [letter for letter in letters if letter not in output and len(letters[letter]) == 1]
    else:
        meeting = [letter for letter in letters if letter not in output or len(letters[letter]) == 1]
    for letter in meeting:
        need_whole(letters[letter][0])
    return [letters[letter][0] for letter in output]


def _attention(call: Call) -> Result:
    """Products of activations: only heads and batch entries stay apart. Several query heads may share a key head."""
    query, key, value = (call.dims(name) for name in ("query", "key", "value"))
    for axes in (query[-1], query[-2], key[-1], key[-2], value[-1], value[-2]):
        need_whole(axes)
    for other in (key, value):
        for mine, theirs in zip(query[:-2], other[:-2], strict=True):
            wide, narrow = size_of(mine), size_of(theirs)
            if wide == narrow:
                unify(mine, theirs)
            elif wide % narrow == 0 and narrow > 1:
                unify(reshape([mine], [narrow, wide // narrow])[0], theirs)
    mask = call.arguments.get("attn_mask")
    if isinstance(mask, fx.Node):
        aligned([[*query[:-1], key[-2]], call.dims("attn_mask")], [size_of(axes) for axes in (*query[:-1], key[-2])])
    return [*query[:-1], value[-1]]


def _normalise_last(call: Call) -> Result:
    """layer_norm, rms_norm: over the last dimensions."""
    dims = call.first()
    count = len(call.arguments["normalized_shape"])
    for axes in dims[-count:]:
        need_whole(axes)
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            aligned([dims, call.dims(name)], [size_of(axes) for axes in dims])
    return dims


def _normalise_channels(call: Call) -> Result:
    """batch_norm: every channel over everything else. group_norm: neighbouring channels together."""
    dims = call.first()
    for at, axes in enumerate(dims):
        if at != 1 or call.name != "batch_norm":
            need_whole(axes)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.arguments.get(name) is not None:
            unify(dims[1], call.dims(name)[0])
    return dims


def _convolution(call: Call) -> Result:
    """Convolutions, pooling, interpolation: never divided here, but by batch entries."""
    dims = call.tensors()
    for axes in [axes for each in dims for axes in each]:
        need_whole(axes)
    return all_whole(call.shape())


def _cross_entropy(call: Call) -> Result:
    """Each process can hold some of the classes, and sum over the others' exponentials (Shoeybi et al.,
    arXiv 1909.08053, section 3)."""
    dims = call.first()
    call.found.classes.append(dims[1] if len(dims) > 1 else dims[0])
    return all_whole(call.shape())


def _as_complex(call: Call) -> Result:
    *dims, pair = call.first()
    need_whole(pair)
    return dims


def _as_real(call: Call) -> Result:
    return [*call.first(), [Axis(2, whole=True)]]


Rule = Callable[[Call], Result]
_TABLE: dict[Rule, str] = {
    elementwise: (
        "to _to_copy contiguous clone dropout alias detach copy type_as bernoulli feature_dropout "
        "alpha_dropout zeros_like ones_like full_like empty_like rand_like randn_like lift_fresh log_sigmoid hardswish "
        "subtract multiply divide floor_divide __and__ __or__ __xor__ tril triu nan_to_num expand_as "
        "float softsign where masked_fill fill zero clip square prelu threshold relu6"
    ),
    views.fresh: (
        "arange zeros ones full empty eye rand randn randint new_zeros new_ones new_full new_empty scalar_tensor "
        "linspace one_hot histc bincount tril_indices triu_indices"
    ),
    _along: (
        "softmax _softmax _safe_softmax log_softmax _log_softmax cumsum cumprod logcumsumexp sort argsort flip roll"
    ),
    _topk: "topk",
    _reduce: (
        "mean sum amax amin max min argmax argmin var std var_mean std_mean norm linalg_vector_norm prod logsumexp "
        "any all"
    ),
    views.view: "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as",
    views.permute: "permute",
    views.transpose: "transpose t swapaxes swapdims",
    views.mirrored: "numpy_T mT matrix_H",
    views.movedim: "movedim moveaxis",
    views.expand: "expand broadcast_to",
    views.repeat: "repeat tile",
    views.repeat_interleave: "repeat_interleave",
    views.cat: "cat concat concatenate",
    views.stack: "stack",
    views.split: "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk unsafe_split_with_sizes",
    views.sliced: "slice narrow",
    views.select: "select",
    views.unbind: "unbind",
    views.glu: "glu",
    views.index: "index",
    views.embedding: "embedding",
    views.along_index: "gather scatter scatter_add index_add index_copy index_put",
    views.index_select: "index_select",
    _matmul: "matmul mm bmm",
    _added_product: "addmm baddbmm",
    _linear: "linear",
    _grouped: "_grouped_mm grouped_mm grouped_mm_fallback",
    _einsum: "einsum",
    _attention: "scaled_dot_product_attention",
    _normalise_last: "layer_norm rms_norm _fused_rms_norm",
    _normalise_channels: "batch_norm group_norm instance_norm",
    _convolution: (
        "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d "
        "max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_bilinear2d pad constant_pad_nd pixel_shuffle unfold"
    ),
    _cross_entropy: "cross_entropy_loss",
    _as_complex: "view_as_complex",
    _as_real: "view_as_real",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _TABLE.items() for name in names.split()}
"""By the operator's name, without the overload and the underscore of what works in place."""

_MOVES = (
    "to _to_copy contiguous clone alias detach copy view reshape flatten unflatten squeeze unsqueeze expand slice "
    "select cat where masked_fill slice_scatter select_scatter clamp index"
)
MOVES_TOKENS = frozenset(_MOVES.split())
"""Operators whose results are values of their operands, or constants: token ids stay token ids."""


def rule_of(target: Any) -> Rule | None:
    """What an operator says, or None where nobody knows."""
    return elementwise if torch.Tag.pointwise in target.tags else RULES.get(operator_name(target))
