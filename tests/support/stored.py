"""Folders of weights as people have them, made with transformers; and what plain PyTorch trains from them."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime.data import Batches, byte_files
from shardwright.schemas.job import JobSpec

SMALL = {
    "vocab_size": 259,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""No size is a multiple of 4 throughout, so shards are uneven."""

MODELS: dict[str, dict[str, Any]] = {
    # Several files, of half the width that training has.
    "llama": {
        "config": SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
        "dtype": torch.bfloat16,
        "max_shard_size": "40KB",
    },
    # The base model alone: without a head, which is tied, and without the prefix of its names.
    "gpt2": {
        "config": {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": 259,
            "n_embd": 36,
            "n_layer": 3,
            "n_head": 6,
            "n_positions": 64,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        },
        "base": True,
    },
    # Stored expert by expert under old names, kept as one tensor a layer.
    "mixtral": {
        "config": SMALL
        | {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            # torch multiplies groups only where rows are multiples of 16 bytes.
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        }
    },
    # Stored as one matrix, kept as two; and the other way round.
    "dinov2": {
        "config": {
            "model_type": "dinov2",
            "architectures": ["Dinov2Model"],
            "hidden_size": 36,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "use_swiglu_ffn": True,
            "image_size": 16,
            "patch_size": 4,
        }
    },
    "olmo_hybrid": {
        "config": SMALL
        | {
            "model_type": "olmo_hybrid",
            "architectures": ["OlmoHybridForCausalLM"],
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "pad_token_id": 0,
        }
    },
    "bert": {
        "config": {
            "model_type": "bert",
            "architectures": ["BertForMaskedLM"],
            "vocab_size": 259,
            "hidden_size": 36,
            "intermediate_size": 50,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
        }
    },
}
PATHS = {"llama": "model.layers", "gpt2": "transformer.h", "mixtral": "model.layers"}
"""Where their blocks are."""


def model_class(name: str) -> Any:
    """The class of transformers that a model is of."""
    import transformers

    return getattr(transformers, MODELS[name]["config"]["architectures"][0])


def make_folder(folder: Path, name: str) -> Path:
    """A folder with random weights of a model: its files, configuration and a tokenizer's."""
    from transformers import AutoConfig

    made = MODELS[name]
    fields = dict(made["config"])
    torch.manual_seed(1)
    model = model_class(name)(AutoConfig.for_model(fields.pop("model_type"), **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # no bias is zero, no norm is one
    model.to(made.get("dtype", torch.float32))
    stored = model.base_model if made.get("base") else model
    stored.save_pretrained(folder, max_shard_size=made.get("max_shard_size", "5GB"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": made["config"]["architectures"]}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def from_pretrained(folder: Path, name: str) -> nn.Module:
    """What transformers itself loads, in fp32."""
    model: nn.Module = model_class(name).from_pretrained(folder, dtype=torch.float32)
    return model


def train_from(model: nn.Module, job: JobSpec, folder: Path, steps: int) -> list[float]:
    """The losses of whole batches in one plain loop, in fp32, from the model's own weights."""
    train, optim = job.train, job.train.optimizer
    assert job.data.bytes is not None
    samples = byte_files(folder, job.data.bytes, train.sequence_length)
    size = train.global_batch_sequences
    batches = Batches(samples, seed=train.seed, global_batch=size, micro_batch=size)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    losses = []
    for step in range(steps):
        warmup = train.schedule.warmup.value
        progress = (step - warmup) / max(1, train.total_steps - 1 - warmup)
        falling = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * ((step + 1) / warmup if step < warmup else falling)
        batch = batches(step)
        output = model(batch["input_ids"])
        logits = output if isinstance(output, Tensor) else output.logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert optim.clip_grad_norm is not None
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextmanager
def emitted_module(script: Path, name: str) -> Iterator[ModuleType]:
    """A script of an emitted folder as a module, with what lies beside it importable while it is used."""
    _forget()
    sys.path.insert(0, str(script))
    try:
        spec = importlib.util.spec_from_file_location(f"emitted_{name}", script / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(script))
        _forget()


def _forget() -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "shardwright_runtime":
            del sys.modules[name]


@cache
def facts(name: str) -> dict[str, Any]:
    """What `make_plan` needs to know of a model."""
    config = MODELS[name]["config"]
    count = config.get("num_hidden_layers", config.get("n_layer"))
    return {
        "init": "modules",
        "blocks": tuple(f"{PATHS[name]}.{index}" for index in range(count)),
        "sources": (),
        "packages": ("transformers",),
    }
