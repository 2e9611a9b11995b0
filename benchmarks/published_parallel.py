"""A spot check of predicted against published step times: runs with tensor, pipeline, context or expert parallelism.

    python benchmarks/published_parallel.py

Every row pins the layout that its publisher states. Where ours cannot be the same, `differs` says in what. Ratios are
published / predicted time of a step: above 1 the run was slower than predicted; the reserved GiB beside the plan are
predicted. Sources:

- playbook: Hugging Face, The Ultra-Scale Playbook, `fragments/tp_scaling.html` and `tp_sp_scaling.html`.
- megatron 2021: arXiv 2104.04473, table 1 and equation 3; github.com/NVIDIA/Megatron-LM, images/cases_april2021.png.
- megatron 2022: arXiv 2205.05198, table 5.
- torchtitan: arXiv 2410.06511, tables of 3-D parallelism and of context parallelism; its H100 has 96 GB and 500 W.
- automodel: github.com/NVIDIA-NeMo/Automodel, docs/performance-summary.mdx.
- moe zoo: github.com/yanring/Megatron-MoE-ModelZoo, best_practice/qwen3/readme.md.
"""

import json
import time
from typing import Any, NamedTuple

from published import planned

from shardwright.schemas.plan import Plan


class Run(NamedTuple):
    """One published run."""

    name: str
    config: dict[str, Any]
    devices: str
    gpus: int
    sequence: int
    batch: int
    """Sequences of a step."""
    strategy: dict[str, Any]
    step_s: float
    differs: str = ""
    memory: str = "192GB"
    """Of a device, for prediction: more than it has where recomputation is pinned, so that time is compared also where
    the plan is predicted to be too large."""


def gpt(layers: int, hidden: int, heads: int, sequence: int = 2048) -> dict[str, Any]:
    """A GPT as Megatron-LM trains it, its vocabulary padded."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "n_positions": sequence,
        "vocab_size": 51200,
    }


def llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    """A Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2**20,
        "tie_word_embeddings": tied,
    }


PLAYBOOK = llama(28, 3072, 8192, 32, 32, 131072, True)
LLAMA_8B = llama(32, 4096, 14336, 32, 8, 128256, False)
LLAMA_70B = llama(80, 8192, 28672, 64, 8, 128256, False)
LLAMA_405B = llama(126, 16384, 53248, 128, 8, 128256, False)


