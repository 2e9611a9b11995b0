"""Attention of some queries to some keys with the log of its normaliser, on the kernels that torch has.

[Note: pieces]
Attention to several stretches of keys is a weighted sum of the attention to each of them, whose weights follow from the
logarithms of the sums of exponentials (arXiv 2310.01889, section 3). Backward of one piece with the output and
log-sum-exp of all of them gives the piece's share of the gradients. Neither is in `scaled_dot_product_attention`, so
the operators below it are called; all of their shapes are (batch, heads, length, size), and there may be fewer heads of
keys than of queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
_ALIGNED = 32
"""Rows of the log-sum-exp of the efficient kernel are padded to a multiple (kAlignLSE in kernel_forward.h)."""


class Piece(NamedTuple):
    """What the attention of some queries to some keys gives."""

    output: Tensor
    normaliser: Tensor
    """Log-sum-exp of the scores (batch, heads, length), in fp32 or fp64."""
    rest: tuple[Any, ...]
    """What the kernel's backward asks for besides."""


class _Cpu:
    """CPU, and tensors without values. Takes any number of heads, and one size."""

    multiple = 1

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Piece:
        output, normaliser = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return Piece(output, normaliser, ())

    @staticmethod
    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, of: Piece, causal: bool, scale: float) -> Any:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, of.output, of.normaliser, 0.0, causal, scale=scale
        )


class _Flash:
    """CUDA, half precision. Takes any number of heads; sizes up to 256 that are multiples of 8."""

    multiple = 8

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Piece:
        output, normaliser, *rest = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return Piece(output, normaliser, (*rest[:2], *rest[4:6]))  # cumulative lengths; state of the random numbers

    @staticmethod
    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, of: Piece, causal: bool, scale: float) -> Any:
        first, second, seed, offset = of.rest
        lengths = (first, second, q.shape[2], k.shape[2])
        return _aten._scaled_dot_product_flash_attention_backward(
            *(gradient, q, k, v, of.output, of.normaliser, *lengths, 0.0, causal, seed, offset), scale=scale
        )


class _Efficient:
    """CUDA, everything else. Wants as many heads of keys as of queries."""

    multiple = 8

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Piece:
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
        output, normaliser, *rest = _aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        return Piece(output, normaliser[..., : q.shape[2]].contiguous(), tuple(rest))

    @staticmethod
    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, of: Piece, causal: bool, scale: float) -> Any:
        heads = k.shape[1]
        k, v = (each.repeat_interleave(q.shape[1] // heads, 1) for each in (k, v))
        normaliser = F.pad(of.normaliser, (0, -q.shape[2] % _ALIGNED), value=torch.inf)
        operands = (gradient, q, k, v, None, of.output, normaliser, *of.rest)
        found = _aten._scaled_dot_product_efficient_attention_backward(
            *operands, 0.0, [True, True, True, False], causal, scale=scale
        )
        shared = (each.unflatten(1, (heads, -1)).sum(2) for each in found[1:3])
        return found[0], *shared


_Kernel = type[_Cpu | _Flash | _Efficient]


def _kernel(q: Tensor, v: Tensor) -> tuple[_Kernel, int]:
    """The kernel for some operands, and the size that they must have."""
    size = max(q.shape[-1], v.shape[-1])
    kernel: _Kernel = _Cpu
    if q.is_cuda:
        kernel = _Flash if q.dtype in (torch.bfloat16, torch.float16) and size <= 256 else _Efficient
    return kernel, size + -size % kernel.multiple


def _sized(size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose last dimension has some zeros more, which change nothing."""
    return tuple(F.pad(each, (0, size - each.shape[-1])) if each.shape[-1] != size else each for each in tensors)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Piece:
    """Attention of queries to keys; `causal`: to those up to their own place, where there are as many of both."""
    kernel, size = _kernel(q, v)
    width = v.shape[-1]
    q, k, v = _sized(size, q, k, v)
    piece = kernel.forward(q, k, v, causal, scale)
    return piece._replace(output=piece.output[..., :width])


def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, of: Piece, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares in the gradients of q, k and v; `gradient`, and output and normaliser in `of`, are those of all pieces
    together ([Note: pieces])."""
    kernel, size = _kernel(q, v)
    widths = q.shape[-1], k.shape[-1], v.shape[-1]
    gradient, q, k, v, output = _sized(size, gradient, q, k, v, of.output)
    whole = of._replace(output=output, normaliser=of.normaliser.contiguous())
    found = kernel.backward(gradient, q, k, v, whole, causal, scale)
    first, second, third = (each[..., :width] for each, width in zip(found, widths, strict=True))
    return first, second, third


class Merged:
    """Pieces of the same queries put together, in the precision of their normalisers."""

    def __init__(self, first: Piece) -> None:
        self.output = first.output.to(first.normaliser.dtype, copy=True)
        self.normaliser = first.normaliser.contiguous().clone()
        self.rest = first.rest

    def add(self, piece: Piece, rows: slice) -> None:
        """One more piece, of some of the queries."""
        output, normaliser = self.output[:, :, rows], self.normaliser[:, :, rows]
        total = torch.logaddexp(normaliser, piece.normaliser)
        output *= (normaliser - total).exp().unsqueeze(-1)
        output += piece.output * (piece.normaliser - total).exp().unsqueeze(-1)
        normaliser.copy_(total)

    def piece(self, dtype: torch.dtype) -> Piece:
        """All of them as one."""
        return Piece(self.output.to(dtype), self.normaliser, self.rest)
