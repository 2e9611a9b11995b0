"""The edges of a unit: fake tensors that enter it, and gradients that come back through it.

A unit is measured alone. `enter` makes its inputs anew, as results of an autograd node that holds nothing, and
`leave` ties its outputs to one scalar that holds nothing either; so after forward exactly that is alive which the unit
itself saved, and in backward every gradient lives exactly as long as in the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function

from shardwright.passes.record import Recorder
from shardwright.passes.untyped import apply


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor without its storage."""

    storage: int
    """Index of its storage among those of the tensors it was taken with."""
    storage_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    requires_grad: bool

    def fills_storage(self) -> bool:
        """Whether the tensor covers its storage exactly."""
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) + 1
        return self.offset == 0 and 0 not in self.shape and reach * self.dtype.itemsize == self.storage_bytes


def layouts(tensors: Sequence[torch.Tensor]) -> tuple[Layout, ...]:
    """The layouts of tensors, with storages numbered in order of appearance."""
    numbers: dict[int, int] = {}
    return tuple(
        Layout(
            storage=numbers.setdefault(tensor.untyped_storage()._cdata, len(numbers)),
            storage_bytes=tensor.untyped_storage().nbytes(),
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            offset=int(tensor.storage_offset()),
            dtype=tensor.dtype,
            requires_grad=tensor.requires_grad,
        )
        for tensor in tensors
    )


def _make(layout: Layout, storages: dict[int, torch.Tensor]) -> torch.Tensor:
    if layout.storage not in storages and layout.fills_storage():
        storages[layout.storage] = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype)
        return storages[layout.storage]
    if layout.storage not in storages:
        storages[layout.storage] = torch.empty(layout.storage_bytes, dtype=torch.uint8)
    base = torch.empty(0, dtype=layout.dtype)
    return base.set_(storages[layout.storage].untyped_storage(), layout.offset, layout.shape, layout.stride)


def fresh(wanted: Sequence[Layout]) -> list[torch.Tensor]:
    """New tensors of these layouts, that share storages where they did."""
    storages: dict[int, torch.Tensor] = {}
    made = [_make(layout, storages) for layout in wanted]
    return [tensor.requires_grad_(layout.requires_grad) for tensor, layout in zip(made, wanted, strict=True)]


class _Results(Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, wanted: Sequence[Layout]) -> Any:
        storages: dict[int, torch.Tensor] = {}
        made = tuple(_make(layout, storages) for layout in wanted)
        ctx.mark_non_differentiable(
            *[tensor for tensor, layout in zip(made, wanted, strict=True) if not layout.requires_grad]
        )
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        return None, None


def results_of(wanted: Sequence[Layout]) -> list[torch.Tensor]:
    """Like `fresh`, but results of an autograd node, which may be changed in place, as leaves may not."""
    return list(apply(_Results, torch.zeros((), requires_grad=True), wanted)) if wanted else []


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, recorder: Recorder, region: str, wanted: Sequence[Layout]) -> Any:
        storages: dict[int, torch.Tensor] = {}
        with recorder.in_region(region), recorder.entering():
            made = tuple(_make(layout, storages) for layout in wanted)
        ctx.mark_non_differentiable(
            *[tensor for tensor, layout in zip(made, wanted, strict=True) if not layout.requires_grad]
        )
        ctx.set_materialize_grads(False)
        ctx.recorder = recorder
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        with ctx.recorder.paused():
            return torch.zeros(()), None, None, None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, recorder: Recorder, region: str, rebase: bool, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.recorder, ctx.region, ctx.rebase = recorder, region, rebase
        ctx.wanted = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        with recorder.paused():
            return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        with ctx.recorder.in_region(ctx.region):
            gradients = [torch.empty(shape, dtype=dtype) for shape, dtype in ctx.wanted]
        if ctx.rebase:
            ctx.recorder.rebase(ctx.region)
        return None, None, None, *gradients


def enter(anchor: torch.Tensor, recorder: Recorder, region: str, wanted: Sequence[Layout]) -> list[torch.Tensor]:
    """Fresh tensors of these layouts, counted for `region`. Their gradients flow to `anchor`, a scalar."""
    return list(apply(_Enter, anchor, recorder, region, wanted)) if wanted else []


def leave(
    recorder: Recorder, region: str, tensors: Sequence[torch.Tensor], *, rebase: bool = True
) -> torch.Tensor | None:
    """A scalar whose backward sends a gradient into each of the tensors, made at that moment and counted for `region`.
    With `rebase` the region's peak in backward counts from there. None if no gradient flows into any of them."""
    wanting = [tensor for tensor in tensors if tensor.requires_grad]
    return apply(_Leave, recorder, region, rebase, *wanting) if wanting else None
