"""nn.Transformer: encoder and decoder, one embedding for both languages."""

from __future__ import annotations

import torch
from torch import nn


class Translation(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(width, 4, layers, layers, 4 * width, dropout, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, src: torch.Tensor, tgt: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], device=tgt.device)
        hidden = self.transformer(self.tokens(src), self.tokens(tgt), tgt_mask=mask, tgt_is_causal=True)
        return self.head(hidden)


def build(vocabulary: int = 96, width: int = 32, layers: int = 3, dropout: float = 0.1) -> Translation:
    return Translation(vocabulary, width, layers, dropout)
