"""Layers that are skipped now and then: stochastic depth (arXiv 1603.09382)."""

from __future__ import annotations

import random

import torch
from layers import Layer
from torch import nn


class MaybeSkipped(Layer):
    """Skipped for the whole batch, decided by Python."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__(width, 4, causal=True)
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and random.random() < self.rate:
            return x
        return super().forward(x)


class SampleSkipped(Layer):
    """Skipped for some samples, decided on the device."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__(width, 4, causal=True)
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.rate
        return torch.where(kept, super().forward(x), x)


class Deep(nn.Module):
    def __init__(self, layer: type[Layer], vocabulary: int, width: int, layers: int, by_model: float) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.layers = nn.ModuleList(layer(width, 0.1 * (index + 1)) for index in range(layers))
        self.by_model = by_model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            if self.by_model == 0 or random.random() > self.by_model:
                x = layer(x)
        return self.head(x)


KINDS = {"python": MaybeSkipped, "sample": SampleSkipped}


def build(kind: str = "python", vocabulary: int = 96, width: int = 32, layers: int = 4, by_model: float = 0.0) -> Deep:
    return Deep(KINDS[kind], vocabulary, width, layers, by_model)
