"""Models put together from a description: each block a list of pieces, each piece a name and the pieces inside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 16
Piece = list[Any]


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)]
        return self.out(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))


class Wide(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).mul_(2.0).relu_()


class Convolve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Views(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.unflatten(-1, (4, 4)).transpose(-1, -2).chunk(2, dim=-1)
        return torch.cat([right, left], dim=-1).flatten(-2)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(WIDTH, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Chain(nn.Module):
    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(make(piece) for piece in pieces)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for piece in self.pieces:
            x = piece(x)
        return x


class Residual(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Twice(Chain):
    """One set of parameters used two times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x))


class Frozen(Chain):
    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__(pieces)
        self.requires_grad_(False)


class Gated(Chain):
    """Passes a dictionary of a tuple to itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = {"pair": (super().forward(x), x.sigmoid())}
        return made["pair"][0] * made["pair"][1]


LEAVES = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "rms": lambda: nn.RMSNorm(WIDTH),
    "gelu": nn.GELU,
    "dropout": lambda: nn.Dropout(0.1),
    "attend": Attend,
    "wide": Wide,
    "in-place": InPlace,
    "convolve": Convolve,
    "views": Views,
    "unused": Unused,
}
NESTED = {"chain": Chain, "residual": Residual, "twice": Twice, "frozen": Frozen, "gated": Gated}


def make(piece: Piece) -> nn.Module:
    name, *inside = piece
    return LEAVES[name]() if name in LEAVES else NESTED[name](inside)


class Block(nn.Module):
    """Returns a tensor, a tuple or a dictionary."""

    def __init__(self, pieces: list[Piece], returns: str, layer_idx: int) -> None:
        super().__init__()
        self.norm, self.chain = nn.LayerNorm(WIDTH), Chain(pieces)
        self.returns, self.layer_idx = returns, layer_idx

    def forward(self, x: torch.Tensor) -> Any:
        y = self.chain(self.norm(x))
        return {"tensor": y, "tuple": (y, x), "dict": {"made": [y], "taken": x}}[self.returns]


class Composed(nn.Module):
    def __init__(self, kinds: list[Piece], order: list[int]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(96, WIDTH)
        self.blocks = nn.ModuleList(Block(*kinds[kind], index) for index, kind in enumerate(order))
        self.head = nn.Linear(WIDTH, 96)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            y = block(x)
            x = y if isinstance(y, torch.Tensor) else y["made"][0] + y["taken"] if isinstance(y, dict) else y[0] + y[1]
        return self.head(x)


def build(kinds: list[Piece], order: list[int]) -> Composed:
    """`kinds` of blocks, each its pieces and what it returns; the blocks in order are `order` of them."""
    return Composed(kinds, order)
