"""Models whose forward hands tensors past blocks in the ways that real ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, BATCH, LENGTH, VOCABULARY = 16, 2, 8, 257
Batch = dict[str, Tensor]


class Case(NamedTuple):
    """A model, the paths of its blocks, and a forward that ends in its loss."""

    model: nn.Module
    blocks: list[str]
    forward: Callable[[nn.Module, Batch], Tensor]
    batch: Callable[[int], Batch]
    """The micro-batch of a number."""


def tokens(number: int) -> Batch:
    """Tokens, targets, and which of the tokens count."""
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    kept = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    kept[0, LENGTH - 1 - number % 2 :] = False
    return {"ids": drawn[:, :-1], "targets": drawn[:, 1:], "kept": kept}


def pictures(number: int) -> Batch:
    """Small pictures, times, and noise."""
    generator = torch.Generator().manual_seed(number)
    return {
        "x": torch.randn(BATCH, 3, 8, 8, generator=generator),
        "time": torch.randint(0, 10, (BATCH,), generator=generator),
        "targets": torch.randn(BATCH, 3, 8, 8, generator=generator),
    }


def language_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Of a model that returns logits."""
    return F.cross_entropy(model(batch["ids"]).float().flatten(0, 1), batch["targets"].flatten())


class Level(nn.Module):
    """A residual block of a U-Net."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.norm, self.time = nn.GroupNorm(1, given), nn.Linear(WIDTH, made)
        self.first, self.second = nn.Conv2d(given, made, 3, padding=1), nn.Conv2d(made, made, 3, padding=1)
        self.skip = nn.Conv2d(given, made, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.first(F.silu(self.norm(x))) + self.time(F.silu(time))[..., None, None]
        result: Tensor = self.skip(x) + self.second(F.silu(y))
        return result


class UNet(nn.Module):
    """Each level going up takes what its counterpart going down has made."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH))
        self.inwards = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.ModuleList([Level(4, 6), Level(6, 8), Level(8, 8)])
        self.up = nn.ModuleList([Level(16, 8), Level(16, 6), Level(12, 4)])
        self.norm, self.outwards = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = self.time(time)
        x, skips = self.inwards(x), []
        for number, block in enumerate(self.down):
            x = block(x, time)
            skips.append(x)
            if number < 2:
                x = F.avg_pool2d(x, 2)
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, size=skip.shape[-2:]), skip], 1), time)
        result: Tensor = self.outwards(F.silu(self.norm(x)))
        return result


class Modulated(nn.Module):
    """A block that sees the embedding's output and a conditioning vector, besides what the one before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.shift, self.mlp = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.keep = nn.Parameter(torch.tensor([1.0, 0.1]))

    def forward(self, x: Tensor, x0: Tensor, condition: Tensor) -> tuple[Tensor, None]:
        x = self.keep[0] * x + self.keep[1] * x0
        scale, shift = self.shift(condition).chunk(2, -1)
        return x + torch.tanh(self.mlp(self.norm(x) * (1 + scale[:, None]) + shift[:, None])), None


class Conditioned(nn.Module):
    """As a diffusion transformer, and as nanochat: embedding and condition go to all blocks and to the head."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.embed, self.condition = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh())
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Modulated() for _ in range(layers))
        self.head, self.last = nn.Linear(WIDTH, VOCABULARY), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x += self.positions[: x.size(1)]
        x0 = F.rms_norm(x, (WIDTH,))
        condition = self.condition(torch.rand(ids.shape[0], 1))  # drawn once, as a diffusion's times are
        for number, block in enumerate(self.blocks):
            if number == 3:
                x = x + x0.mean(1, keepdim=True)  # between blocks
            x, _ = block(x, x0, condition)
        result: Tensor = self.head(x * self.last(condition)[:, None] + x0)
        return result


