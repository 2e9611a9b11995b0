"""The small model of `states_checkpoint_worker.py`, and how it is trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime.initialize import initialize, parameters_on_meta

SAVED_AT, END, ROWS, LENGTH, WIDTH, VOCABULARY, BLOCKS, SEED = 2, 5, 8, 6, 10, 37, 2, 7
CPU = torch.device("cpu")
OPTIONS = [{"weight_decay": 0.1}, {"weight_decay": 0.0}]


class Block(nn.Module):
    """A residual MLP with a frozen matrix and a tensor of three dims."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 13), nn.Linear(13, WIDTH)
        self.frozen = nn.Parameter(torch.empty(WIDTH + 1, 3), requires_grad=False)
        self.mix = nn.Parameter(torch.empty(3, 5, WIDTH))
        self.gain = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        for parameter in (self.frozen, self.mix, self.gain):
            nn.init.normal_(parameter, 1.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm(x) * torch.tanh(self.mix).mean((0, 1))
        y: Tensor = x + self.down(F.gelu(self.up(mixed))) * self.frozen.mean() * self.gain
        return y


class Model(nn.Module):
    """Embedding and head are tied; `seen` is a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x))
        return result


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2) if name == "adamw" else torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """As `ShardedStates.parameter_groups` makes them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sides = [[each for each in trained if (each.ndim >= 2) is matrices] for matrices in (True, False)]
    return [{**options, "params": side} for options, side in zip(OPTIONS, sides, strict=True)]


def row_loss(model: nn.Module, step: int, row: int) -> Tensor:
    """One row's share of the mean over the global batch, whatever the number of processes."""
    tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(step * ROWS + row))
    return F.cross_entropy(model(tokens[None, :-1])[0].float(), tokens[1:], reduction="sum") / (ROWS * LENGTH)


def initial_model() -> Model:
    """As every layout must begin."""
    with parameters_on_meta():
        model = Model()
    for path in (*(f"blocks.{index}" for index in range(BLOCKS)), ""):
        initialize(model, path, seed=SEED, device=CPU)
    return model
