"""Small models, one of each kind that tensor parallelism divides, with their tables written by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from shardwright.backends.pytorch.runtime.losses import next_token_loss
from shardwright.backends.pytorch.runtime.tensor_parallel import (
    Column,
    Local,
    Region,
    Row,
    Scatter,
    Shared,
    TensorExperts,
    Vocabulary,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from bytes_gpt import BytesGPT

SEQUENCE, VOCABULARY = 8, 61
Table = dict[str, ParallelStyle]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is divided: `table` for a number of processes, `sequence` for a divided sequence."""

    build: Callable[[], nn.Module]
    table: Callable[[int, bool], Table]
    blocks: str
    head: str
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = field(
        default=lambda model, ids, targets: next_token_loss(model(ids), targets) / targets.numel()
    )


COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "use_cache": False}


def gpt2(dropout: float = 0.0) -> nn.Module:
    """Tied, fused, Conv1D, with biases."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=SEQUENCE, use_cache=False)
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = dropout
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config)


def gpt2_table(_: int, sequence: bool) -> Table:
    """Of `gpt2`."""
    dim = 1 if sequence else None
    table: Table = {
        "transformer.wte": Vocabulary(),
        "transformer.h.*.attn": Region(sequence_dim=dim, attributes=("num_heads", "split_size")),
        "transformer.h.*.attn.c_attn": Column(parts=(32, 32, 32), units=4),
        "transformer.h.*.attn.c_proj": Row(sequence_dim=dim),
        "transformer.h.*.mlp": Region(sequence_dim=dim),
        "transformer.h.*.mlp.c_fc": Column(),
        "transformer.h.*.mlp.c_proj": Row(sequence_dim=dim),
        "lm_head": Column(enters=True),
    }
    return table | ({"transformer.h.*.ln_[12]": Shared()} if sequence else {})


def llama() -> nn.Module:
    """Rotary, grouped keys and values of fewer heads than processes, with biases, an odd vocabulary, not tied."""
    return LlamaForCausalLM(
        LlamaConfig(**COMMON, **GROUPED, intermediate_size=48, attention_bias=True, mlp_bias=True, pad_token_id=3)
    )


GROUPED: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2}


def grouped_table(size: int, sequence: bool, *, norms: bool = False) -> Table:
    """Of models that are built like Llama."""
    dim = 1 if sequence else None
    # Of 4 query heads a key-value head, each of 4 processes has 2.
    attributes = {"num_key_value_groups": max(1, size // 2)}
    table: Table = {
        "model.embed_tokens": Vocabulary(),
        "model.layers.*.self_attn": Region(sequence_dim=dim, attributes=attributes),
        "model.layers.*.self_attn.q_proj": Column(units=8),
        "model.layers.*.self_attn.[kv]_proj": Column(units=2),
        "model.layers.*.self_attn.o_proj": Row(sequence_dim=dim),
        "lm_head": Column(enters=True),
    }
    if norms:
        table["model.layers.*.self_attn.[qk]_norm"] = Shared()
    if sequence:
        table["model.layers.*.*_layernorm"] = Shared()
    return table


def dense_table(size: int, sequence: bool, *, norms: bool = False) -> Table:
    """With its own feed-forward layers."""
    dim = 1 if sequence else None
    return grouped_table(size, sequence, norms=norms) | {
        "model.layers.*.mlp": Region(sequence_dim=dim),
        "model.layers.*.mlp.gate_proj": Column(),
        "model.layers.*.mlp.up_proj": Column(),
        "model.layers.*.mlp.down_proj": Row(sequence_dim=dim),
    }


def qwen3() -> nn.Module:
    """Norms within the heads; tied."""
    return Qwen3ForCausalLM(
        Qwen3Config(**COMMON, **GROUPED, intermediate_size=48, head_dim=4, tie_word_embeddings=True)
    )


def mixtral() -> nn.Module:
    """Stacks of experts."""
    return MixtralForCausalLM(
        MixtralConfig(**COMMON, **GROUPED, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    )


def mixtral_table(size: int, sequence: bool) -> Table:
    """Of `mixtral`."""
    stacks = TensorExperts(
        dims={"gate_up_proj": 1, "down_proj": 2},
        parts={"gate_up_proj": (16, 16)},
        sequence_dim=0 if sequence else None,
        attributes=("intermediate_dim",),
    )
    table = grouped_table(size, sequence) | {"model.layers.*.mlp.experts": stacks}
    return table | ({"model.layers.*.mlp.gate": Shared()} if sequence else {})


def t5() -> nn.Module:
    """Encoder and decoder, relative positions, one table for both and the head, its own loss."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


