"""Losses of one's own: sums over a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Batch = dict[str, torch.Tensor]


def of_labels(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(output, batch["label"], reduction="sum")


def of_noise(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.mse_loss(output.float(), batch["noise"], reduction="sum")


def of_tokens(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1).float(), batch["targets"].flatten(), reduction="sum")


def of_nested(output: Any, batch: Batch) -> torch.Tensor:
    answers, extra = output["answers"], output["extra"]["penalty"]
    losses = [F.cross_entropy(answer.float(), batch["label"], reduction="sum") for answer in answers]
    return torch.stack(losses).sum() + 0.1 * extra.float()
