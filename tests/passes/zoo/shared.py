"""One layer used again and again (ALBERT, arXiv 1909.11942), and groups of layers each used several times."""

from __future__ import annotations

import torch
from layers import Layer
from torch import nn


class Shared(nn.Module):
    def __init__(self, vocabulary: int, width: int, groups: int, repeats: int, own: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.own = nn.ModuleList(Layer(width, 4, causal=True) for _ in range(own))
        self.groups = nn.ModuleList(Layer(width, 4, causal=True) for _ in range(groups))
        self.repeats = repeats
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for layer in self.own:
            x = layer(x)
        for layer in self.groups:
            for _ in range(self.repeats):
                x = layer(x)
        return self.head(x)


def build(vocabulary: int = 96, width: int = 32, groups: int = 2, repeats: int = 3, own: int = 0) -> Shared:
    return Shared(vocabulary, width, groups, repeats, own)
