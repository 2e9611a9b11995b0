"""An encoder and a decoder like T5's (arXiv 1910.10683): every decoder layer reads what the encoder made."""

from __future__ import annotations

import torch
from layers import Attention, Layer, Mlp
from torch import nn


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.attention, self.cross = Attention(width, heads, causal=True), Attention(width, heads)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x))
        x = x + self.cross(self.norms[1](x), memory)
        return x + self.mlp(self.norms[2](x))


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), nn.RMSNorm(width)

    def forward(self, x: torch.Tensor, *memory: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, *memory)
        return self.norm(x)


class TwoStacks(nn.Module):
    def __init__(self, vocabulary: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.decoder = Stack([DecoderLayer(width, heads) for _ in range(layers)], width)
        self.encoder = Stack([Layer(width, heads) for _ in range(layers)], width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, source: torch.Tensor, shifted: torch.Tensor) -> torch.Tensor:
        memory = self.encoder(self.tokens(source))
        return self.head(self.decoder(self.tokens(shifted), memory))


def build(vocabulary: int = 96, width: int = 32, heads: int = 4, layers: int = 3) -> TwoStacks:
    return TwoStacks(vocabulary, width, heads, layers)
