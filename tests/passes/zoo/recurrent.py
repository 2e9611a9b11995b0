"""Language models of recurrent layers."""

from __future__ import annotations

import torch
from torch import nn

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Recurrent(nn.Module):
    def __init__(self, kind: str, vocabulary: int, width: int, **options: bool | int | float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = KINDS[kind](width, width, batch_first=True, **options)
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.layers(self.tokens(tokens))
        return self.head(hidden)


def build(
    kind: str = "lstm", vocabulary: int = 96, width: int = 16, num_layers: int = 2, dropout: float = 0.0, **more: bool
) -> Recurrent:
    return Recurrent(kind, vocabulary, width, num_layers=num_layers, dropout=dropout, **more)


class Stacked(nn.Module):
    """Residual layers of one LSTM each."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.lstm = nn.LayerNorm(width), nn.LSTM(width, width, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.lstm(self.norm(x))[0]

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.layers = nn.ModuleList(self.Layer(width) for _ in range(layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stacked(vocabulary: int = 96, width: int = 16, layers: int = 3) -> Stacked:
    return Stacked(vocabulary, width, layers)