class Masked(nn.Module):
    """Positions, rotary tables and a mask come from the batch, and a table is kept from the first call on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Attending() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("frequencies", 0.5 ** torch.arange(WIDTH // 2))
        self.cached: Tensor | None = None

    def forward(self, ids: Tensor, kept: Tensor) -> Tensor:
        x = self.embed(ids)
        positions = torch.arange(ids.shape[1], device=x.device)
        if self.cached is None:
            self.cached = torch.ones(LENGTH, LENGTH).tril().bool()
        mask = self.cached & kept[:, None] | torch.eye(x.shape[1], dtype=torch.bool)
        angles = positions[:, None] * self.frequencies
        tables = (angles.cos(), angles.sin())
        if bool(kept.all()):
            mask = mask & mask
        for block in self.blocks:
            x = block({"x": x, "tables": tables}, mask=mask)["x"]
        result: Tensor = self.head(x)
        return result


class Attending(nn.Module):
    """Takes and returns a dictionary, in which tables that it only passes on are found again."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, given: dict[str, Any], mask: Tensor) -> dict[str, Any]:
        x, (cosine, sine) = given["x"], given["tables"]
        q, k, v = self.qkv(x).chunk(3, -1)

        def turn(y: Tensor) -> Tensor:
            left, right = y.chunk(2, -1)
            return torch.cat([left * cosine - right * sine, left * sine + right * cosine], -1)

        mixed = F.scaled_dot_product_attention(turn(q), turn(k), v, attn_mask=mask)
        return {"x": x + mixed, "tables": given["tables"]}


class InPlace(Conditioned):
    """The second block's input is changed in place."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        condition = x.mean(1)
        for number, block in enumerate(self.blocks):
            if number == 1:
                x += 1
            x, _ = block(x, x, condition)
        result: Tensor = self.head(x)
        return result


class Gated(Conditioned):
    """The last block is told, by truth values alone, what the embedding thought of each token."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        gate = x.sum(-1, keepdim=True) > 0
        for block in self.blocks[:-1]:
            x, _ = block(x, x, x.mean(1))
        x, _ = self.blocks[-1](x.where(gate, -x), x, x.mean(1))
        result: Tensor = self.head(x)
        return result


class View(Conditioned):
    """As `InPlace`, where a view of what is changed is used, too."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).mul(1)
        first = x[:, 0]
        for number, block in enumerate(self.blocks):
            if number == 1:
                x *= 0.5
            y, _ = block(x, x, first)
        result: Tensor = self.head(y)
        return result


class Leaking(Conditioned):
    """A block puts something aside that another one reads."""

    def forward(self, ids: Tensor) -> Tensor:
        x, shelf = self.embed(ids), list[Tensor]()
        condition = x.mean(1)
        for number, block in enumerate(self.blocks):
            hook = block.mlp.register_forward_hook(lambda _, given, made: shelf.append(made))
            x, _ = block(x, shelf[0] if number == 1 else x, condition)
            hook.remove()
        result: Tensor = self.head(x)
        return result


class Backwards(Conditioned):
    """Its blocks are listed in another order than that in which they run."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in reversed(self.blocks):
            x, _ = block(x, x, x.mean(1))
        result: Tensor = self.head(x)
        return result


class Skipping(Conditioned):
    """A block does not run."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks[:-1]:
            x, _ = block(x, x, x.mean(1))
        result: Tensor = self.head(x)
        return result


class Filling(Conditioned):
    """Values are written into a tensor that does not depend on parameters."""

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.zeros(*ids.shape, WIDTH)
        x[:, 1:] = self.embed(ids[:, 1:])
        for block in self.blocks:
            x, _ = block(x, x, x.mean(1))
        result: Tensor = self.head(x)
        return result


class Deciding(Conditioned):
    """Asks how large a value is."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for number, block in enumerate(self.blocks):
            if number == 1 and x.sum() > 0:
                x = -x
            x, _ = block(x, x, x.mean(1))
        result: Tensor = self.head(x)
        return result


class Changing(Conditioned):
    """Does something else, once it is told to."""

    changed = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x * 2 if self.changed else x + 2
        for block in self.blocks:
            x, _ = block(x, x, x.mean(1))
        result: Tensor = self.head(x)
        return result


def of(model: Conditioned) -> Case:
    """A model with embedding, blocks and head."""
    return Case(model, [f"blocks.{at}" for at in range(len(model.blocks))], language_loss, tokens)


def masked() -> Case:
    """See `Masked`."""

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["ids"], batch["kept"]).flatten(0, 1), batch["targets"].flatten())

    return Case(Masked(), [f"blocks.{at}" for at in range(4)], forward, tokens)


def u_net() -> Case:
    """See `UNet`."""
    blocks = [f"{way}.{at}" for way in ("down", "up") for at in range(3)]
    return Case(UNet(), blocks, lambda model, b: F.mse_loss(model(b["x"], b["time"]), b["targets"]), pictures)


def conditioned() -> Case:
    """See `Conditioned`."""
    return of(Conditioned(layers=7))


def gated() -> Case:
    """See `Gated`."""
    return of(Gated())
