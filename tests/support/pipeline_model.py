"""A small Transformer cut by hand into stages, and what both sides of a comparison agree on."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardwright.backends.pytorch.runtime.session import seed_for

STEPS, CLIP, WIDTH, HEADS, VOCABULARY, BATCH, LENGTH = 2, 0.2, 16, 2, 40, 2, 8
LR, MOMENTUM = 0.1, 0.9
CUTS = {1: (8,), 2: (3, 5), 4: (1, 3, 2, 2), 8: (1,) * 8, 16: (1,) * 16}
"""Blocks of each stage, by the number of stages."""
FEATURES = ("checkpointing", "tied", "skips", "dropout")
"""Blocks are recomputed; embedding and head have one weight; each stage of the first half sends its output to its
counterpart in the second one, too, as in a U-Net; dropout. Besides, `frozen`: embedding and first block are not
trained, nor the first norm of the others."""
Batch = tuple[Tensor, Tensor]
"""Tokens and targets."""


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(self.attention_norm(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))


class Stage(nn.Module):
    """Some blocks, the embedding before the first ones, the head behind the last ones."""

    def __init__(
        self, embed: nn.Module | None, blocks: Sequence[nn.Module], head: nn.Module | None, outputs: int
    ) -> None:
        super().__init__()
        self.embed, self.blocks, self.head, self.outputs = embed, nn.ModuleList(blocks), head, outputs

    def forward(self, batch: Batch, *received: tuple[Tensor]) -> Tensor | tuple[tuple[Tensor], ...]:
        given = [tensor for (tensor,) in received]
        x = self.embed(batch[0]) if self.embed is not None else functools.reduce(torch.add, given)
        for block in self.blocks:
            x = block(x)
        if self.head is not None:
            result: Tensor = self.head(x)
            return result
        return ((x,),) * self.outputs


def edges_of(stages: int, features: Collection[str]) -> list[tuple[int, int]]:
    """Which stages send to which."""
    skips = [(stage, stages - 1 - stage) for stage in range(stages // 2 - 1)] if "skips" in features else []
    return sorted([*((stage, stage + 1) for stage in range(stages - 1)), *skips])


def build(stages: int, features: Collection[str]) -> list[Stage]:
    """All stages, with the same weights in every process."""
    torch.manual_seed(0)
    dropout = 0.2 if "dropout" in features else 0.0
    blocks: list[Any] = [Block(dropout) for _ in range(sum(CUTS[stages]))]
    embed, norm, head = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    if "tied" in features:
        head.weight = embed.weight
    for block in blocks:
        if "checkpointing" in features:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        block.attention_norm.requires_grad_("frozen" not in features)
    if "frozen" in features:
        embed.requires_grad_(False)
        blocks[0].requires_grad_(False)
    ends = [0, *accumulate(CUTS[stages])]
    edges = edges_of(stages, features)
    return [
        Stage(
            embed if stage == 0 else None,
            blocks[ends[stage] : ends[stage + 1]],
            nn.Sequential(norm, head) if stage == stages - 1 else None,
            sum(source == stage for source, _ in edges),
        )
        for stage in range(stages)
    ]


def batches(step: int, copy: int, count: int, first: int = 0) -> list[Batch]:
    """The micro-batches of one data-parallel copy of the pipeline."""
    found = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(seed_for("batch", step, copy, number))
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        found.append((tokens[:, :-1], tokens[:, 1:]))
    return found


def loss_of(logits: Tensor, batch: Batch, share: float) -> Tensor:
    """A micro-batch's part of the mean over the global batch."""
    return F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten()) * share


def dropout_seed(step: int, copy: int, stage: int, number: int) -> int:
    """The seed of a stage's forward for a micro-batch, counted over all passes of a step."""
    return seed_for("dropout", step, copy, stage, number)


def parameters_of(stages: dict[int, Stage]) -> dict[str, nn.Parameter]:
    """By stage and name."""
    return {f"{stage}.{name}": value for stage, module in stages.items() for name, value in module.named_parameters()}
