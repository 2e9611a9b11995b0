"""What one call of an operator costs: kind, FLOPs, bytes moved.

[Note: known operators]
An operator is priced if PyTorch's own FLOP counter has a formula for it (`torch.utils.flop_counter`, torch 2.13), if it
is named in `EXTRA_FLOPS`, or if it only moves data: it is tagged pointwise, a reduction or random in PyTorch's operator
registry, or named in `DATA_MOVEMENT` or in the job (`model.profile.moves_data`). Any other operator could hide a
matrix product (a fused LSTM does): where it takes a parameter, the profile is refused rather than silently short of it;
where it takes activations only, the profile carries a warning. Work on integers and Booleans alone is never FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from shardwright.passes.grouped import GROUPED_FLOPS
from shardwright.passes.recurrent import RECURRENT_FLOPS
from shardwright.schemas.profile import Kind

FlopFormula = Callable[..., int]

_MOVING = """
    to_copy cat constant_pad_nd copy flip repeat repeat_interleave roll rot90 stack unfold im2col col2im pixel_shuffle
    pixel_unshuffle channel_shuffle tril triu diag_embed diagonal slice select as_strided_scatter diagonal_scatter
    select_scatter slice_scatter
    embedding embedding_dense embedding_renorm embedding_bag gather index index_select take index_add index_copy
    index_fill index_put scatter scatter_add scatter_reduce masked_scatter put grid_sampler_2d grid_sampler_3d
    native_layer_norm native_group_norm native_batch_norm native_batch_norm_legit batch_norm batch_norm_with_update
    fused_rms_norm fused_norm weight_norm_interface renorm
    softmax safe_softmax masked_softmax log_softmax logsumexp logcumsumexp cumsum cumprod cummax cummin
    sort topk kthvalue histc bucketize searchsorted prelu_kernel glu lerp linspace arange
    fill zero full ones zeros full_like ones_like zeros_like new_full new_ones new_zeros scalar_tensor
    nll_loss nll_loss_forward nll_loss2d nll_loss2d_forward mse_loss smooth_l1_loss huber_loss soft_margin_loss
    binary_cross_entropy kl_div value_selecting_reduction
"""
DATA_MOVEMENT = frozenset(_MOVING.split())
"""Operators whose time is that of moving their operands; their arithmetic is not counted, as in the FLOP counter. Each
name also stands for its in-place, private and backward forms (`index_put_`, `_softmax_backward_data`)."""

_POOLING = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "fractional_max_pool")
EXCHANGES = frozenset({"all_reduce_", "all_gather", "reduce_scatter"})
"""Collectives between the processes that share a model ([Note: phantoms])."""
_FAMILIES = (*_POOLING, "upsample_", "reflection_pad", "replication_pad")
_NO_WORK = frozenset(
    {"_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_permuted", "empty_strided"}
    | {"new_empty", "new_empty_strided", "unsafe_split", "unsafe_split_with_sizes"}
)
_READS_ROWS = frozenset({"embedding", "gather", "index", "index_select", "take"})
_MOVING_TAGS = (torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.nondeterministic_seeded)


def _matrix_vector(matrix: torch.Tensor, vector: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


def _cpu_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _cpu_flash_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _convolution_backward(
    gradient: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    one = conv_flop_count(list(input.shape), list(weight.shape), list(gradient.shape), transposed)
    return one * (output_mask[0] + output_mask[1])


EXTRA_FLOPS: Mapping[str, FlopFormula] = {
    "mv": _matrix_vector,
    "dot": _matrix_vector,
    "convolution_backward": _convolution_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_flash,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_flash_backward,
    **GROUPED_FLOPS,
    **RECURRENT_FLOPS,
}
"""Formulas that the FLOP counter of torch 2.13 lacks, two FLOPs a multiply-add as there; and the backward of a
convolution, each of whose two halves does the work of forward: the counter has too much for more than one group."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What is known of one operator overload."""

    qualified_name: str
    """With its namespace, as `aten::mm`."""
    name: str
    """Without it, for PyTorch's own and ours."""
    kind: Kind
    works: bool
    """False for views and bare allocations, which launch nothing."""
    allocates: bool
    """Whether its results are new storages."""
    priced: bool
    """See [Note: known operators]."""
    formula: FlopFormula | None
    causal_at: int | None
    """Position of the `is_causal` argument, for attention."""
    reads_rows: bool
    """Reads only as many rows of its table as it returns."""
    exchanges: bool
    """Whether it is one of `EXCHANGES`."""


