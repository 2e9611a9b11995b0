"""Losses as sums over the learnt targets of a micro-batch; the script divides by the count of the global batch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .data import IGNORED, Batch, learnt_targets


def next_token_loss(output: Any, targets: Tensor) -> Tensor:
    """Cross-entropy summed over the targets that are not -100, in fp32.

    `output`: logits (b, s, vocabulary), or an object that holds them as `.logits`; `targets`: (b, s).
    """
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def model_loss(output: Any, batch: Batch) -> Tensor:
    """The sum behind a mean that the model computed itself over the micro-batch's learnt targets.

    `output`: a scalar, or an object that holds it as `.loss`. A micro-batch without a learnt target, whose mean is NaN,
    adds zero; its gradient is zero where the model uses torch's cross-entropy.
    """
    mean: Tensor = output if isinstance(output, Tensor) else output.loss
    count = learnt_targets([batch])
    return mean.float() * count if count else mean.float().nan_to_num(0.0) * 0.0
