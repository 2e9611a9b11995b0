"""A ResNet of bottlenecks (He et al., arXiv 1512.03385); 3, 4, 6 and 3 blocks of width 64 are ResNet-50."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def convolution(inside: int, outside: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1, self.bn1 = convolution(inside, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = convolution(width, outside, 1), nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(convolution(inside, outside, 1, stride), nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, depths: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.stages = nn.Sequential()
        inside = width
        for stage, depth in enumerate(depths):
            wide = width * 2**stage
            blocks = []
            for index in range(depth):
                blocks.append(Bottleneck(inside, wide, stride=2 if index == 0 and stage > 0 else 1))
                inside = 4 * wide
            self.stages.append(nn.Sequential(*blocks))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(inside, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.stages(self.stem(image))).flatten(1))


def build(depths: Sequence[int] = (2, 3), width: int = 8, classes: int = 10) -> ResNet:
    return ResNet(depths, width, classes)
