"""The kernels that a device would choose, where they differ from those of a fake CPU tensor.

[Note: attention kernel]
Which attention kernel runs decides whether a score matrix of sequence length squared is saved. On CUDA the choice is
PyTorch's own (`sdp_utils.cpp` and `attention.cpp` under aten/src/ATen/native/transformers, torch 2.13):

- `flash`: 16-bit operands, no mask, query, key and value heads of one size up to 256 (padded to a multiple of 8),
  equal lengths if causal. Fewer key heads than query heads are fine with `enable_gqa`.
- `efficient`: else, if there are as many key heads as query heads and their sizes are multiples of 4 (8 for 16 bit);
  value heads may have another size (multi-head latent attention). A Boolean mask is turned into one of the query's
  dtype, once in every call, and kept; its rows are padded to a multiple of 8 elements.
- `math`: else. The score matrix is made and saved.

On compute capability 9.0 and 10.0 with cuDNN above 9.15, PyTorch puts cuDNN's kernel before both; it saves the same
tensors. What transformers calls `eager` is attention by products and a softmax of the model's own.
On the CPU, what the installed PyTorch chooses is traced as it is: `cpu-flash`, or `math` with dropout.

[Note: fused norms and dropout]
On CUDA, dropout keeps a mask of one byte an element (on the CPU: noise in the input's dtype), `layer_norm` keeps its
statistics in fp32, and `rms_norm` is one kernel that keeps the inverse norm (on the CPU: a chain of operators that
keeps several tensors of the input's size). Sources: Dropout.cpp, layer_norm.cpp, cuda/layer_norm_kernel.cu.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import Function

from shardwright.passes.recurrent import recurrent_layers
from shardwright.passes.untyped import DispatchMode, apply
from shardwright.schemas.cluster import DeviceKind

_HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten

_library = torch.library.Library("shardwright", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "fused_norm(Tensor input, Tensor? weight, Tensor? bias, int rows, int statistics) -> (Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "fused_norm_backward(Tensor gradient, Tensor input, Tensor statistics, Tensor? weight) -> Tensor"
)


def _fused_norm(
    input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, rows: int, statistics: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(input), input.new_empty((rows, statistics), dtype=torch.float32)


def _fused_norm_backward(
    gradient: torch.Tensor, input: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    return torch.empty_like(input)


torch.library.register_fake("shardwright::fused_norm", _fused_norm, lib=_library)
torch.library.register_fake("shardwright::fused_norm_backward", _fused_norm_backward, lib=_library)


class _FusedNorm(Function):
    """A normalisation over the last dimensions as one kernel that saves its input and `statistics` numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        shape: Sequence[int],
        statistics: int,
    ) -> torch.Tensor:
        rows = input.numel() // max(1, torch.Size(shape).numel())
        output, saved = torch.ops.shardwright.fused_norm(input, weight, bias, rows, statistics)
        ctx.save_for_backward(input, saved, weight, bias)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        input, statistics, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            torch.ops.shardwright.fused_norm_backward(gradient, input, statistics, weight) if wanted[0] else None,
            torch.empty_like(weight) if wanted[1] else None,
            torch.empty_like(bias) if wanted[2] else None,
            None,
            None,
        )


def attention_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masked: bool, causal: bool, grouped: bool = False
) -> str:
    """The kernel that PyTorch takes on CUDA for these operands ([Note: attention kernel]); `grouped`: `enable_gqa`."""
    half = query.dtype in _HALF
    size = query.shape[-1]
    one_size = size == key.shape[-1] == value.shape[-1]
    one_count = query.shape[-3] == key.shape[-3] == value.shape[-3]
    square = query.shape[-2] == key.shape[-2] or not causal
    if half and not masked and one_size and size <= 256 and square and (one_count or grouped):
        return "flash"
    aligned = all(tensor.shape[-1] % (8 if half else 4) == 0 for tensor in (query, value))
    return "efficient" if size == key.shape[-1] and aligned and one_count else "math"


def _efficient_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """An additive mask as the efficient kernel gets it: rows a multiple of 8 elements apart, then expanded
    (`preprocess_mask` in attention.cpp)."""
    length = int(key.shape[-2])
    if mask.stride()[-1] != 1 or any(step % 8 for step in mask.stride()[:-1]):
        mask = F.pad(mask, (0, 8 - length % 8))[..., :length]
    return mask.expand(*query.shape[:-1], length)


class AttentionCall(NamedTuple):
    """One call of PyTorch's fused attention."""

    query: tuple[int, ...]
    """The shape of the queries: (..., heads, length, features)."""
    key: tuple[int, ...]
    masked: bool
    causal: bool
    dropout: float


_watching: list[list[AttentionCall]] = []


@contextmanager
def attention_calls() -> Iterator[list[AttentionCall]]:
    """Fills in, while open, the calls of fused attention that are made under `kernels_of`."""
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


