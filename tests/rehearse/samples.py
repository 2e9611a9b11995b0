"""Small clusters, decisions and plans, made by hand."""

from __future__ import annotations

from math import prod
from typing import Any

from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Decision, Plan

GPU = {
    "name": "gpu",
    "kind": "cuda",
    "memory": "80GiB",
    "peak": {"bf16": "900TFLOP/s", "fp32": "60TFLOP/s"},
    "memory_bandwidth": "3000GB/s",
}
PREDICTION = {
    "step_time_s": 1.0,
    "time": [],
    "tokens_per_s": 1.0,
    "mfu": 0.5,
    "mfu_formula": "",
    "model_flops_per_step": 1.0,
    "memory": {
        "peak_allocated_bytes": 1,
        "peak_reserved_bytes": 1,
        "stages": [],
        "at_rest": {"parameters": 1, "gradients": 1, "optimizer_states": 1},
        "host_bytes": 1,
    },
    "collectives": [],
}
SYNTHETIC_JOB = {
    "model": {"factory": "model:build", "args": {"layers": 12}},
    "data": {"synthetic": {"vocabulary": 1000}},
    "train": {"sequence_length": 1024, "global_batch": 64, "steps": 100, "schedule": {"warmup": 20}},
}


def cluster(*levels: tuple[str, int]) -> ClusterSpec:
    """Levels by name and size, fastest first."""
    joined = [{"name": name, "size": size, "bandwidth": "100GB/s", "latency": "5us"} for name, size in levels]
    return ClusterSpec.model_validate({"name": "test", "device": GPU, "levels": joined, "host_memory": "1TiB"})


def decision(*axes: tuple[str, int], engine: str = "fsdp2", precision: str = "bf16_mixed", **changes: Any) -> Decision:
    """A decision for a mesh, slowest axis first; `gradients`, `blocks`, `of` and `reshard` beside its own keys.

    `parameters`, `optimizer` and `secondary`: degrees, where they do not follow from dp_shard.
    """
    sizes = dict(axes)
    degree = changes.pop("parameters", sizes.get("dp_shard", 1))
    optimizer, secondary = changes.pop("optimizer", degree), changes.pop("secondary", None)
    world = prod(sizes.values())
    blocks, of = changes.pop("blocks", 0), changes.pop("of", 12)
    reshard = changes.pop("reshard", True)
    gradients = changes.pop("gradients", degree)
    fields = {
        "mesh": {"world_size": world, "axes": [{"name": name, "size": size, "levels": []} for name, size in axes]},
        "states": {
            "parameters": {"degree": degree, "levels": []},
            "gradients": {"degree": gradients, "levels": []},
            "optimizer_states": {"degree": optimizer, "levels": []},
            "secondary": None if secondary is None else {"degree": secondary, "levels": []},
        },
        "micro_batch": 1,
        "accumulation": 1,
        "checkpointing": {"policy": "full" if blocks else "none", "blocks": blocks, "of": of},
        "precision": precision,
        "engine": {"name": engine, "reshard_after_forward": reshard if engine in ("fsdp2", "amsp") else None},
    }
    return Decision.model_validate(fields | changes)


def plan_for(chosen: Decision, on: ClusterSpec, **job: Any) -> Plan:
    """A plan of a decision for a cluster; keys of the job may be replaced."""
    fields = SYNTHETIC_JOB | {"cluster": on} | job
    return Plan.model_validate(
        {
            "name": "test",
            "job": JobSpec.model_validate(fields),
            "defaults": [],
            "job_file": "job.yaml",
            "profile_digest": "",
            "model": {
                "name": "test",
                "parameters": 1,
                "block_paths": [],
                "init": "modules",
                "attention": "none",
                "local_sources": [],
                "packages": [],
            },
            "decision": chosen,
            "prediction": PREDICTION,
            "search": {"considered": 1, "measured": 1, "feasible": 1, "alternatives": []},
            "reasons": [],
            "assumptions": [],
        }
    )
