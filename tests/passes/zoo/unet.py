"""A U-Net for diffusion, its layers plain attributes (Ho et al., arXiv 2006.11239)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from layers import sinusoids
from torch import nn


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, time: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.norm2, self.conv2 = nn.GroupNorm(4, outside), nn.Conv2d(outside, outside, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(self.drop(F.silu(self.norm2(y))))


class Spatial(nn.Module):
    """Attention over the pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        query, key, value = (part[:, None] for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return x + self.out(mixed.transpose(1, 2).view_as(x))


class UNet(nn.Module):
    def __init__(self, channels: int, width: int, dropout: float) -> None:
        super().__init__()
        time = 4 * width
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        widths = (width, 2 * width, 2 * width)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        inside = width
        for level, outside in enumerate(widths):
            blocks = [Residual(inside, outside, time, dropout), Residual(outside, outside, time, dropout)]
            shrink = nn.Conv2d(outside, outside, 3, stride=2, padding=1) if level < 2 else nn.Identity()
            self.down.append(nn.ModuleList([*blocks, shrink]))
            inside = outside
        self.middle1 = Residual(inside, inside, time, dropout)
        self.attention = Spatial(inside)
        self.middle2 = Residual(inside, inside, time, dropout)
        for level, outside in reversed(list(enumerate(widths))):
            blocks = [Residual(inside + outside, outside, time, dropout), Residual(2 * outside, outside, time, dropout)]
            grow = nn.ConvTranspose2d(outside, outside, 2, stride=2) if level > 0 else nn.Identity()
            self.up.append(nn.ModuleList([*blocks, grow]))
            inside = outside
        self.norm, self.leave = nn.GroupNorm(4, inside), nn.Conv2d(inside, channels, 3, padding=1)

    def forward(self, image: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = self.time(sinusoids(timestep, self.width, self.time[0].weight.dtype))
        x, skips = self.enter(image), []
        for first, second, shrink in self.down:
            skips.append(x := first(x, time))
            skips.append(x := second(x, time))
            x = shrink(x)
        x = self.middle2(self.attention(self.middle1(x, time)), time)
        for first, second, grow in self.up:
            x = first(torch.cat([x, skips.pop()], dim=1), time)
            x = grow(second(torch.cat([x, skips.pop()], dim=1), time))
        return self.leave(F.silu(self.norm(x)))


def build(channels: int = 4, width: int = 8, dropout: float = 0.1) -> UNet:
    return UNet(channels, width, dropout)
