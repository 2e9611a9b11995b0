"""What processes that share every layer tell one another: collectives that autograd knows the backward of.

[Note: entering and leaving]
Between columns and rows every process has its part of the features or heads. What enters there is whole, and each
process makes a part of its gradient, so backward adds these up; what leaves is a sum over the processes (`f` and `g` of
Shoeybi et al., arXiv 1909.08053, section 3). Where the sequence is divided outside of them, entering gathers it, and
leaving adds up and scatters it in one; the backward of each is the other (Korthikanti et al., arXiv 2205.05198, section
4.2.2). Nothing is reduced in place: recomputation may have kept the tensor, and a gradient may be another branch's too.

Tensors without values (fake ones, and those on the meta device) get the shapes and send nothing.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh


class Group:
    """Processes that share every layer, or some of them, and which one this is. Copies of a model share it."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def __deepcopy__(self, memo: Any) -> Group:
        return self


_NEIGHBOURS: WeakKeyDictionary[dist.ProcessGroup, dict[int, Group]] = WeakKeyDictionary()


def group_of(mesh: DeviceMesh) -> Group:
    """The processes of a mesh of one axis."""
    return Group(mesh.get_group(), mesh.get_local_rank(), mesh.size())


def neighbours(group: Group, count: int) -> Group:
    """Every `count` of them next to each other. All of them must call it."""
    known = _NEIGHBOURS.setdefault(group.group, {})
    if count not in known:
        ranks = dist.get_process_group_ranks(group.group)
        first = group.rank - group.rank % count
        made = dist.new_group(ranks[first : first + count], use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        known[count] = Group(made, group.rank - first, count)
    return known[count]


def enter(tensor: Tensor, group: Group, dim: int | None = None) -> Tensor:
    """Whole, with a gradient that is a part on each process; `dim`: of the sequence, where it comes divided."""
    return _apply(_Enter, tensor, group) if dim is None else _apply(_EnterSequence, tensor, group, dim % tensor.dim())


def leave(tensor: Tensor, group: Group, dim: int | None = None) -> Tensor:
    """The sum over the processes; `dim`: of the sequence, where each process goes on with its own part of that."""
    return _apply(_Leave, tensor, group) if dim is None else _apply(_LeaveSequence, tensor, group, dim % tensor.dim())


def share(parameter: Tensor, group: Group) -> Tensor:
    """A whole parameter of whose gradient each process has a part: backward adds these up."""
    return _apply(_Share, parameter, group)


def once(parameter: Tensor, group: Group) -> Tensor:
    """A whole parameter that is added to a result before it leaves, on each process its share of it."""
    return _apply(_Once, parameter, group)


def scatter(tensor: Tensor, group: Group) -> Tensor:
    """The process's own part of the last dim of a whole tensor."""
    return _apply(_Scatter, tensor, group)


def summed(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum over the processes, or another reduction, in new memory; autograd does not know."""
    result = tensor.clone(memory_format=torch.contiguous_format)
    if _has_values(result):
        dist.all_reduce(result, op, group=group.group)
    return result


def gathered(tensor: Tensor, group: Group, dim: int) -> Tensor:
    """The processes' tensors, all of one shape, one after another along a dim; autograd does not know."""
    result = tensor.new_empty((group.size * tensor.shape[0], *tensor.shape[1:]))
    if _has_values(result):
        dist.all_gather_single(result, tensor.contiguous(), group=group.group)
    return result if dim == 0 else torch.cat(result.chunk(group.size), dim)


def scattered_sum(tensor: Tensor, group: Group, dim: int) -> Tensor:
    """Of the sum over the processes the own part along a dim; autograd does not know."""
    if tensor.shape[dim] % group.size:
        raise ValueError(f"a sequence of {tensor.shape[dim]} cannot be divided among {group.size} processes")
    tensor = tensor.contiguous() if dim == 0 else torch.cat(tensor.chunk(group.size, dim))
    result = tensor.new_empty((tensor.shape[0] // group.size, *tensor.shape[1:]))
    if _has_values(result):
        dist.reduce_scatter_single(result, tensor, group=group.group)
    return result


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return summed(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        return summed(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _EnterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gathered(tensor, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return scattered_sum(gradient, ctx.group, ctx.dim), None, None


class _LeaveSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return scattered_sum(tensor, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gathered(gradient, ctx.group, ctx.dim), None, None


class _Share(torch.autograd.Function):
    """Without a gradient nothing is summed: that of a weight whose layer defers it comes in a backward of its own."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: Group) -> Tensor:
        ctx.group = group
        ctx.set_materialize_grads(False)
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        return None if gradient is None else summed(gradient, ctx.group), None


class _Once(torch.autograd.Function):
    """The gradient is that of the sum: the same on all processes."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: Group) -> Tensor:
        return parameter / group.size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        if tensor.shape[-1] % group.size:
            raise ValueError(f"{tensor.shape[-1]} results cannot be divided among {group.size} processes")
        return tensor.chunk(group.size, -1)[group.rank].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gathered(gradient, ctx.group, gradient.dim() - 1), None
