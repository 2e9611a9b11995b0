"""A model whose blocks, and what lies around them, keep running statistics in buffers."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2).relu()
        return y


class Normed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.stem = nn.Embedding(257, width), nn.BatchNorm1d(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.last, self.head = nn.BatchNorm1d(width), nn.Linear(width, 257)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.stem(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.last(x.transpose(1, 2)).transpose(1, 2))
        return logits


def build(width: int) -> Normed:
    return Normed(width)
