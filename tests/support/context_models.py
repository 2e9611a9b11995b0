"""Small causal models whose sequences several processes share, and their batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import bytes_gpt

VOCABULARY, LENGTH, BATCH, RATE, STEPS = 64, 32, 2, 0.5, 3
TENSOR = {
    "blocks.*.attention": "region",
    "blocks.*.attention.qkv": "column",
    "blocks.*.attention.out": "row",
    "blocks.*.mlp": "region",
    "blocks.*.mlp.0": "column",
    "blocks.*.mlp.2": "row",
    "blocks.*.norm1": "shared",
    "blocks.*.norm2": "shared",
}
"""How `gpt` is divided."""


class Case(NamedTuple):
    """A model, the paths of its blocks and of its head, and the width of its hidden states."""

    model: nn.Module
    blocks: list[str]
    head: str
    width: int


def gpt() -> Case:
    """The example's model."""
    model = bytes_gpt.BytesGPT(3, 32, 4, LENGTH, VOCABULARY)
    return Case(model, [f"blocks.{at}" for at in range(3)], "head", 32)


def llama() -> Case:
    """With fewer heads of keys than of queries."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    return Case(model, ["model.layers.0", "model.layers.1"], "lm_head", 32)


def mixtral() -> Case:
    """With experts, which see tokens in another order."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4, sliding_window=None, experts_implementation="eager")
    model = MixtralForCausalLM(config)  # its other experts know no double precision
    return Case(model, ["model.layers.0", "model.layers.1"], "lm_head", 32)


def build(name: str) -> Case:
    """A model in double precision, the same on every process."""
    torch.manual_seed(0)
    case: Case = {"gpt": gpt, "llama": llama, "mixtral": mixtral}[name]()
    return case._replace(model=case.model.double())


def tokens(number: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a micro-batch, the same in all steps."""
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


def loss_of(model: nn.Module, ids: Tensor, targets: Tensor, micro_batches: int, sequences: Any = None) -> Tensor:
    """The share in the mean over all targets of a step."""
    output = model(ids)
    logits = output if isinstance(output, Tensor) else output.logits
    targets = targets if sequences is None else sequences.local(targets)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss / (micro_batches * BATCH * LENGTH)


class Trained(NamedTuple):
    """What training a while gives."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


def train_plainly(name: str, micro_batches: int) -> Trained:
    """In one process."""
    model = build(name).model
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    losses, norms = [], []
    for _ in range(STEPS):
        total = 0.0
        for number in range(micro_batches):
            loss = loss_of(model, *tokens(number), micro_batches)
            torch.autograd.backward(loss)
            total += loss.item()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, norms, {name: each.detach() for name, each in model.named_parameters()})
