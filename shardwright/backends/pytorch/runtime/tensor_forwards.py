"""The forwards that the styles of tensor parallelism put in the place of modules' own.

See [Note: styles], and [Note: wrapped forwards].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .divided import Part, parts_here
from .tensor_exchange import Group, enter, gathered, leave, neighbours, once, scatter, share
from .tensor_random import draw_alike, draw_own, region_of_draws
from .wrappers import Wrapper, in_place_of


class Product:
    """The forward of a Conv1D that has no bias."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        """The module\'s forward."""
        return torch.matmul(input, self.module.weight)


class _Grouped(Wrapper):
    """A wrapper that exchanges values; `dim` is that of the sequence, where it is divided."""

    def __init__(self, module: nn.Module, group: Group, dim: int | None = None) -> None:
        super().__init__(module)
        self.group, self.dim = group, dim

    def entering(self, arguments: Any) -> Any:
        """The arguments of a forward, those that enter replaced, each tensor once however often it comes.

        With a divided sequence they are the first floating-point tensor and those of the same number of dims and the
        same length; of all others, those that need a gradient.
        """
        tensors = {id(each): each for each in tree_leaves(arguments) if isinstance(each, Tensor)}
        floating = [each for each in tensors.values() if each.is_floating_point()]
        entered = {}
        for each in floating:
            if self.dim is not None and _alike(each, floating[0], self.dim):
                entered[id(each)] = enter(each, self.group, self.dim)
            elif each.requires_grad:
                entered[id(each)] = enter(each, self.group)
        return tree_map_only(Tensor, lambda each: entered.get(id(each), each), arguments)


def _alike(tensor: Tensor, other: Tensor, dim: int) -> bool:
    return tensor.dim() == other.dim() and tensor.shape[dim] == other.shape[dim]


class LocalForward(Wrapper):
    """Of `Local`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        with region_of_draws(active=self.module.training):
            return self.inner(*args, **kwargs)


class RegionForward(_Grouped):
    """Of `Region`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module\'s forward."""
        args, kwargs = self.entering((args, kwargs))
        # With a divided sequence whole blocks draw on their own.
        with region_of_draws(active=self.module.training and self.dim is None):
            return self.inner(*args, **kwargs)


class ColumnForward(_Grouped):
    """Of `Column`. `made`: its parts, of which neighbours may have the same: then each has a part of their gradient."""

    def __init__(self, module: nn.Module, group: Group, enters: bool, dim: int | None, made: Sequence[Part]) -> None:
        super().__init__(module, group, dim)
        self.enters = enters
        copies = max(part.holders for part in made)
        self.same = neighbours(group, copies) if copies > 1 else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module\'s forward."""
        if self.enters:
            args, kwargs = self.entering((args, kwargs))
        if self.module.training:
            draw_own(self.group)
        with in_place_of(self.module, _shared(self.module, self.same)):
            return self.inner(*args, **kwargs)


class RowForward(_Grouped):
    """Of `Row`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module\'s forward."""
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        with in_place_of(self.module, {"bias": None}):
            result = self.inner(*args, **kwargs)
        draw_alike()
        result = leave(result, self.group, self.dim)
        if bias is None:
            return result
        if self.dim is not None:
            bias = share(bias, self.group)
        return result + bias.to(result.dtype)


class VocabularyForward(_Grouped):
    """Of `Vocabulary`. `start`: the first row that lies here."""

    def __init__(self, module: nn.Module, group: Group, dim: int | None, start: int) -> None:
        super().__init__(module, group, dim)
        self.start = start

    def __call__(self, input: Tensor) -> Any:
        """The module\'s forward."""
        return leave(self._rows(input), self.group, self.dim)

    def _rows(self, input: Tensor) -> Tensor:
        """The rows that lie here, zero where others do."""
        table: Any = self.module
        count = table.weight.shape[0]
        local = input - self.start
        outside = (local < 0) | (local >= count)
        padding = table.padding_idx
        own = None if padding is None or not 0 <= padding - self.start < count else padding - self.start
        table.padding_idx = own
        try:
            rows: Tensor = self.inner(local.masked_fill(outside, 0))
        finally:
            table.padding_idx = padding
        return rows.masked_fill(outside[..., None], 0.0)


class ScatterForward(_Grouped):
    """Of `Scatter`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module\'s forward."""
        return scatter(self.inner(*args, **kwargs), self.group)


class SharedForward(_Grouped):
    """Of `Shared`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module\'s forward."""
        with in_place_of(self.module, _shared(self.module, self.group)):
            return self.inner(*args, **kwargs)


def _shared(module: nn.Module, group: Group | None) -> dict[str, Tensor]:
    """Stand-ins of a module's parameters whose gradients are summed over a group."""
    if group is None or not torch.is_grad_enabled():
        return {}
    own = module._parameters.items()
    return {name: share(each, group) for name, each in own if each is not None and each.requires_grad}


class ExpertsForward(_Grouped):
    """Of `TensorExperts`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module\'s forward."""
        args, kwargs = self._tokens((args, kwargs))
        divided = parts_here(self.module)
        own = self.module._parameters.items()
        biases = {name: once(each, self.group) for name, each in own if each is not None and name not in divided}
        with region_of_draws(active=self.module.training and self.dim is None), in_place_of(self.module, biases):
            if self.module.training:
                draw_own(self.group)
            result = self.inner(*args, **kwargs)
        return leave(result, self.group, self.dim)

    def _tokens(self, arguments: Any) -> Any:
        """Indices come with their tokens."""
        if self.dim is None:
            return self.entering(arguments)
        indices = [each for each in tree_leaves(arguments) if isinstance(each, Tensor) and not each.is_floating_point()]
        whole = {id(each): gathered(each, self.group, self.dim) for each in indices}
        return self.entering(tree_map_only(Tensor, lambda each: whole.get(id(each), each), arguments))
