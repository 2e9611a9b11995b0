"""A diffusion transformer with adaLN-Zero (Peebles and Xie, arXiv 2212.09748)."""

from __future__ import annotations

import torch
from layers import Attention, Mlp, sinusoids
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention, self.mlp = Attention(width, heads), Mlp(width, 4 * width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    def __init__(self, size: int, patch: int, channels: int, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.width, self.patch, self.channels, self.side = width, patch, channels, size // patch
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros(1, self.side**2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.leave = nn.Linear(width, patch * patch * channels)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = self.patches(latents).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(sinusoids(timestep, self.width, self.time[0].weight.dtype)) + self.labels(label)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        x = self.leave(self.norm(x) * (1 + scale) + shift)
        x = x.unflatten(1, (self.side, self.side)).unflatten(-1, (self.patch, self.patch, self.channels))
        return torch.einsum("bhwpqc->bchpwq", x).reshape(latents.shape)


def build(
    size: int = 20, patch: int = 4, channels: int = 4, width: int = 32, layers: int = 3, classes: int = 10
) -> DiT:
    return DiT(size, patch, channels, width, layers, classes)
