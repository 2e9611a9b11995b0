"""Cross-entropy where each process has the logits of its part of the vocabulary, as a phantom ([Note: phantoms]).

As in Megatron-LM (megatron/core/tensor_parallel/cross_entropy.py): the largest logit, the sum of exponentials and the
target's logit of every token are told to all; the logits never are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function

from shardwright.passes.divided_calls import added_up
from shardwright.passes.untyped import FunctionMode, apply

_RESHAPES = (torch.Tensor.view, torch.Tensor.reshape)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, learnt: torch.Tensor) -> torch.Tensor:
        largest = added_up(logits.amax(-1))
        softmax = (logits - largest[:, None]).exp_()
        total = added_up(softmax.sum(-1))
        softmax.div_(total[:, None])
        local = target - 0
        outside = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(outside, 0)
        picked = logits.gather(-1, local[:, None])[:, 0] - largest
        picked = added_up(picked.masked_fill(outside, 0.0))
        ctx.save_for_backward(local, outside, learnt)
        ctx.softmax = softmax  # not as a saved tensor: backward writes into it, and is measured twice
        return (total.log() - picked).masked_fill(~learnt, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        local, outside, learnt = ctx.saved_tensors
        softmax = ctx.softmax
        softmax.scatter_add_(-1, local[:, None], outside.to(softmax.dtype)[:, None] - 1.0)
        return softmax.mul_(gradient.masked_fill(~learnt, 0.0)[:, None]), None, None


class DividedLogits(FunctionMode):
    """While entered, logits with so many classes are those of a part of the vocabulary: their cross-entropy is the
    phantom, and a view of them that names the size of the whole vocabulary is one of the part."""

    def __init__(self, classes: int, vocabulary: int) -> None:
        super().__init__()
        self.classes, self.vocabulary = classes, vocabulary
        self.losses = 0
        """How often the phantom ran."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and self._divided(args[0]):
            self.losses += 1
            return _reduced(*args, **kwargs)
        if func in _RESHAPES and args[-1] == self.vocabulary and self._divided(args[0]):
            args = (*args[:-1], self.classes)
        return func(*args, **kwargs)

    def _divided(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] == self.classes


def _reduced(
    input: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **others: object,
) -> torch.Tensor:
    if label_smoothing or any(value is not None for value in others.values()):
        raise NotImplementedError("cross-entropy of divided logits has no class weights and no smoothing")
    learnt = target != ignore_index
    losses: torch.Tensor = apply(_CrossEntropy, input, target, learnt)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / learnt.sum()
