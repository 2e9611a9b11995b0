"""A small GPT, as a person would write it beside a job."""

import torch
import torch.nn.functional as F
from layers import Block
from torch import nn


class GPT(nn.Module):
    def __init__(
        self, vocabulary: int, width: int, heads: int, layers: int, length: int, dropout: float, tie: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tie:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(
    vocabulary: int = 256,
    width: int = 48,
    heads: int = 4,
    layers: int = 3,
    length: int = 64,
    dropout: float = 0.0,
    tie: bool = False,
) -> GPT:
    return GPT(vocabulary, width, heads, layers, length, dropout, tie)


def summed(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["targets"].flatten(), reduction="sum", ignore_index=-100)
