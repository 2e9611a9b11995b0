"""Plans made by hand, so that a backend is tested on its own. Their predictions are invented."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import (
    Checkpointing,
    Communication,
    Decision,
    Engine,
    Memory,
    MemoryPhase,
    Mesh,
    MeshAxis,
    ModelFacts,
    Plan,
    Prediction,
    Reason,
    Search,
    StageMemory,
    States,
    StateSharding,
    TimePart,
)

BLOCKS = tuple(f"blocks.{index}" for index in range(3))
"""Of `tests/support/tiny.py`."""


def job_fields(world: int = 1, kind: str = "cpu", **changes: Any) -> dict[str, Any]:
    """A small job as plain values; `changes` replace top-level keys or, given a mapping, keys inside them."""
    device = {
        "name": f"test {kind}",
        "kind": kind,
        "memory": "8GiB",
        "peak": {"fp32": "100GFLOP/s", "bf16": "100GFLOP/s"},
        "memory_bandwidth": "10GB/s",
    }
    fields: dict[str, Any] = {
        "model": {"factory": "tiny:build", "args": {"width": 32}},
        "data": {"bytes": ["corpus.txt"]},
        "train": {
            "sequence_length": 12,
            "global_batch": 12,
            "steps": 4,
            "optimizer": {"lr": 1e-2},
            "schedule": {"warmup": 2},
        },
        "cluster": {
            "name": "test",
            "device": device,
            "levels": [{"name": "node", "size": world, "bandwidth": "1GB/s", "latency": "10us"}],
            "host_memory": "16GiB",
        },
    }
    for key, change in changes.items():
        fields[key] = {**fields[key], **change} if isinstance(fields.get(key), Mapping) else change
    return fields


def make_plan(
    *,
    world: int = 1,
    engine: str = "single",
    shard: int = 1,
    accumulation: int = 1,
    gradients: int | None = None,
    optimizer: int | None = None,
    secondary: int | None = None,
    axes: tuple[int, ...] = (),
    int8: tuple[str, ...] = (),
    int4: tuple[str, ...] = (),
    reshard: bool = True,
    recomputed: int = 0,
    precision: str = "fp32",
    kind: str = "cpu",
    init: str = "constructor",
    blocks: tuple[str, ...] = BLOCKS,
    sources: tuple[str, ...] = ("tiny.py",),
    packages: tuple[str, ...] = (),
    reasons: tuple[Reason, ...] = (),
    **job: Any,
) -> Plan:
    """A plan of `world` devices with `shard` of them on dp_shard; the micro-batch follows from the global batch.

    Of amsp, `shard` is the degree of the parameters, and `axes` are the sizes of the mesh's axes, fastest first.
    """
    spec = JobSpec.model_validate(job_fields(world, kind, **job))

    def sharding(degree: int) -> StateSharding:
        return StateSharding(degree=degree, levels=("node",) if degree > 1 else ())

    replicate = world // shard
    if engine == "amsp":
        named = [(f"dp_{number}", size) for number, size in enumerate(axes, 1)][::-1]
    else:
        named = [("dp_replicate", replicate)] if replicate > 1 else []
        named += [("dp_shard", shard)] if engine == "fsdp2" else []
    reshards = engine == "fsdp2" or (engine == "amsp" and shard > 1)
    phase = MemoryPhase(name="backward", bytes={"parameters": 1 << 20}, total_bytes=1 << 20)
    stage = StageMemory(
        stage=0, phases=(phase,), peak_phase="backward", peak_allocated_bytes=1 << 20, peak_reserved_bytes=2 << 20
    )
    return Plan(
        name=f"{engine} x {world}",
        job=spec,
        defaults=(),
        job_file="../job.yaml",
        profile_digest="0" * 64,
        model=ModelFacts(
            name="tiny",
            parameters=12345,
            block_paths=blocks,
            init=init,  # type: ignore[arg-type]
            attention="math",
            local_sources=sources,
            packages=packages,
        ),
        decision=Decision(
            mesh=Mesh(
                world_size=world,
                axes=tuple(MeshAxis(name=name, size=size, levels=("node",)) for name, size in named),
            ),
            states=States(
                parameters=sharding(shard),
                gradients=sharding(gradients or optimizer or shard),
                optimizer_states=sharding(optimizer or shard),
                secondary=None if secondary is None else sharding(secondary),
            ),
            micro_batch=spec.train.global_batch_sequences // (world * accumulation),
            accumulation=accumulation,
            checkpointing=Checkpointing(policy="full" if recomputed else "none", blocks=recomputed, of=len(blocks)),
            precision=precision,  # type: ignore[arg-type]
            communication=Communication(int8_gathers=int8, int4_reductions=int4),
            engine=Engine(name=engine, reshard_after_forward=reshard if reshards else None),  # type: ignore[arg-type]
        ),
        prediction=Prediction(
            step_time_s=0.0123456,
            time=(TimePart(name="compute", seconds=0.01), TimePart(name="communication", seconds=0.0023456)),
            tokens_per_s=12345.6,
            mfu=0.42,
            mfu_formula="model FLOPs / (step time x peak)",
            model_flops_per_step=1e9,
            memory=Memory(
                peak_allocated_bytes=1 << 20,
                peak_reserved_bytes=2 << 20,
                stages=(stage,),
                at_rest={"parameters": 1, "gradients": 1, "optimizer_states": 2},
                host_bytes=1 << 20,
            ),
            collectives=(),
        ),
        search=Search(considered=1, measured=1, feasible=1, alternatives=()),
        reasons=reasons,
        assumptions=(),
    )