def qwen3_moe(layers: int, hidden: int, experts_ffn: int, heads: int) -> dict[str, Any]:
    """A Qwen3 of 128 experts, of which 8 for each token."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "moe_intermediate_size": experts_ffn,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    }


H100, A100 = "h100-sxm-80gb", "a100-sxm-80gb"


def _playbook(tp: int, batch: int, tokens_per_s: float, sequence: bool) -> Run:
    strategy = {"tp": tp, "micro_batch": batch, "checkpointing": "none", "tensor_parallel": {"sequence": sequence}}
    name = f"playbook 3B, tp {tp}{', sequence' if sequence else ''}"
    return Run(name, PLAYBOOK, H100, tp, 4096, batch, strategy, batch * 4096 / (tokens_per_s * tp))


def _megatron(name: str, shape: tuple[int, int, int], gpus: int, tp: int, micro: int, batch: int, step_s: float) -> Run:
    strategy = {"tp": tp, "micro_batch": micro, "checkpointing": "full", "tensor_parallel": {"sequence": False}}
    differs = "its replicas hold whole states, ours spread them" if gpus > tp else ""
    return Run(name, gpt(*shape), A100, gpus, 2048, batch, strategy, step_s, differs)


RUNS = (
    _playbook(2, 3, 13923, False),
    _playbook(4, 8, 12421, False),
    _playbook(8, 12, 10903, False),
    _playbook(2, 4, 14167, True),
    _playbook(4, 10, 13460, True),
    _playbook(8, 20, 10889, True),
    _megatron("megatron 2021 3.6B, tp 2", (30, 3072, 32), 64, 2, 16, 512, 3.697),
    _megatron("megatron 2021 7.5B, tp 4", (36, 4096, 32), 128, 4, 16, 512, 3.696),
    _megatron("megatron 2021 18.4B, tp 8", (40, 6144, 48), 256, 8, 8, 1024, 9.399),
    _megatron("megatron 2022 22B, tp 8", (48, 6144, 64), 8, 8, 4, 4, 1.42),
    Run(
        "megatron 2022 175B, tp 8, pp 8",
        gpt(96, 12288, 96),
        A100,
        64,
        2048,
        64,
        {
            "tp": 8,
            "pp": 8,
            "schedule": "interleaved-1f1b",
            "chunks": 3,
            "micro_batch": 1,
            "checkpointing": "full",
            "tensor_parallel": {"sequence": False},
        },
        18.13,
    ),
    Run(
        "torchtitan 70B, 256 GPUs, tp 8",
        LLAMA_70B,
        H100,
        256,
        8192,
        16 * 32,
        {"tp": 8, "pp": 1, "checkpointing": "full", "micro_batch": 16, "engine": "fsdp2"},
        16 * 32 * 8192 / (829 * 256),
        "the H100 of 96 GB",
    ),
    Run(
        "torchtitan 405B, 512 GPUs, tp 8, pp 8, 1f1b",
        LLAMA_405B,
        H100,
        512,
        8192,
        32 * 8,
        {"tp": 8, "pp": 8, "schedule": "1f1b", "micro_batch": 1},
        32 * 8 * 8192 / (100 * 512),
        "the H100 of 96 GB; recomputation and batch not stated",
        "96GB",
    ),
    *(
        Run(
            f"torchtitan 8B, 8 GPUs, {sequence // 1024}k, cp {cp}",
            LLAMA_8B,
            H100,
            8,
            sequence,
            8 // cp,
            {"tp": 1, "pp": 1, "cp": cp, "micro_batch": 1, "checkpointing": "full", "engine": "fsdp2"},
            (8 // cp) * sequence / (rate * 8),
            "the H100 of 96 GB",
        )
        for sequence, cp, rate in ((32768, 1, 3890), (65536, 2, 2540), (131072, 4, 1071), (262144, 8, 548))
    ),
    Run(
        "automodel 70B, 64 GPUs, cp 2",
        LLAMA_70B,
        H100,
        64,
        8192,
        128,
        {"tp": 1, "pp": 1, "cp": 2, "micro_batch": 1, "engine": "fsdp2"},
        128 * 8192 / (866.77 * 64),
        memory="80GB",
    ),
    Run(
        "automodel Qwen3-30B, 8 GPUs, ep 8",
        qwen3_moe(48, 2048, 768, 32),
        H100,
        8,
        4096,
        512,
        {"tp": 1, "pp": 1, "ep": 8, "engine": "fsdp2"},
        512 * 4096 / (12040 * 8),
        "its kernels for experts are its own; recomputation not stated, micro-batch 4",
    ),
    Run(
        "moe zoo Qwen3-235B, tp 4, pp 8, ep 8",
        qwen3_moe(94, 4096, 1536, 64),
        H100,
        256,
        4096,
        2048,
        {"tp": 4, "pp": 8, "ep": 8, "micro_batch": 1, "schedule": "interleaved-1f1b", "chunks": 4},
        29.0,
        "its experts are whole on each of the 4 tp processes",
        "80GB",
    ),
    Run(
        "the same on ours without tp",
        qwen3_moe(94, 4096, 1536, 64),
        H100,
        256,
        4096,
        2048,
        {"tp": 1, "pp": 8, "ep": 8, "micro_batch": 1, "checkpointing": "full"},
        29.0,
        "another layout",
    ),
)


def job_text(run: Run) -> str:
    """The job file of a run, its layout pinned; JSON is YAML."""
    vocabulary = run.config["vocab_size"]
    return json.dumps(
        {
            "model": {"hf": run.config, "init": "modules"},
            "data": {"synthetic": {"vocabulary": vocabulary}},
            "train": {"sequence_length": run.sequence, "global_batch": run.batch, "steps": 1},
            "cluster": {"devices": f"{run.gpus} x {run.devices}", "memory": run.memory},
            "strategy": {"precision": "bf16_mixed", **run.strategy},
        }
    )


def main() -> None:
    """Print one row a run."""
    print(f"{'seconds a step':46} {'predicted':>9} {'published':>9} {'ratio':>6}  plan")
    for run in RUNS:
        began = time.perf_counter()
        plan = planned(job_text(run))
        if not isinstance(plan, Plan):
            print(f"{run.name:46} does not fit, by prediction: {plan.needed_bytes / 2**30:.1f} GiB reserved")
            continue
        seconds = plan.prediction.step_time_s
        took = time.perf_counter() - began
        reserved = plan.prediction.memory.peak_reserved_bytes / 2**30
        print(f"{run.name:46} {seconds:9.2f} {run.step_s:9.2f} {run.step_s / seconds:6.2f}  {plan.name}", end="")
        print(f"; {reserved:.1f} GiB; planned in {took:.0f} s{'; ' + run.differs if run.differs else ''}", flush=True)


if __name__ == "__main__":
    main()
