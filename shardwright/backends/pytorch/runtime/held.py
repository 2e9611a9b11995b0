"""What this process holds of the model's tensors and the optimizer's, however they are laid out.

[Note: holders]
Checkpoints and weights go by whole tensors, while a layout leaves each process a part of each. A `Holder` knows the
layout: it says which boxes of a tensor lie where in this process's memory. `STOCK` knows what stock PyTorch does:
whole tensors, and `DTensor`s as FSDP2 makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .index import Stored
from .pieces import Box, local_box, local_tensor, replica


class Held(NamedTuple):
    """A tensor, and this process's part of it."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    parts: tuple[tuple[Box, Tensor], ...]
    """Boxes of the whole tensor, and the memory of each, in the box's shape."""
    replica: tuple[int, int] = (0, 1)
    """(which, of how many) processes that hold the same parts, counted from 0."""
    written: bool = True
    """Whether these processes write the parts into checkpoints; false where others have copies and do."""


class HeldState(NamedTuple):
    """An optimizer state of a parameter of the model: `exp_avg`, `step`, ..."""

    parameter: Tensor
    state: str
    held: Held


class Holder(Protocol):
    """A layout of the model states; see [Note: holders]."""

    def held(self, tensor: Tensor) -> Held:
        """A parameter or buffer of the model, with the values that a checkpoint holds."""

    def states(self, optimizer: torch.optim.Optimizer) -> Iterator[HeldState]:
        """The states that the optimizer has, in the same order in all processes that hold the same parts."""

    def room(
        self, optimizer: torch.optim.Optimizer, stored: Mapping[nn.Parameter, Mapping[str, Stored]]
    ) -> AbstractContextManager[list[HeldState]]:
        """Makes room for stored optimizer states, by parameter and name, to be filled inside the context.

        Raises FormatError for states that the layout cannot take.
        """

    def filling(self) -> AbstractContextManager[None]:
        """Around everything that writes into `held` or `room`, in all processes together."""


class StockHolder:
    """Whole tensors and `DTensor`s; see [Note: holders]."""

    def held(self, tensor: Tensor) -> Held:
        """A parameter, a buffer or an optimizer state."""
        part = (local_box(tensor), local_tensor(tensor.detach()))
        return Held(tuple(tensor.shape), tensor.dtype, (part,), replica(tensor))

    def states(self, optimizer: torch.optim.Optimizer) -> Iterator[HeldState]:
        """Every state of every parameter."""
        for parameter, states in optimizer.state.items():
            for state, value in states.items():
                if value is not None:
                    yield HeldState(parameter, state, self.held(value))

    @contextmanager
    def room(
        self, optimizer: torch.optim.Optimizer, stored: Mapping[nn.Parameter, Mapping[str, Stored]]
    ) -> Iterator[list[HeldState]]:
        """Sharded as their parameter, or scalars."""
        rooms = []
        for parameter, states in stored.items():
            for state, (dtype, shape, _) in states.items():
                if shape == tuple(parameter.shape):
                    value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
                else:
                    value = scalar_state(optimizer, parameter, dtype)
                optimizer.state[parameter][state] = value
                rooms.append(HeldState(parameter, state, self.held(value)))
        yield rooms

    def filling(self) -> AbstractContextManager[None]:
        """Nothing else needs to know of new values."""
        return nullcontext()


STOCK: Holder = StockHolder()


def scalar_state(optimizer: torch.optim.Optimizer, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero, where torch.optim keeps the step counter of a parameter."""
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
