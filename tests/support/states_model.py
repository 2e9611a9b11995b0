"""Small models that `ShardedStates` trains, their batches, and what both sides of a comparison agree on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STEPS, ACCUMULATION, CLIP, WIDTH, VOCABULARY, BLOCKS = 4, 2, 0.5, 16, 50, 3
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
}
KINDS = ({"weight_decay": 0.1}, {"weight_decay": 0.0, "lr": 0.02}, {"weight_decay": 0.0})
"""Options of matrices, vectors, and of `seldom`."""


def kind_of(parameter: nn.Parameter) -> int:
    """The number of a parameter's options in `KINDS`."""
    return 2 if parameter.shape == (3,) else 0 if parameter.ndim >= 2 else 1


class Block(nn.Module):
    """A residual MLP with several inputs and two outputs; `frozen` is not trained, `seldom` is used by some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH), requires_grad=False)
        self.seldom = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, scale: Tensor, uses: bool) -> tuple[Tensor, Tensor]:
        if uses:
            x = x * self.seldom.mean()
        return x + self.down(F.gelu(self.up(self.norm(x)))) * self.frozen * scale, scale


class Model(nn.Module):
    """Embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, uses: bool) -> Tensor:
        x, scale = self.embed(tokens), torch.ones(WIDTH)
        for block in self.blocks:
            x, scale = block(x, scale, uses)
        result: Tensor = self.head(self.norm(x))
        return result


@dataclass
class Hidden:
    """What `Mixed` returns: no registered pytree."""

    states: dict[str, Tensor]
    note: str = "none"


class Mixed(nn.Module):
    """A residual layer that takes a dictionary and returns it in a dataclass."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, states: dict[str, Tensor]) -> Hidden:
        x = states["x"]
        return Hidden({**states, "x": x + self.dropout(torch.tanh(self.layer(x)))})


FEATURES = ("frozen", "again", "skipped", "dropout", "outside", "segment", "twice", "small")
"""Of `Odd`: blocks before and between that are wholly frozen; two blocks that run A, B, A, B; a block that some
processes skip; dropout; a block recomputed outside its hooks, and two of them together; two forwards for one backward;
a block with few parameters."""


class Odd(nn.Module):
    """Blocks that are not what a Transformer's are, each where its feature is asked for."""

    def __init__(self, features: Collection[str]) -> None:
        super().__init__()
        self.features = frozenset(features)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Mixed(0.2 if "dropout" in features else 0.0) for _ in range(7))
        if "frozen" in features:
            for part in (self.embed, self.blocks[0], self.blocks[4]):
                part.requires_grad_(False)
        if "small" in features:
            self.blocks[5].layer = nn.LayerNorm(WIDTH, elementwise_affine=True, bias=False)  # type: ignore[assignment]
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, uses: bool) -> Tensor:
        order: list[tuple[int, ...]] = [(0,), (1,), (2,)]
        if "again" in self.features:
            order += [(1,), (2,)]
        if uses or "skipped" not in self.features:
            order.append((3,))
        order += [(4, 5), (6,)] if "segment" in self.features else [(4,), (5,), (6,)]
        states = {"x": self.embed(tokens)}
        for indices in order:
            if len(indices) > 1 or (indices == (6,) and "outside" in self.features):
                states = checkpoint(self.run_blocks, indices, states, use_reentrant=False)
            else:
                states = self.run_blocks(indices, states)
        result: Tensor = self.head(states["x"])
        return result

    def run_blocks(self, indices: Collection[int], states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Some blocks one after another."""
        for index in indices:
            states = self.blocks[index](states).states
        return states


def build(recomputed: bool = False, features: Collection[str] | None = None, compiled: bool = False) -> nn.Module:
    """The same weights in every process: a `Model`, or with `features` an `Odd` one."""
    torch.manual_seed(0)
    model: Any = Model() if features is None else Odd(features)
    for block in model.blocks:
        if compiled:
            block.forward = torch.compile(block.forward, backend="aot_eager")
        if recomputed:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    built: nn.Module = model
    return built


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor, bool]:
    """Tokens, targets, and whether `seldom` is used: by every other process, in turn."""
    generator = torch.Generator().manual_seed(step * 1000 + micro * 100 + rank)
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], (rank + step) % 2 == 0


def loss_of(model: nn.Module, step: int, micro: int, rank: int, world: int) -> Tensor:
    """This process's share of the mean over the global batch."""
    tokens, targets, uses = batch(step, micro, rank)
    torch.manual_seed(step * 1000 + micro * 100 + rank)
    logits = model(tokens, uses)
    if "twice" in getattr(model, "features", ()):
        logits = logits + model(tokens.flip(0), uses).flip(0)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / (ACCUMULATION * world)


def evaluate(model: nn.Module) -> float:
    """A loss of held-out tokens in evaluation mode."""
    model.eval()
    with torch.no_grad():
        loss = float(loss_of(model, 99, 0, 0, 1))
    model.train()
    return loss
