"""Weight gradients of linear layers, computed later than the rest of their backward.

[Note: deferred weight gradients]
The backward of y = x W^T + b makes the gradient of x, which the layers before wait for, and those of W and b, for which
nobody waits before the optimizer's step (Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 2).
While a `WeightQueue` defers, the layers only queue x and the gradient of y for the latter; `compute` makes them
afterwards, without any recomputation and without reading the weights. Parameters of other layers have their gradients
at once, as always. A queued layer holds x, which forward kept anyway, and the gradient of y until `compute`. Under
checkpointing x is the recomputed one, so what is queued is as large as without.

Not for layers under `torch.compile`: inductor may overwrite what is queued.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .wrappers import replace_innermost


class Deferred:
    """What one use of a layer needs for its weight gradients; `compute` lets go of it."""

    __slots__ = ("bias", "by_input", "input", "output_gradient", "weight")

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, by_input: bool, input: Tensor, output_gradient: Tensor
    ) -> None:
        self.weight, self.bias, self.by_input = weight, bias, by_input
        self.input: Tensor | None = input
        self.output_gradient: Tensor | None = output_gradient


class WeightQueue:
    """The weight gradients that are still to be computed; one for all layers of a process.

    It is no thread-local: on CUDA autograd runs backward in another thread.
    """

    def __init__(self) -> None:
        self._defers = False
        self._queued: list[Deferred] = []

    @property
    def defers(self) -> bool:
        """Whether backward queues instead of computing."""
        return self._defers

    def put(self, deferred: Deferred) -> None:
        """Queues one use of a layer."""
        self._queued.append(deferred)

    @contextmanager
    def deferring(self) -> Iterator[list[Deferred]]:
        """Backward inside queues; what it queued is in the list afterwards."""
        self._defers, self._queued = True, []
        try:
            yield self._queued
        finally:
            self._defers, self._queued = False, []


def compute(deferred: Sequence[Deferred]) -> None:
    """Computes the weight gradients and adds them to `.grad`, exactly as backward would have done.

    It is a backward of its own, so several uses of one parameter are summed first, and hooks of the parameters run.
    """
    # Autograd runs what was made last first: the order is that of the backward that queued.
    roots = [_apply(_WeightGradient, each.weight, each.bias, each) for each in reversed(deferred)]
    if roots:
        torch.autograd.backward(roots, [root.detach() for root in roots])


def defer_weight_gradients(module: nn.Module, queue: WeightQueue) -> None:
    """Makes every `nn.Linear` of a module, and every `Conv1D` of Hugging Face, put its weight gradients into `queue`
    while that defers. In place; names and values stay. Subclasses are left alone, for what they compute is unknown."""
    for each in module.modules():
        by_input = f"{type(each).__module__}.{type(each).__name__}" == "transformers.pytorch_utils.Conv1D"
        if by_input or type(each) is nn.Linear:
            replace_innermost(each, partial(_linear, each, queue, by_input))


def _linear(layer: Any, queue: WeightQueue, by_input: bool, input: Tensor) -> Tensor:
    """The layer's forward. `by_input`: its weight is (inputs, outputs), as that of a Conv1D, not (outputs, inputs)."""
    weight, bias = layer.weight, layer.bias
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(kind))  # what is kept is then as small as without deferral
    return _apply(_Linear, input, weight, bias, queue, by_input)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    """y = x W^T + b, or x W + b with `by_input`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, queue: WeightQueue, by_input: bool
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.weight, ctx.bias, ctx.queue, ctx.by_input = weight, bias, queue, by_input
        result = F.linear(input, weight.t() if by_input else weight, bias)
        # With a bias, (..., features) comes out as a view, which autograd would forbid to change in place (`nn.ReLU`).
        return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        input_gradient = weight_gradient = bias_gradient = None
        if of_input:
            cast = weight.to(output_gradient.dtype)
            input_gradient = output_gradient @ (cast.t() if ctx.by_input else cast)
        if of_weight or of_bias:
            deferred = Deferred(ctx.weight, ctx.bias, ctx.by_input, input, output_gradient)
            if ctx.queue.defers:
                ctx.queue.put(deferred)
            else:
                weight_gradient, bias_gradient = _gradients(deferred, of_weight, of_bias)
        return input_gradient, weight_gradient, bias_gradient, None, None


class _WeightGradient(torch.autograd.Function):
    """An empty scalar whose backward is the weight gradients of one use of a layer."""

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, bias: nn.Parameter | None, deferred: Deferred) -> Tensor:
        ctx.deferred = deferred
        return weight.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, bias = _gradients(ctx.deferred, *ctx.needs_input_grad[:2])
        ctx.deferred.input = ctx.deferred.output_gradient = None
        return weight, bias, None


def _gradients(deferred: Deferred, of_weight: bool, of_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias, in their dtypes, summed over all leading dims of (..., features)."""
    input, gradient = deferred.input, deferred.output_gradient
    if input is None or gradient is None:
        raise RuntimeError("these weight gradients have been computed already")
    weight = bias = None
    gradient = gradient.reshape(-1, gradient.shape[-1])
    if of_weight:
        input = input.reshape(-1, input.shape[-1])
        product = input.t() @ gradient if deferred.by_input else gradient.t() @ input
        weight = product.to(deferred.weight.dtype)
    if of_bias:
        assert deferred.bias is not None
        bias = gradient.sum(0).to(deferred.bias.dtype)
    return weight, bias
