"""Operators that mix the positions of a sequence, or depend on how long it is.

Where a sequence is divided among processes, everything that each of them does on its own part has to work on every
position by itself. The operators that do so for sure are listed; any other one is said to mix positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from shardwright.passes.axis_calls import arguments_of
from shardwright.passes.axis_walk import operator_label
from shardwright.passes.dataflow import Dataflow, operator_name_of, tensors

_ALWAYS_NAMES = (
    "view reshape _unsafe_view flatten unflatten transpose permute t unsqueeze squeeze expand contiguous clone "
    "to _to_copy alias detach dropout linear zeros ones full empty zeros_like ones_like full_like empty_like "
    "new_zeros new_ones new_full new_empty scalar_tensor masked_fill where type_as expand_as view_as reshape_as "
    "lift_fresh copy repeat_interleave embedding bernoulli rand_like randn_like grouped_mm _grouped_mm "
    "grouped_mm_fallback"
)
_ALWAYS = frozenset(_ALWAYS_NAMES.split())
_ALONG_NAMES = (
    "mean sum amax amin max min argmax argmin var std softmax _softmax log_softmax topk gather scatter "
    "scatter_add sort cat concat split split_with_sizes chunk slice select glu cumsum logsumexp norm "
    "linalg_vector_norm any all unbind narrow"
)
_ALONG = frozenset(_ALONG_NAMES.split())
"""These work along one dimension."""
_NORMS = frozenset({"layer_norm", "rms_norm", "_fused_rms_norm"})
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "matmul", "baddbmm", "einsum"})
ATTENTION = "scaled_dot_product_attention"


def mixing(
    flow: Dataflow, nodes: Iterable[fx.Node], length: int, path: Callable[[str], str], *, attention: bool = False
) -> str:
    """The first operator that mixes positions, or may, with its module; empty if none does. `length` is that of a
    sequence; with `attention` fused attention counts as none."""
    for node in nodes:
        name = operator_name_of(node)
        if not name or (attention and name == ATTENTION) or not tensors(node):
            continue
        if not _by_position(flow, node, name, length):
            return f"{operator_label(node)} in module {path(flow.module(node)) or '(the model itself)'}"
    return ""


def _by_position(flow: Dataflow, node: fx.Node, name: str, length: int) -> bool:
    tags: object = getattr(node.target, "tags", ())
    if name in _ALWAYS or (isinstance(tags, list | tuple) and torch.Tag.pointwise in tags):
        return True
    if name in _NORMS:
        return len(arguments_of(node)["normalized_shape"]) == 1
    if name in _PRODUCTS:
        return any(flow.is_weight(operand) for operand in node.all_input_nodes)
    return name in _ALONG and not _along_positions(node, length)


def _along_positions(node: fx.Node, length: int) -> bool:
    """Whether an operator works along another dimension than the last one that counts positions."""
    operands = tensors(node.all_input_nodes[0]) if node.all_input_nodes else []
    if not operands:
        return True
    shape = tuple(operands[0].shape)
    arguments = arguments_of(node)
    wanted = arguments.get("dim", arguments.get("dims", -1 if "dim" not in arguments else None))
    if wanted is None:
        return True
    places = {place % max(1, len(shape)) for place in ([wanted] if isinstance(wanted, int) else wanted)}
    kept = [tuple(each.shape) for each in tensors(node)] == [shape] and operator_name_of(node) == "slice"
    return not kept and any(shape[place] == length and place != len(shape) - 1 for place in places if shape)
