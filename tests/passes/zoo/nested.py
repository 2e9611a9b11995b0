"""Several inputs, some by keyword, blocks that pass dictionaries of lists, and a nested output."""

from __future__ import annotations

from typing import Any

import torch
from layers import Mlp
from torch import nn

State = dict[str, Any]


class Exchange(nn.Module):
    """Two streams that read each other."""

    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlps = nn.ModuleList(Mlp(width, 2 * width) for _ in range(2))

    def forward(self, state: State, *, scale: float, bias: torch.Tensor) -> State:
        left, right = state["streams"]
        new_left = self.mlps[0](self.norms[0](right)) * scale + bias
        new_right = self.mlps[1](self.norms[1](left))
        if self.residual:
            new_left, new_right = new_left + left, new_right + right
        return {"streams": [new_left, new_right], "seen": (*state["seen"], new_left.mean(1))}


class Nested(nn.Module):
    def __init__(self, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.pixels, self.steps = nn.Conv2d(4, width, 4, stride=4), nn.Embedding(1000, width)
        self.bias = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(Exchange(width, index % 2 == 1) for index in range(layers))
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(2))

    def forward(
        self, image: torch.Tensor, *, step: torch.Tensor, noise: torch.Tensor | None = None
    ) -> dict[str, dict[str, torch.Tensor] | list[torch.Tensor]]:
        if noise is not None:
            image = image + noise
        pixels = self.pixels(image).flatten(2).transpose(1, 2)
        state: State = {"streams": [pixels, self.steps(step)[:, None].expand_as(pixels)], "seen": ()}
        for layer in self.layers:
            state = layer(state, scale=0.5, bias=self.bias)
        answers = [head(stream.mean(1)) for head, stream in zip(self.heads, state["streams"], strict=True)]
        return {"answers": answers, "extra": {"penalty": torch.stack(state["seen"]).square().sum()}}


def build(width: int = 16, layers: int = 4, classes: int = 10) -> Nested:
    return Nested(width, layers, classes)
