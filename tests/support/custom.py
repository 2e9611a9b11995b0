"""A user's own loss and dataset, as a job may name them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import Tiny
from torch import Tensor


def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100, reduction="sum")


class WithLoss(Tiny):
    """Computes its own mean loss, as many a library's models do."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        logits = super().forward(ids)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def with_loss(width: int) -> WithLoss:
    return WithLoss(width, 3, 0.0, False)


def samples(size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.arange(12) + i, "targets": torch.arange(12) + i + 1} for i in range(size)]


def held_out(size: int) -> list[dict[str, Tensor]]:
    return samples(size)
