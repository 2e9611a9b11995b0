"""Datasets of one kind of sample each."""

from __future__ import annotations

import torch

Samples = list[dict[str, torch.Tensor]]


def images(size: int = 16, channels: int = 3) -> Samples:
    return [{"image": torch.zeros(channels, size, size), "label": torch.tensor(0)}]


def noisy_images(size: int = 20, channels: int = 4) -> Samples:
    image = torch.zeros(channels, size, size)
    return [{"image": image, "noise": image, "timestep": torch.tensor(0), "label": torch.tensor(0)}]


def pairs(source: int = 12, target: int = 9) -> Samples:
    tokens = torch.zeros(target, dtype=torch.int64)
    return [{"source": torch.zeros(source, dtype=torch.int64), "shifted": tokens, "targets": tokens}]
