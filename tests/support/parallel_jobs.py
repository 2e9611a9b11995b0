"""Jobs of tiny models that are planned and compiled as a user's are, with the layout that a test pins."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from shardwright.passes import profile_model
from shardwright.planner import make_plan, needed_dtypes
from shardwright.schemas import load_job
from shardwright.schemas.plan import Plan
from shardwright.schemas.profile import ModelProfile
from support.launch import emit_into

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SEQUENCE = 16
VOCABULARY = 97
"""Divides by nothing."""
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCABULARY}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 32,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA = {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama", **HEADS, "num_attention_heads": 8}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "num_layers": 2,
    "num_decoder_layers": 2,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
MIXTRAL = {
    **SIZES,
    **HEADS,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.0,
}
QWEN3_MOE = {
    **SIZES,
    **HEADS,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
DEEPSEEK_V3 = {
    **SIZES,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
"""The first block is dense; the experts of the second have one beside them that all tokens share."""
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"hf": GPT2},
    "gpt2 dropout": {"hf": GPT2 | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}},
    "llama": {"hf": LLAMA},
    "llama stored": {"hf": LLAMA, "weights": "llama"},
    "t5": {"hf": T5, "loss": "model", "inputs": {"input_ids": "input_ids", "labels": "targets"}},
    "mixtral": {"hf": MIXTRAL},
    "mixtral stored": {"hf": MIXTRAL, "weights": "mixtral"},
    "qwen3 moe": {"hf": QWEN3_MOE},
    "deepseek v3": {"hf": DEEPSEEK_V3},
    "bytes gpt": {
        "factory": "bytes_gpt:build",
        "args": {"layers": 2, "width": 32, "heads": 4, "context": SEQUENCE},
        "init": "constructor",
    },
}
IN_BF16 = ("llama", "mixtral")
"""Models that are trained in bf16, too."""
UP_TO_FOUR = ("gpt2", "llama")
"""Models whose layers four processes share, too."""
DATA = {
    "tokens": ["corpus.u8"],
    "mask": ["corpus.mask"],
    "validation": {"files": ["held-out.u8"], "mask": ["held-out.mask"]},
}
"""A third of the targets are not learnt, in stretches: processes that share sequences have different numbers."""
SGD = {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "clip_grad_norm": 0.5}}
PLAIN = {"tp": 1, "cp": 1, "ep": 1, "pp": 1, "micro_batch": 1, "checkpointing": "none", "precision": "fp32"}
NO_SEQUENCE = {"tensor_parallel": {"sequence": False}}


@dataclass(frozen=True)
class Case:
    """A model with a layout that the job pins, and how the script is run."""

    model: str
    world: int
    strategy: dict[str, Any]
    train: dict[str, Any] = field(default_factory=lambda: SGD)
    label: str = "sgd"
    argv: tuple[str, ...] = ()
    out: str = ""
    """Folder of the run; empty for one of its own."""
    signal: tuple[int, int, int] | None = None
    """Number, rank, and the step after which it is sent."""
    keeps: bool = False
    """Whether each process keeps its own parameters for the test."""

    @property
    def name(self) -> str:
        """Its folder."""
        words = [f"{key} {value}" for key, value in self.strategy.items()]
        text = re.sub(r"[^a-z0-9]+", " ", " ".join(words).lower()).strip()
        return f"{self.model} {self.label} {self.world} {text}"

    @property
    def job(self) -> dict[str, Any]:
        """What a user would write."""
        train = {"sequence_length": SEQUENCE, "global_batch": 8, "steps": 3, "evaluate_batches": 1}
        return {
            "model": MODELS[self.model],
            "data": DATA,
            "train": train | self.train,
            "cluster": {"devices": f"{self.world} x cpu"},
            "strategy": PLAIN | self.strategy,
        }


def make_jobs_folder(folder: Path) -> Path:
    """A folder for jobs, with the data and the stored weights that they name."""
    generator = torch.Generator().manual_seed(0)
    for name, size in (("corpus", 3000), ("held-out", 500)):
        tokens = torch.randint(VOCABULARY, (size,), generator=generator, dtype=torch.uint8)
        learnt = torch.rand(size // 10, generator=generator).repeat_interleave(10) < 0.67
        (folder / f"{name}.u8").write_bytes(bytes(tokens.tolist()))
        (folder / f"{name}.mask").write_bytes(bytes(learnt.to(torch.uint8).tolist()))
    shutil.copy(EXAMPLES / "bytes_gpt.py", folder)
    return folder


def planned(case: Case, folder: Path) -> Plan:
    """The plan of a case, as `compile` makes it but for its profile, which all cases of a model share."""
    path = written(folder, case.name, case.job)
    loaded = load_job(path)
    profile = profile_of(folder, case.model.removesuffix(" stored"), case.strategy == case.strategy | NO_SEQUENCE)
    plan = make_plan(loaded.job, profile, job_file=path.name, defaults=loaded.defaults)
    assert isinstance(plan, Plan), plan
    return plan


@cache
def profile_of(folder: Path, model: str, whole_sequences: bool) -> ModelProfile:
    """A model's profile for all layouts of the cases."""
    shared = {
        "tp": [1, 2, 4] if model in UP_TO_FOUR else [1, 2],
        "precision": ["fp32", "bf16_mixed"] if model in IN_BF16 else "fp32",
        **(NO_SEQUENCE if whole_sequences else {}),
    }
    loaded = load_job(written(folder, f"profile {model}", Case(model, 8, shared).job))
    return profile_model(loaded.job, loaded.folder, needed_dtypes(loaded.job))


def written(folder: Path, name: str, job: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(job))
    return path


def launched(case: Case, folder: Path) -> dict[str, Any]:
    """A run of the case's script, as `run_forked` takes it."""
    script = emit_into(planned(case, folder), folder, case.name)
    run = {"folder": str(script), "argv": ["--out", str(out_of(folder, case)), *case.argv], "ends": "done"}
    return run | ({"signal": case.signal} if case.signal else {}) | ({"keeps": True} if case.keeps else {})


def out_of(folder: Path, case: Case) -> Path:
    return folder / (case.out or f"{case.name}/out")