def operation(overload: torch._ops.OpOverload) -> Operation:
    """Looks an overload up in the tables."""
    return _operation(overload, flop_registry.get(overload._overloadpacket))


@cache
def _operation(overload: torch._ops.OpOverload, registered: FlopFormula | None) -> Operation:
    namespace, name = overload._schema.name.split("::")
    name = name if namespace in ("aten", "shardwright") else overload._schema.name
    formula = EXTRA_FLOPS.get(name) or registered
    arguments = [argument.name for argument in overload._schema.arguments]
    attention = "scaled_dot_product" in name or "attention_forward" in name or "attention_backward" in name
    moves = name in (_NO_WORK | EXCHANGES) or ("::" not in name and _only_moves_data(overload, name))
    return Operation(
        qualified_name=overload._schema.name,
        name=name,
        kind="attention" if attention else "matmul" if formula else "elementwise",
        works=not (overload.is_view or name in _NO_WORK),
        allocates=name != "_unsafe_view" and not any(result.alias_info for result in overload._schema.returns),
        priced=formula is not None or moves or overload.is_view,
        formula=formula,
        causal_at=arguments.index("is_causal") if "is_causal" in arguments else None,
        reads_rows=name in _READS_ROWS,
        exchanges=name in EXCHANGES,
    )


def _only_moves_data(overload: torch._ops.OpOverload, name: str) -> bool:
    """Whether an operator, or the one that it is the backward of, is tagged or named as one that only moves data."""
    base = name.removesuffix("_").removesuffix("_data").removesuffix("_backward").lstrip("_")
    if base in DATA_MOVEMENT or base.startswith(_FAMILIES):
        return True
    forward = getattr(torch.ops.aten, base, None)
    overloads = [overload, *(getattr(forward, each) for each in (forward.overloads() if forward else ()))]
    return "rnn" not in base and any(tag in each.tags for each in overloads for tag in _MOVING_TAGS)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operator's arguments or results, lists of tensors opened."""
    for value in values if isinstance(values, list | tuple) else (values,):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def written_into(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The arguments of a call that an operator writes into."""
    return list(tensors_in([args[at] if at < len(args) else kwargs.get(name) for at, name in _written(func)]))


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator writes into."""
    arguments = enumerate(func._schema.arguments)
    return tuple((at, each.name) for at, each in arguments if each.alias_info and each.alias_info.is_write)


def flops(call: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """FLOPs of one call. Causal attention counts only the score entries on and below the diagonal, continuously: for
    q queries and k >= q keys the share q / 2k, for fewer keys 1 - k / 2q; one half where they are equal. Flash kernels
    skip the masked blocks (Dao, arXiv 2307.08691, section 3.1)."""
    if call.formula is None:
        return 0
    full = int(call.formula(*args, **kwargs, out_val=result))
    at = call.causal_at
    if at is None or not (args[at] if at < len(args) else kwargs.get("is_causal", False)):
        return full
    query, key = (args[1], args[2]) if call.name.endswith("backward") else (args[0], args[1])
    q, k = int(query.shape[-2]), int(key.shape[-2])
    return full * q // (2 * k) if q <= k else full - full * k // (2 * q)


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of distinct elements: an expanded tensor is no larger than its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def bytes_moved(call: Operation, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> int:
    """Bytes read plus bytes written by one call in the device's memory; what is exchanged is counted on its own."""
    written = sum(map(tensor_bytes, outputs))
    if call.exchanges:
        return 0
    if call.reads_rows:
        return 2 * written + sum(map(tensor_bytes, inputs[1:]))
    return written + sum(map(tensor_bytes, inputs))


def bytes_exchanged(call: Operation, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> int:
    """Bytes of the whole tensor of a collective: what is gathered, or what enters a reduction; else 0."""
    if not call.exchanges:
        return 0
    return max(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))


def shapes_of(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """Their shapes as plain tuples."""
    return tuple(tuple(tensor.shape) for tensor in tensors)


def operand_dtype(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> str:
    """The dtype of the first floating-point operand (else of the first tensor), for example `bfloat16`."""
    tensors = [*inputs, *outputs]
    chosen = next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0] if tensors else None)
    return str(chosen.dtype).removeprefix("torch.") if chosen is not None else ""
