"""Grouped matrix products, with which a mixture of experts computes.

[Note: tokens of experts]
A router sends each token to the same number of experts (top-k), so all experts together see tokens x k rows, whoever
gets them. That total is what is priced: FLOPs and bytes do not depend on the values, and no imbalance between experts
is assumed (nor any token dropped). Formulas: two FLOPs a multiply-add, each row with one expert's matrix.

[Note: experts implementation]
transformers 5 computes experts by `grouped_mm` wherever the class allows it (`get_correct_experts_implementation` in
modeling_utils.py; else by a loop that reads the router's choice), in every dtype: `torch.nn.functional.grouped_mm` runs
as one kernel for bf16 on devices of compute capability 9.0 and 10.0, and as a loop of products over the experts
otherwise, fp32 included (`_grouped_mm_cuda` in aten/src/ATen/native/cuda/GroupedBlas.cpp, torch 2.13). Both compute and
keep the same. An emitted script names no other implementation, so it runs this one too. On fake tensors PyTorch refuses
all dtypes but bf16; `correct_grouped_mm` has the shapes and the checks of the real operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

_library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def _shape(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor | None) -> tuple[int, ...]:
    match a.dim(), b.dim():
        case 2, 2:
            assert ends is not None
            return len(ends), a.shape[0], b.shape[1]
        case 2, 3:
            return a.shape[0], b.shape[2]
        case 3, 2:
            return a.shape[1], b.shape[1]
        case _:
            return a.shape[0], a.shape[1], b.shape[2]


def _check(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor | None) -> None:
    """The checks of `_grouped_mm_validate_inputs` (GroupedMMUtils.h) that a model can fail by its sizes."""
    if a.dim() not in (2, 3) or b.dim() not in (2, 3):
        raise RuntimeError(f"grouped_mm multiplies matrices or stacks of them, got {a.dim()} and {b.dim()} dimensions")
    if (ends is not None) != (a.dim() == 2 or b.dim() == 2):
        raise RuntimeError("grouped_mm needs the ends of the groups exactly if one of its operands is a matrix")
    if a.dtype != b.dtype:
        raise RuntimeError(f"grouped_mm multiplies tensors of one dtype, got {a.dtype} and {b.dtype}")
    if (a.dim(), b.dim()) != (2, 2) and a.shape[-1] != b.shape[-2]:
        raise RuntimeError(f"grouped_mm cannot multiply {tuple(a.shape)} by {tuple(b.shape)}")
    for tensor in (a, b):
        step = max(tensor.stride()[-2:])
        if step * tensor.element_size() % 16:
            raise RuntimeError(f"grouped_mm needs rows of a multiple of 16 bytes, got {step} x {tensor.dtype}")


def _grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _check(a, b, offs)
    return a.new_empty(_shape(a, b, offs), dtype=out_dtype or a.dtype)


@cache
def correct_grouped_mm() -> None:
    """Puts `_grouped_mm` into the place of PyTorch's, once ([Note: experts implementation])."""
    _library.impl("_grouped_mm", _grouped_mm, "Meta", allow_override=True)  # type: ignore[no-untyped-call]


def grouped_flops(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of a grouped product ([Note: tokens of experts]), `a` and `b` either

    - (rows, in) and (groups, in, out): rows are divided among the groups; forward and input gradient;
    - (out, rows) and (rows, in): the rows that are summed over are divided; the weight gradient;
    - (groups, out, in) and (in, rows): the first, transposed;
    - (groups, rows, in) and (groups, in, out): an ordinary batch of products.
    """
    columns = b.shape[-1]
    rows = a.shape[0] * a.shape[1] if (a.dim(), b.dim()) == (3, 3) else a.shape[-2]
    return int(2 * rows * a.shape[-1] * columns)


def fallback_backward_flops(input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:
    """Both gradients of a grouped product of (rows, in) by (groups, in, out), in one operator of transformers."""
    return 2 * grouped_flops(input, weight)


GROUPED_FLOPS: Mapping[str, Any] = {
    "_grouped_mm": grouped_flops,
    "transformers::grouped_mm_fallback": grouped_flops,
    "transformers::grouped_mm_fallback_backward": fallback_backward_flops,
}
"""Formulas by operator. The fallback is what transformers takes where PyTorch's operator cannot be compiled."""
