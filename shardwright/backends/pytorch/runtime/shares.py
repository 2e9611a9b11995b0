"""The norm of the whole gradient where processes share one copy of the model.

[Note: shares of the norm]
Under tensor and expert parallelism some parameters are divided and others are on all processes, beside how each engine
shards the states. The square of every element that a process has counts as the share 1 / (number of processes with the
same element), and one sum over all processes is the square of the norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .divided import Part, holders, parts_by_parameter
from .gradients import weighted_square
from .pieces import local_tensor, replica


def share_of(model: nn.Module, tensor: int) -> Callable[[nn.Parameter], float]:
    """A function that gives 1 / (number of processes of tensor parallelism with the same elements) of a parameter.

    `tensor`: how many share every layer. It may be called while parameters are still being replaced.
    """
    parts: dict[Tensor, Part] = {}

    def share(parameter: nn.Parameter) -> float:
        if parameter not in parts:
            parts.clear()
            parts.update(parts_by_parameter(model))
        return 1.0 / holders(parts.get(parameter), tensor)

    return share


def divided_gradient_norm(model: nn.Module, tensor: int) -> Tensor:
    """The L2 norm of the whole gradient of a model under stock engines, a scalar on the device: one all-reduce.

    Gradients are whole tensors, equal on all data processes, or `DTensor`s of any meshes. `tensor`: how many processes
    share every layer.
    """
    share, data, shares = share_of(model, tensor), dist.get_world_size() // tensor, []
    for parameter in model.parameters():
        if parameter.grad is not None:
            copies = replica(parameter.grad)[1] if isinstance(parameter.grad, DTensor) else data
            shares.append((share(parameter) / copies, local_tensor(parameter.grad)))
    square = weighted_square(shares, next(model.parameters()).device)
    dist.all_reduce(square)
    return square.sqrt()