def t5_table(_: int, sequence: bool) -> Table:
    """Of `t5`: relative positions, which later layers are given, are of own heads, so that values enter at columns."""
    assert not sequence
    attention: Table = {
        "": Local(attributes=("n_heads", "inner_dim")),
        ".q": Column(enters=True, units=4),
        ".k": Column(enters=True, units=4),
        ".v": Column(enters=True, units=4),
        ".o": Row(),
    }
    table: Table = {"lm_head": Column(enters=True)}
    for half in ("encoder", "decoder"):
        table[f"{half}.embed_tokens"] = Vocabulary()
        table[f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias"] = Scatter()
        table |= {f"{half}.block.*.layer.*.*Attention{name}": style for name, style in attention.items()}
        table[f"{half}.block.*.layer.*.DenseReluDense"] = Region()
        table[f"{half}.block.*.layer.*.DenseReluDense.wi"] = Column()
        table[f"{half}.block.*.layer.*.DenseReluDense.wo"] = Row()
    return table


def bytes_table(_: int, sequence: bool) -> Table:
    """Of the example `bytes_gpt`."""
    dim = 1 if sequence else None
    table: Table = {
        "embed": Vocabulary(),
        "blocks.*.attention": Region(sequence_dim=dim, attributes=("heads",)),
        "blocks.*.attention.qkv": Column(parts=(32, 32, 32), units=4),
        "blocks.*.attention.out": Row(sequence_dim=dim),
        "blocks.*.mlp": Region(sequence_dim=dim),
        "blocks.*.mlp.0": Column(),
        "blocks.*.mlp.2": Row(sequence_dim=dim),
        "head": Column(enters=True),
    }
    return table | ({"blocks.*.norm[12]": Shared()} if sequence else {})


def own_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """The mean that a model of transformers computes itself."""
    loss: Tensor = model(input_ids=ids, labels=targets).loss
    return loss


CASES: dict[str, Case] = {
    "gpt2": Case(build=gpt2, table=gpt2_table, blocks="transformer.h", head="lm_head"),
    "gpt2 dropout": Case(build=lambda: gpt2(0.2), table=gpt2_table, blocks="transformer.h", head="lm_head"),
    "gpt2 own loss": Case(build=gpt2, table=gpt2_table, blocks="transformer.h", head="lm_head", loss=own_loss),
    "llama": Case(build=llama, table=dense_table, blocks="model.layers", head="lm_head"),
    "qwen3": Case(
        build=qwen3,
        table=lambda size, sequence: dense_table(size, sequence, norms=True),
        blocks="model.layers",
        head="lm_head",
    ),
    "mixtral": Case(build=mixtral, table=mixtral_table, blocks="model.layers", head="lm_head"),
    "t5": Case(build=t5, table=t5_table, blocks="encoder.block", head="lm_head", loss=own_loss),
    "bytes": Case(
        build=lambda: BytesGPT(2, 32, 4, SEQUENCE, VOCABULARY), table=bytes_table, blocks="blocks", head="head"
    ),
}


def batch(step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Ids and targets (2, SEQUENCE)."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return tuple(torch.randint(0, VOCABULARY, (2, 2, SEQUENCE), generator=generator))  # type: ignore[return-value]


def whole(name: str) -> nn.Module:
    """A model with values that do not depend on who asks, biases and norms among them away from 0 and 1."""
    torch.manual_seed(5)
    model = CASES[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.train()
