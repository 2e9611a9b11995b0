"""A spot check of predicted against published throughput: torchtitan's table for 64 A100.

    python benchmarks/published.py

Source of the measured column: github.com/pytorch/torchtitan, docs/performance.md of 2024-08 (64 A100-80GB, FSDP2,
bf16, tokens per second and GPU). The layouts are theirs; `strategy` pins them. Their "selective layer" recomputes every
second block, which costs what recomputing the first half does. The constants were fitted on data that holds these rows,
so agreement shows that the model is consistent with them, not how it does elsewhere.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.passes import profile_model
from shardwright.planner import make_plan
from shardwright.schemas import load_job
from shardwright.schemas.plan import Infeasible, Plan


class Run(NamedTuple):
    """One published run; shapes are those of a Llama."""

    name: str
    layers: int
    hidden: int
    ffn: int
    kv_heads: int
    vocabulary: int
    sequence: int
    micro_batch: int
    checkpointed: int
    tokens_per_s_per_gpu: int


RUNS = (
    Run("Llama-3-8B, half the blocks recomputed", 32, 4096, 14336, 8, 128256, 8192, 1, 16, 2904),
    Run("Llama-3-70B, all recomputed", 80, 8192, 28672, 8, 128256, 8192, 1, 80, 331),
    Run("Llama-2-13B, none recomputed", 40, 5120, 13824, 40, 32000, 4096, 2, 0, 2162),
    Run("Llama-2-13B, half recomputed", 40, 5120, 13824, 40, 32000, 4096, 2, 20, 1914),
    Run("Llama-2-70B, all recomputed", 80, 8192, 28672, 8, 32000, 4096, 2, 80, 353),
)


def job_text(run: Run) -> str:
    """The job file of a run, its layout pinned."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": run.layers,
        "hidden_size": run.hidden,
        "intermediate_size": run.ffn,
        "num_attention_heads": run.hidden // 128,
        "num_key_value_heads": run.kv_heads,
        "vocab_size": run.vocabulary,
        "max_position_embeddings": run.sequence,
    }
    return f"""
model: {{hf: {config}}}
data: {{synthetic: {{vocabulary: {run.vocabulary}}}}}
train: {{sequence_length: {run.sequence}, global_batch: {64 * run.micro_batch}, steps: 1}}
cluster: {{devices: 64 x a100-sxm-80gb}}
strategy:
  pp: 1
  states: {{parameters: all, gradients: all, optimizer_states: all}}
  reshard_after_forward: true
  micro_batch: {run.micro_batch}
  checkpointing: {run.checkpointed}
  precision: bf16_mixed
"""


def planned(text: str) -> Plan | Infeasible:
    """What is planned for the text of a job file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(text)
        loaded = load_job(path)
        profile = profile_model(loaded.job, loaded.folder, ("bf16",))
        return make_plan(loaded.job, profile, job_file=path.name, defaults=loaded.defaults)


def main() -> None:
    """Print one row a run."""
    print(f"{'tokens/s per GPU':40} {'predicted':>9} {'published':>9} {'ratio':>6}")
    for run in RUNS:
        plan = planned(job_text(run))
        if not isinstance(plan, Plan):
            print(f"{run.name:40} does not fit, by prediction: {plan.needed_bytes / 2**30:.1f} GiB reserved")
            continue
        rate = plan.prediction.tokens_per_s / 64
        print(f"{run.name:40} {rate:9.0f} {run.tokens_per_s_per_gpu:9d} {rate / run.tokens_per_s_per_gpu:6.2f}")


if __name__ == "__main__":
    main()