def _note(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> None:
    if not (query.numel() and key.numel() and value.numel()):
        raise ValueError("attention over no heads, positions or features")  # PyTorch divides by their number
    call = AttentionCall(tuple(query.shape), tuple(key.shape), attn_mask is not None, is_causal, dropout_p)
    for calls in _watching:
        calls.append(call)


class _Cuda:
    """CUDA's versions of functions of `torch.nn.functional`. Notes which attention kernels were taken."""

    def __init__(self, originals: dict[str, Callable[..., Any]]) -> None:
        self.originals = originals
        self.attention: set[str] = set()

    def scaled_dot_product_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        _note(query, key, value, attn_mask, dropout_p, is_causal)
        kernel = attention_kernel(query, key, value, attn_mask is not None, is_causal, enable_gqa)
        self.attention.add(kernel)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if kernel == "flash":
            size = query.shape[-1]
            padded = [F.pad(t, (0, -size % 8)) if size % 8 else t for t in (query, key, value)]
            output = _aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
            return output[..., :size]  # type: ignore[no-any-return]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, torch.full((), float("-inf"), dtype=query.dtype))
        if kernel == "math":
            operands = (query, key, value, attn_mask, dropout_p, is_causal)
            math = _aten._scaled_dot_product_attention_math(*operands, scale=scale, enable_gqa=enable_gqa)
            return math[0]  # type: ignore[no-any-return]
        if attn_mask is not None:
            attn_mask = _efficient_mask(attn_mask, query, key)
        keep = any(tensor.requires_grad for tensor in (query, key, value))
        efficient = _aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale
        )
        return efficient[0]  # type: ignore[no-any-return]

    def dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if inplace or not training or not 0 < p < 1:
            return self.originals["dropout"](input, p, training, inplace)  # type: ignore[no-any-return]
        return _aten.native_dropout(input, p, True)[0]  # type: ignore[no-any-return]

    def layer_norm(
        self,
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        return apply(_FusedNorm, input.contiguous(), weight, bias, normalized_shape, 2)  # type: ignore[no-any-return]

    def rms_norm(
        self,
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> torch.Tensor:
        if weight is not None and weight.dtype != input.dtype:
            return self.originals["rms_norm"](input, normalized_shape, weight, eps)  # type: ignore[no-any-return]
        return apply(_FusedNorm, input.contiguous(), weight, None, normalized_shape, 1)  # type: ignore[no-any-return]


class _Cpu:
    """The CPU's attention as it is, noting which kernel was taken: the math path draws dropout or takes what the
    flash kernel does not."""

    def __init__(self, originals: dict[str, Callable[..., Any]]) -> None:
        self.originals = originals
        self.attention: set[str] = set()

    def scaled_dot_product_attention(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        _note(*args, **kwargs)
        with _Names() as names:
            output: torch.Tensor = self.originals["scaled_dot_product_attention"](*args, **kwargs)
        flash = "aten::_scaled_dot_product_flash_attention_for_cpu" in names.seen
        self.attention.add("cpu-flash" if flash else "math")
        return output


class _Names(DispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


_DEVICES: dict[DeviceKind, type[_Cuda] | type[_Cpu]] = {"cuda": _Cuda, "cpu": _Cpu}


@contextmanager
def kernels_of(kind: DeviceKind, user_modules: Iterable[ModuleType], *, fused_norms: bool = True) -> Iterator[set[str]]:
    """While open, `torch.nn.functional` (and names that the user's modules imported from it) runs the kernels that a
    device of this kind would take, and Hugging Face models see no tracing. Yields the attention kernels taken so far.
    Everything is put back afterwards. Without `fused_norms` normalisations stay as they are, for a compiler to take
    apart."""
    replaced = [name for name in vars(_DEVICES[kind]) if not name.startswith("_")]
    replaced = [name for name in replaced if fused_norms or not name.endswith("_norm")]
    originals = {name: getattr(F, name) for name in replaced}
    device = _DEVICES[kind](originals)
    substitutes = {originals[name]: getattr(device, name) for name in replaced}
    with _replaced([F, *user_modules], substitutes), _hugging_face_eager(), recurrent_layers():
        yield device.attention


@contextmanager
def _replaced(modules: Iterable[ModuleType], substitutes: dict[Any, Any]) -> Iterator[None]:
    changed: list[tuple[ModuleType, str, Any]] = []
    try:
        for module in modules:
            for name, value in list(vars(module).items()):
                if callable(value) and value.__hash__ is not None and value in substitutes:
                    changed.append((module, name, value))
                    setattr(module, name, substitutes[value])
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


@contextmanager
def _hugging_face_eager() -> Iterator[None]:
    """transformers looks for packed sequences by the values of the positions, takes a fake tensor for a traced one, and
    then builds the causal mask of sequence length squared, which a training step without packed sequences does not
    (`transformers.masking_utils.find_packed_sequence_indices`, 5.23)."""
    masking = sys.modules.get("transformers.masking_utils")
    if masking is None or not hasattr(masking, "find_packed_sequence_indices"):
        yield
        return
    before = masking.find_packed_sequence_indices
    masking.find_packed_sequence_indices = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        with quiet_transformers():
            yield
    finally:
        masking.find_packed_sequence_indices = before  # type: ignore[attr-defined]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps the advice of transformers (unusual numbers, packages that would be faster) off the terminal."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
