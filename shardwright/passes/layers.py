"""Linear layers, and whose a parameter is."""

from __future__ import annotations

import torch
from torch import nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of torch."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the linear layer of transformers whose weight is (inputs, outputs)."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def holds(model: nn.Module, path: str, name: str) -> bool:
    """Whether a module itself has a parameter of the model, under whichever name."""
    tensor: torch.Tensor = model.get_parameter(name)
    return any(own is tensor for own in model.get_submodule(path).parameters(recurse=False))
