"""Small models with experts, and what both sides of a comparison agree on."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

STEPS, ACCUMULATION, CLIP, BATCH, LENGTH, VOCABULARY, EXPERTS, CHOSEN = 3, 2, 0.1, 2, 8, 40, 4, 2
OPTIMIZERS: dict[str, Any] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9),
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-3),
}
BLOCKS = ("model.layers.0", "model.layers.1")
LAYERS = {"model.layers.*.mlp.experts": ("num_experts",)}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": CHOSEN,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "head_dim": 4,
        },
    ),
}


def build(name: str, *, tied: bool = False, implementation: str = "grouped_mm") -> nn.Module:
    """A model with the same values in every process."""
    family, own = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        **SIZES | own, tie_word_embeddings=tied, use_cache=False, attn_implementation="sdpa"
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model


def batch(step: int, micro: int, rank: int) -> dict[str, Tensor]:
    """Tokens and targets of one process's micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
    # Few different tokens, so that some experts get more than others.
    drawn = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator) // (1 + rank)
    return {"ids": drawn[:, :-1], "targets": drawn[:, 1:]}


def summed_loss(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The sum over the targets."""
    logits = model(input_ids=given["ids"], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), given["targets"].flatten(), reduction="sum")


def targets(world: int) -> int:
    """Of a step of so many processes."""
    return ACCUMULATION * world * BATCH * LENGTH


class Trained(NamedTuple):
    """What one process has after training on every batch."""

    parameters: dict[str, Tensor]
    norms: list[float]
    losses: list[float]
    """Of the last steps."""
    evaluated: float


@functools.cache
def train_plainly(name: str, optimizer: str, tied: bool, *worlds: int) -> Trained:
    """One process that trains on the batches of so many processes, and then, from the first step on, of others."""
    model = build(name, tied=tied)
    made = OPTIMIZERS[optimizer](model.parameters())
    for world in worlds:
        norms, losses = [], []
        for step in range(STEPS):
            total = 0.0
            for micro, rank in itertools.product(range(ACCUMULATION), range(world)):
                loss = summed_loss(model, batch(step, micro, rank)) / targets(world)
                torch.autograd.backward(loss)
                total += float(loss.detach())
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            losses.append(total)
            made.step()
            made.zero_grad()
    with torch.no_grad():
        evaluated = sum(float(summed_loss(model, batch(99, 0, rank))) for rank in range(worlds[-1]))
    return Trained({key: value.detach() for key, value in model.named_parameters()}, norms, losses, evaluated)
