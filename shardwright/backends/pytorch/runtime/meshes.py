"""Parameters whose shards lie on several meshes.

FSDP2 shards experts over other processes than all else. torch's multi-tensor operations, which optimizers and clipping
use, take `DTensor`s of one mesh at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def by_mesh(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups for torch.optim, each cut up into one for each mesh that its "params" lie on, with the same options."""
    return [{**group, "params": members} for group in groups for members in _of_one_mesh(group["params"])]


def clip_by_mesh(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """`torch.nn.utils.clip_grads_with_norm_` for parameters of any meshes."""
    for members in _of_one_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(members, max_norm, norm)


def _of_one_mesh(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return found.values()
