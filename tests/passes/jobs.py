"""Jobs for the tests of the passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwright.schemas.job import JobSpec

USER = Path(__file__).parent / "user"
"""A job's folder with a model in it."""

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 320,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
}
LLAMA_3_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
"""https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json"""
LLAMA_3_70B = {
    **LLAMA_3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def make_job(
    model: dict[str, Any],
    *,
    kind: str = "cuda",
    length: int = 32,
    data: dict[str, Any] | None = None,
) -> JobSpec:
    """A job with this model; everything else small."""
    return JobSpec.model_validate(
        {
            "model": model,
            "data": data or {"tokens": ["corpus.u16"]},
            "train": {"sequence_length": length, "global_batch": 8, "steps": 2},
            "cluster": {
                "name": "two",
                "device": {
                    "name": "device",
                    "kind": kind,
                    "memory": "80GiB",
                    "peak": {"fp32": "60TFLOP/s", "bf16": "900TFLOP/s"},
                    "memory_bandwidth": "3000GB/s",
                },
                "levels": [{"name": "node", "size": 2, "bandwidth": "400GB/s", "latency": "5us"}],
                "host_memory": "1TiB",
            },
        }
    )
