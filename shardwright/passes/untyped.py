"""The parts of PyTorch that carry no types, given some in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Scalar = torch.Tensor | GradientEdge
"""The end of a graph, or the edge that leads to it."""


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode whose `__torch_dispatch__` sees every operator below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under a mode of ours, and the guard against it would cost more than what they do."""
        return False


class FunctionMode(TorchFunctionMode):
    """A mode whose `__torch_function__` sees every call of torch above autograd."""

    def __init__(self) -> None:
        super().__init__()


def apply(function: type[Function], *arguments: Any) -> Any:
    """Calls an autograd function."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def gradients(
    ends: Sequence[Scalar], wanted: Sequence[torch.Tensor], ones: Sequence[torch.Tensor], *, retain: bool
) -> tuple[torch.Tensor | None, ...]:
    """`torch.autograd.grad` from scalars, with None for tensors that they do not depend on."""
    return torch.autograd.grad(ends, wanted, ones, retain_graph=retain, allow_unused=True)  # type: ignore[arg-type]
