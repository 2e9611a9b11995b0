"""Collectives between the processes that share a model, as operators on fake tensors.

[Note: phantoms]
A model that tensor parallelism divides is measured as one of the processes sees it: with the parameters that it has,
and with phantoms in place of the collectives. A phantom makes the tensors that the runtime's function of the same name
makes (backends/pytorch/runtime/tensor_parallel.py), keeps for backward what that one keeps, and exchanges nothing. The
exchange itself is an operator of ours, so that the recorder sees which unit and which phase it belongs to, what is
alive meanwhile, and whether checkpointing runs it again. It moves no bytes of the device's memory: its time is that of
the links.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from shardwright.passes.untyped import apply

_library = torch.library.Library("shardwright", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("all_reduce_(Tensor(a!) input) -> ()")  # type: ignore[no-untyped-call]
_library.define("all_gather(Tensor input, int degree) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("reduce_scatter(Tensor input, int degree) -> Tensor")  # type: ignore[no-untyped-call]


def _all_reduce(input: torch.Tensor) -> None:
    return None


def _all_gather(input: torch.Tensor, degree: int) -> torch.Tensor:
    return input.new_empty((degree * input.shape[0], *input.shape[1:]))


def _reduce_scatter(input: torch.Tensor, degree: int) -> torch.Tensor:
    return input.new_empty((input.shape[0] // degree, *input.shape[1:]))


torch.library.register_fake("shardwright::all_reduce_", _all_reduce, lib=_library)
torch.library.register_fake("shardwright::all_gather", _all_gather, lib=_library)
torch.library.register_fake("shardwright::reduce_scatter", _reduce_scatter, lib=_library)


def added_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the processes, in a tensor of its own: what checkpointing keeps of a product, and what another
    branch of backward takes too, must not change."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    torch.ops.shardwright.all_reduce_(total)
    return total


def gathered(tensor: torch.Tensor, dim: int, degree: int) -> torch.Tensor:
    """The processes' parts one after the other along `dim`: they arrive along dimension 0."""
    whole: torch.Tensor = torch.ops.shardwright.all_gather(tensor.contiguous(), degree)
    if dim % tensor.dim() == 0:
        return whole
    return torch.cat(whole.chunk(degree), dim)


def added_and_scattered(tensor: torch.Tensor, dim: int, degree: int) -> torch.Tensor:
    """This process's part along `dim` of the sum over the processes: the parts leave along dimension 0."""
    parts = tensor.contiguous() if dim % tensor.dim() == 0 else torch.cat(tensor.chunk(degree, dim))
    return torch.ops.shardwright.reduce_scatter(parts, degree)  # type: ignore[no-any-return]


def own_part(tensor: torch.Tensor, dim: int, degree: int) -> torch.Tensor:
    """This process's part along `dim`, in a tensor of its own."""
    return tensor.narrow(dim, 0, tensor.shape[dim] // degree).clone(memory_format=torch.contiguous_format)


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int | None, degree: int) -> torch.Tensor:
        ctx.dim, ctx.degree = dim, degree
        return tensor.view_as(tensor) if dim is None else gathered(tensor, dim, degree)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        own = added_up(gradient) if ctx.dim is None else added_and_scattered(gradient, ctx.dim, ctx.degree)
        return own, None, None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int | None, degree: int) -> torch.Tensor:
        ctx.dim, ctx.degree = dim, degree
        return added_up(tensor) if dim is None else added_and_scattered(tensor, dim, degree)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient if ctx.dim is None else gathered(gradient, ctx.dim, ctx.degree), None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int, degree: int) -> torch.Tensor:
        ctx.dim, ctx.degree = dim, degree
        return own_part(tensor, dim, degree)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gathered(gradient, ctx.dim, ctx.degree), None, None


class _Once(Function):
    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, degree: int) -> torch.Tensor:
        return parameter / degree

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int, degree: int) -> torch.Tensor:
        ctx.dim, ctx.degree = dim, degree
        return gathered(tensor, dim, degree)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return own_part(gradient, ctx.dim, ctx.degree), None, None


def enter(tensor: torch.Tensor, dim: int | None, degree: int) -> torch.Tensor:
    """What enters the divided part; `dim` is that of a divided sequence ([Note: regions])."""
    return apply(_Enter, tensor, dim, degree)  # type: ignore[no-any-return]


def leave(tensor: torch.Tensor, dim: int | None, degree: int) -> torch.Tensor:
    """What leaves it."""
    return apply(_Leave, tensor, dim, degree)  # type: ignore[no-any-return]


def once(parameter: torch.Tensor, degree: int) -> torch.Tensor:
    """What is added to a result on every process before it leaves: a share of it."""
    return apply(_Once, parameter, degree)  # type: ignore[no-any-return]


def scatter(tensor: torch.Tensor, dim: int, degree: int) -> torch.Tensor:
    """This process's part of what is equal on all; backward gathers its gradient."""
    return apply(_Scatter, tensor, dim, degree)  # type: ignore[no-any-return]


def gather(tensor: torch.Tensor, dim: int, degree: int) -> torch.Tensor:
    """The whole, of which every process makes the same use; backward takes its own part of the gradient."""
    return apply(_Gather, tensor, dim, degree)  # type: ignore[no-any-return]
