"""The norm of the whole gradient, whether each process holds all of it or a shard."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The L2 norm over the gradients of all parameters, a scalar on the device.

    Over shards it takes one all-reduce of one fp32 number per gradient. `torch.nn.utils.clip_grads_with_norm_` takes it
    from here.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
