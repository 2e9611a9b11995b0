"""What tensor parallelism does to each module of a model's local form, by style ([Note: regions])."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from shardwright.passes.divided_calls import enter, gathered, leave, once, scatter
from shardwright.schemas.profile import ModuleStyle, Parameter, Style

Hooks = Iterable[Any]
"""Handles of hooks that are on a module now."""
_CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True, slots=True)
class Wrapped:
    """One module, and what is done to it."""

    module: nn.Module
    style: ModuleStyle
    degree: int
    own: Mapping[str, Parameter | None]
    """The module's own parameters; None for one that is not divided."""

    @property
    def by_input(self) -> bool:
        """Whether its weight is (inputs, outputs) rather than (outputs, inputs)."""
        return f"{type(self.module).__module__}.{type(self.module).__name__}" == _CONV1D

    def entered(self, arguments: Any) -> Any:
        """Arguments as they are in the divided part, each tensor once. With a divided sequence, the first one of
        floating point is gathered with those of its length; of all others, those that need a gradient enter."""
        dim = self.style.sequence_dim
        tensors = {id(leaf): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)}
        floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
        made = {}
        for tensor in floating:
            if dim is not None and _alike(tensor, floating[0], dim):
                made[id(tensor)] = enter(tensor, dim, self.degree)
            elif tensor.requires_grad:
                made[id(tensor)] = enter(tensor, None, self.degree)
        return tree_map_only(torch.Tensor, lambda tensor: made.get(id(tensor), tensor), arguments)

    def left(self, output: torch.Tensor) -> torch.Tensor:
        """What rows return, added up."""
        return leave(output, self.style.sequence_dim, self.degree)


def _alike(tensor: torch.Tensor, other: torch.Tensor, dim: int) -> bool:
    return tensor.dim() == other.dim() and tensor.shape[dim] == other.shape[dim]


def _region(wrapped: Wrapped) -> Hooks:
    """In place of forward: hooks would run outside of a block that is a region itself."""
    forward = wrapped.module.forward

    def divided(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = wrapped.entered((args, kwargs))
        return forward(*args, **kwargs)

    vars(wrapped.module)["forward"] = divided
    return ()


def _column(wrapped: Wrapped) -> Hooks:
    module = wrapped.module
    if wrapped.by_input:
        vars(module)["nf"] = module.get_parameter("weight").shape[1]
    if wrapped.style.enters:
        yield module.register_forward_pre_hook(lambda _, *given: wrapped.entered(given), with_kwargs=True)
    if any(parameter and 0 < parameter.tensor_parallel_units < wrapped.degree for parameter in wrapped.own.values()):
        yield from _gradients_added_up(wrapped)


def _row(wrapped: Wrapped) -> Hooks:
    """The bias, which all processes have, is added once, after the sum. Hooks, so that whoever watches the layer sees
    what its own product takes and makes."""
    module = wrapped.module
    bias = module._parameters.get("bias")
    if wrapped.by_input:
        vars(module)["forward"] = lambda input: input @ module.get_parameter("weight")

    def without_bias(*_: Any) -> None:
        vars(module)["bias"] = None

    def summed(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        vars(module).pop("bias", None)
        output, late = wrapped.left(output), module._parameters.get("bias")
        if late is None:
            return output
        divided = wrapped.style.sequence_dim is not None and late.requires_grad
        added: torch.Tensor = enter(late, None, wrapped.degree) if divided else late
        return output + added.to(output.dtype)

    if bias is not None:
        yield module.register_forward_pre_hook(without_bias)
    yield module.register_forward_hook(summed)


def _vocabulary(wrapped: Wrapped) -> Hooks:
    """Tokens of other processes' rows look up row 0, and their results are zeros in the sum."""
    module = wrapped.module
    forward = module.forward
    vars(module)["padding_idx"] = None  # a row of the whole table; that it has no gradient costs nothing

    def divided(input: torch.Tensor) -> torch.Tensor:
        local = input - 0
        outside = (local < 0) | (local >= module.get_parameter("weight").shape[0])
        rows = forward(local.masked_fill(outside, 0))
        return wrapped.left(rows.masked_fill(outside[..., None], 0.0))

    vars(module)["forward"] = divided
    return ()


def _scatter(wrapped: Wrapped) -> Hooks:
    yield wrapped.module.register_forward_hook(lambda _, __, output: scatter(output, -1, wrapped.degree))


def _experts(wrapped: Wrapped) -> Hooks:
    """A region and its rows in one. Indices come with their tokens; what is not divided is a bias of the rows."""
    module, dim, degree = wrapped.module, wrapped.style.sequence_dim, wrapped.degree
    forward = module.forward

    def together(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if dim is None or tensor.is_floating_point() else gathered(tensor, dim, degree)

    def divided(*args: Any, **kwargs: Any) -> torch.Tensor:
        args, kwargs = wrapped.entered(tree_map_only(torch.Tensor, together, (args, kwargs)))
        own = {name: module._parameters[name] for name, parameter in wrapped.own.items() if parameter is None}
        vars(module).update({name: once(bias, degree) for name, bias in own.items() if bias is not None})
        result = wrapped.left(forward(*args, **kwargs))
        for name in own:
            vars(module).pop(name, None)
        return result

    vars(module)["forward"] = divided
    return ()


def _gradients_added_up(wrapped: Wrapped) -> Iterator[Any]:
    """Parameters whose gradients are sums over processes enter on their way into forward."""
    module = wrapped.module

    def entered(*_: Any) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                vars(module)[name] = enter(parameter, None, wrapped.degree)

    def back(*_: Any) -> None:
        for name in module._parameters:
            vars(module).pop(name, None)

    yield module.register_forward_pre_hook(entered)
    yield module.register_forward_hook(back, prepend=True)


WRAPPERS: Mapping[Style, Callable[[Wrapped], Hooks]] = {
    "region": _region,
    "column": _column,
    "row": _row,
    "vocabulary": _vocabulary,
    "scatter": _scatter,
    "shared": _gradients_added_up,
    "experts": _experts,
}
