"""The norm of the whole gradient, whether each process holds all of it or a part."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The L2 norm over the gradients of all parameters, whole tensors or `DTensor`s: a scalar on the device.

    Over shards it takes one all-reduce of one fp32 number per gradient. `torch.nn.utils.clip_grads_with_norm_` takes it
    from here.
    """
    norm = _norm(parameters)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def square_over_groups(
    parameters: Iterable[Tensor], groups: Iterable[dist.ProcessGroup], device: torch.device
) -> Tensor:
    """The square of the same where each process holds plain tensors of its own, or none at all: one all-reduce a group.

    `parameters`: of this process, those that no other process counts: of tied copies, one rank's. `groups`: over which
    processes hold different ones: the axes that optimizer states are sharded over, and a pipeline's.
    """
    total = _norm(parameters).to(device).square()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total


def weighted_square(shares: Iterable[tuple[float, Tensor]], device: torch.device) -> Tensor:
    """The sum of the squares of gradients, each with its share: what one process adds to the sum over all."""
    by_share: dict[float, list[Tensor]] = {}
    for share, gradient in shares:
        by_share.setdefault(share, []).append(gradient)
    total = torch.zeros((), device=device)
    for share, gradients in by_share.items():
        total += share * torch.nn.utils.get_total_norm(gradients).square()
    return total


def _norm(parameters: Iterable[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
