"""Cross-entropy of logits of which every process has some classes.

[Note: divided logits]
The logits of a head that is divided by columns stay so: (..., classes / t) on each process. Of each position the
largest logit, the sum of the exponentials and the logit of the target are reduced over the processes, and nothing else
(as `vocab_parallel_cross_entropy` of Megatron-LM does). `DividedLogits` know what they are: cross-entropy of them is
this one, wherever it is called, in the model too; elementwise functions, and views that keep the classes last, are as
ever; all others raise TypeError rather than take a part for the whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from .divided import Span, parts_here
from .tensor_exchange import Group, group_of, summed
from .wrappers import Wrapper

_ELEMENTWISE = frozenset(
    {
        *("float", "to", "type_as", "contiguous", "clone", "detach", "tanh"),
        *("add", "__add__", "__radd__", "sub", "__sub__"),
        *("mul", "__mul__", "__rmul__", "div", "__div__", "__truediv__"),
    }
)
_VIEWS = frozenset({"view", "reshape", "flatten", "__getitem__", "squeeze"})


def divide_cross_entropy(model: nn.Module, head: str, mesh: DeviceMesh) -> None:
    """Makes the cross-entropy of a model's logits that of divided ones; `head`: path of the module that makes them.

    The head is a `Column` over the processes of the mesh. Raises ValueError for one that is not divided.
    """
    module = model.get_submodule(head)
    part = parts_here(module).get("weight")
    if part is None:
        raise ValueError(f"{head} is not divided")
    _HeadForward(module, group_of(mesh), part.shape[0], part.spans[0][0])


class _HeadForward(Wrapper):
    def __init__(self, module: nn.Module, group: Group, classes: int, own: Span) -> None:
        super().__init__(module)
        self.group, self.classes, self.own = group, classes, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        logits: Tensor = self.inner(*args, **kwargs)
        if logits.is_meta or isinstance(logits, FakeTensor):
            # They have no values to be divided: what comes after is followed with the shapes of one process.
            return logits.sum(-1, keepdim=True).expand(*logits.shape[:-1], self.classes)
        marked: Tensor = _Mark.apply(logits)  # type: ignore[no-untyped-call]
        return _divided(marked, self.group, self.classes, self.own)


class DividedLogits(Tensor):
    """See [Note: divided logits]."""

    group: Group
    classes: int
    """Of all processes together."""
    own: Span
    """Those that are here."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        logits = next((each for each in (*args, *kwargs.values()) if isinstance(each, DividedLogits)), None)
        if func is F.cross_entropy and logits is not None:
            return _cross_entropy(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if logits is None or name == "__get__":
                return func(*args, **kwargs)
            if name in ("view", "reshape") and args[-1] == logits.classes:
                args = (*args[:-1], logits.shape[-1])
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
            if name in _ELEMENTWISE or (name in _VIEWS and result.shape[-1:] == logits.shape[-1:]):
                return _divided(result, logits.group, logits.classes, logits.own)
        raise TypeError(f"{name} of logits of which each process has {logits.shape[-1]} of {logits.classes} classes")


class _Mark(torch.autograd.Function):
    """The same tensor as `DividedLogits`, and no view of it: FSDP2 warns of views that a model returns."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        marked: Tensor = torch.Tensor._make_subclass(DividedLogits, tensor)
        return marked

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.as_subclass(Tensor)


def _divided(tensor: Tensor, group: Group, classes: int, own: Span) -> Tensor:
    result = tensor if isinstance(tensor, DividedLogits) else tensor.as_subclass(DividedLogits)
    result.group, result.classes, result.own = group, classes, own
    return result


def _cross_entropy(
    input: DividedLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As `torch.nn.functional.cross_entropy`, of (positions, classes / t) and (positions,)."""
    if weight is not None or size_average is not None or reduce is not None or label_smoothing:
        raise TypeError("cross-entropy of divided logits has neither class weights nor label smoothing")
    group, classes, own = input.group, input.classes, input.own
    logits = input.as_subclass(Tensor)
    if logits.dim() != 2 or target.shape != logits.shape[:1] or target.is_floating_point():
        raise TypeError("cross-entropy of divided logits takes (positions, classes) and the class of each position")
    learnt = target != ignore_index
    if target.device.type == "cpu" and bool(((target < 0) | (target >= classes))[learnt].any()):
        raise IndexError(f"a target is no class of {classes}")
    losses: Tensor = _CrossEntropy.apply(logits, target, learnt, own.start, group)  # type: ignore[no-untyped-call]
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / learnt.sum()


class _CrossEntropy(torch.autograd.Function):
    """The loss of each position, zero where none is learnt. Backward takes the softmax as memory for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, learnt: Tensor, start: int, group: Group) -> Tensor:
        count = logits.shape[-1]
        largest = summed(logits.amax(-1), group, dist.ReduceOp.MAX)
        softmax = (logits - largest[:, None]).exp_()
        total = summed(softmax.sum(-1), group)
        softmax.div_(total[:, None])
        local = target - start
        outside = (local < 0) | (local >= count)
        local = local.masked_fill(outside, 0)
        picked = logits.gather(-1, local[:, None])[:, 0] - largest
        picked = summed(picked.masked_fill(outside, 0.0), group)
        ctx.save_for_backward(softmax, local, outside, learnt)
        return (total.log() - picked).masked_fill(~learnt, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax, local, outside, learnt = ctx.saved_tensors
        softmax.scatter_add_(-1, local[:, None], outside.to(softmax.dtype)[:, None] - 1.0)
        return softmax.mul_(gradient.masked_fill(~learnt, 0.0)[:, None]), None, None, None, None
