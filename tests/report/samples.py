"""Hand-made values to draw: plans, an infeasible search, a profile. No pass and no planner had a part in them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Alternative, Decision, Infeasible, Plan
from shardwright.schemas.profile import Affine, Cut, Edge, ModelProfile, Operator, Parameter, Unit, UnitCost

if TYPE_CHECKING:
    from shardwright.rehearse.report_types import RehearsalReport

GIB = 2**30

H100_NODE = ClusterSpec.model_validate(
    {
        "name": "one node",
        "device": {
            "name": "h100-sxm-80gb",
            "kind": "cuda",
            "memory": "79GiB",
            "peak": {"fp32": "67TFLOP/s", "bf16": "989TFLOP/s"},
            "memory_bandwidth": "3350GB/s",
        },
        "sources": {"device.memory": "catalogue: datasheet less the driver", "host_memory": "default: a guess"},
        "levels": [{"name": "node", "size": 8, "bandwidth": "450GB/s", "latency": "5us"}],
        "host_memory": "1TiB",
    }
)

JOB = JobSpec.model_validate(
    {
        "model": {"hf": "llama"},
        "data": {"tokens": ["mix/a.u32"]},
        "train": {"sequence_length": 8192, "global_batch": "16 sequences", "until": "20B tokens"},
        "cluster": H100_NODE,
        "budget": {"device_memory": "74GiB"},
    }
)


def decision(**changes: Any) -> Decision:
    """The sample decision, with some of its keys replaced."""
    shard = {"degree": 8, "levels": ["node"]}
    values: dict[str, Any] = {
        "mesh": {"world_size": 8, "axes": [{"name": "dp_shard", "size": 8, "levels": ["node"]}]},
        "states": {"parameters": shard, "gradients": shard, "optimizer_states": shard},
        "micro_batch": 1,
        "accumulation": 2,
        "checkpointing": {"policy": "full", "blocks": 12, "of": 32},
        "precision": "bf16_mixed",
        "engine": {"name": "fsdp2", "reshard_after_forward": True},
    }
    return Decision.model_validate(values | changes)


PHASES = {
    "forward": {"parameters": 5 * GIB, "gathered": GIB, "optimizer_states": 8 * GIB, "activations": 30 * GIB},
    "loss": {"parameters": 5 * GIB, "gathered": GIB, "optimizer_states": 8 * GIB, "activations": 40 * GIB},
    "backward": {
        "parameters": 5 * GIB,
        "gathered": 2 * GIB,
        "gradients": 4 * GIB,
        "optimizer_states": 8 * GIB,
        "activations": 38 * GIB,
        "temporary": GIB // 2,
    },
    "optimizer": {"parameters": 5 * GIB, "gradients": 4 * GIB, "optimizer_states": 8 * GIB, "temporary": 4096},
}

TWO_AT_A_TIME = Alternative(
    summary="FSDP2 x 8, micro-batch 2, 32 of 32 blocks checkpointed",
    decision=decision(micro_batch=2, accumulation=1, checkpointing={"policy": "full", "blocks": 32, "of": 32}),
    step_time_s=3.52,
    peak_reserved_bytes=70 * GIB,
    fits=True,
    lost_because="9.7 % slower: recomputing 20 more blocks costs more than the larger matrices bring",
)
KEPT = Alternative(
    summary="FSDP2 x 8, parameters kept after forward",
    decision=decision(engine={"name": "fsdp2", "reshard_after_forward": False}),
    step_time_s=3.05,
    peak_reserved_bytes=77 * GIB,
    fits=False,
    lost_because="does not fit: 3 GiB above the budget",
)

PLAN = Plan.model_validate(
    {
        "name": "FSDP2 x 8 (ZeRO-3), 12 of 32 blocks checkpointed",
        "job": JOB,
        "defaults": [
            "train.optimizer.momentum",
            "train.optimizer.lr",
            "train.seed",
            "train.evaluate_batches",
            "strategy.precision",
            "quality",
        ],
        "job_file": "job.yaml",
        "profile_digest": "0" * 64,
        "model": {
            "name": "LlamaForCausalLM",
            "parameters": 8_030_261_248,
            "block_paths": [f"model.layers.{index}" for index in range(32)],
            "init": "modules",
            "attention": "flash",
            "local_sources": [],
            "packages": ["transformers"],
        },
        "decision": decision(),
        "prediction": {
            "step_time_s": 3.21,
            "time": [
                {"name": "forward", "seconds": 0.9, "note": "32 blocks, embedding and head"},
                {"name": "backward", "seconds": 1.8},
                {"name": "recompute", "seconds": 0.3, "note": "12 of 32 blocks"},
                {"name": "exposed_communication", "seconds": 0.2, "note": "what no computation hides"},
                {"name": "optimizer", "seconds": 0.01},
            ],
            "tokens_per_s": 40_832.0,
            "mfu": 0.412,
            "mfu_formula": "6 N + attention, over 8 x 989TFLOP/s",
            "model_flops_per_step": 6.9e15,
            "memory": {
                "peak_allocated_bytes": int(57.5 * GIB),
                "peak_reserved_bytes": 60 * GIB,
                "stages": [
                    {
                        "stage": 0,
                        "phases": [
                            {"name": name, "bytes": sizes, "total_bytes": sum(sizes.values())}
                            for name, sizes in PHASES.items()
                        ],
                        "peak_phase": "backward",
                        "peak_allocated_bytes": int(57.5 * GIB),
                        "peak_reserved_bytes": 60 * GIB,
                    }
                ],
                "at_rest": {"parameters": 5 * GIB, "gradients": 4 * GIB, "optimizer_states": 8 * GIB},
                "host_bytes": 12 * GIB,
            },
            "collectives": [
                {
                    "kind": "all_gather",
                    "axis": "dp_shard",
                    "group_size": 8,
                    "bytes": 436_207_616,
                    "count": 128,
                    "purpose": "parameters",
                },
                {
                    "kind": "all_reduce",
                    "axis": "world",
                    "group_size": 8,
                    "bytes": 24,
                    "count": 1,
                    "purpose": "metrics",
                },
            ],
        },
        "search": {"considered": 1204, "measured": 400, "feasible": 310, "alternatives": [TWO_AT_A_TIME, KEPT]},
        "reasons": [
            {
                "key": "decision.states.parameters",
                "value": "1/8",
                "because": "whole parameters do not fit: 15 GiB more on each device",
            },
            {
                "key": "decision.states.gradients",
                "value": "1/8",
                "because": "reducing every micro-batch costs 0.1 s and saves 26 GiB",
            },
            {
                "key": "decision.micro_batch",
                "value": "1",
                "because": "2 would need every block recomputed (9.7 % slower)",
            },
        ],
        "assumptions": [
            {
                "name": "matmul_efficiency",
                "value": "0.72",
                "origin": "default",
                "source": "measured on H100 by several published runs",
            },
            {"name": "device.memory", "value": "79GiB", "origin": "catalogue", "source": "datasheet less the driver"},
        ],
    }
)

AMSP = PLAN.model_copy(
    update={
        "name": "AMSP 8/1/64 of 512 (hpZ 2, int8 gathers, int4 reductions), bf16",
        "decision": decision(
            mesh={
                "world_size": 512,
                "axes": [
                    {"name": "dp_4", "size": 8, "levels": ["rail"]},
                    {"name": "dp_3", "size": 8, "levels": ["rail"]},
                    {"name": "dp_2", "size": 4, "levels": ["node"]},
                    {"name": "dp_1", "size": 2, "levels": ["node"]},
                ],
            },
            states={
                "parameters": {"degree": 8, "levels": ["node"]},
                "gradients": {"degree": 1, "levels": []},
                "optimizer_states": {"degree": 64, "levels": ["node", "rail"]},
                "secondary": {"degree": 2, "levels": ["node"]},
            },
            communication={"int8_gathers": ["dp_2"], "int4_reductions": ["dp_2", "dp_3"]},
            engine={"name": "amsp", "reshard_after_forward": True},
        ),
    }
)
"""Each state at a degree of its own; all else as in `PLAN`."""

INFEASIBLE = Infeasible(
    needed_bytes=77 * GIB,
    available_bytes=74 * GIB,
    nearest=KEPT,
    by_category={"parameters": 10 * GIB, "optimizer_states": 40 * GIB, "activations": 20 * GIB, "temporary": 0},
    changes=("budget.device_memory: 83GiB", "cluster: 16 devices in place of 8, at least twice the price an hour"),
    considered=1204,
)


def _operator(phase: Any, flops: int, name: str = "mm", module: str = "mlp") -> Operator:
    return Operator(
        name=name,
        module=module,
        phase=phase,
        kind="matmul",
        count=1,
        flops=Affine(0, flops),
        bytes=Affine(0, 1000),
        shapes=((8, 8), (8, 64)),
        dtype="float32",
        results=Affine(0, 4096 * (phase == "forward")),
        kept=Affine(0, 2048 * (phase == "forward")),
    )


def _cost(flops: int, saved: int, module: str = "mlp") -> UnitCost:
    return UnitCost(
        operators=(
            _operator("forward", flops, module=module),
            _operator("forward", 0, "gelu", "act"),
            _operator("input_gradient", flops, module=module),
            _operator("weight_gradient", flops, module=module),
        ),
        saved={"none": Affine(0, saved), "selective": Affine(0, saved // 2), "full": Affine(0, saved // 10)},
        output=Affine(0, 64),
        forward_peak=Affine(0, saved),
        backward_peak={"none": Affine(0, saved), "full": Affine(0, saved)},
    )


def _blocks(fingerprint: str, paths: tuple[str, ...], module: str = "Block") -> Unit:
    cost = _cost(4_000_000 * ord(fingerprint), 400_000)
    fused = _cost(4_000_000 * ord(fingerprint), 300_000)
    return Unit(
        kind="block",
        paths=paths,
        fingerprint=fingerprint,
        module=module,
        costs={"fp32": cost},
        compiled={"fp32": fused},
    )


PROFILE = ModelProfile(
    name="GPT",
    device_kind="cpu",
    sequence_length=128,
    parameters=(
        Parameter(
            name="embed.weight", shape=(256, 64), trainable=True, unit=-1, also=("head.weight",), role="embedding"
        ),
        Parameter(name="blocks.0.mlp.weight", shape=(64, 256), trainable=True, unit=1, role="matrix"),
        Parameter(name="blocks.1.mlp.weight", shape=(64, 256), trainable=True, unit=1, role="matrix"),
        Parameter(name="blocks.2.experts", shape=(4, 64, 256), trainable=True, unit=2, role="experts"),
    ),
    buffer_bytes=0,
    units=(
        Unit(kind="embedding", paths=(), fingerprint="a", costs={"fp32": _cost(0, 512, "embed")}),
        _blocks("b", ("blocks.0", "blocks.1")),
        _blocks("d", ("blocks.2",)),
        Unit(kind="head", paths=(), fingerprint="c", costs={"fp32": _cost(2_000_000, 131_072, "head")}),
    ),
    cuts=tuple(
        Cut(after=after, tensors=1 + index % 2, bytes=32_768 * (1 + index % 2))
        for index, after in enumerate(("embedding", "blocks.0", "blocks.1", "blocks.2"))
    ),
    edges=(
        Edge(source="embedding", target="blocks.0", kind="chain", tensors=1, bytes=32_768),
        Edge(source="blocks.0", target="blocks.1", kind="chain", tensors=1, bytes=32_768),
        Edge(source="blocks.1", target="blocks.2", kind="chain", tensors=1, bytes=32_768),
        Edge(source="blocks.0", target="blocks.2", kind="skip", tensors=1, bytes=32_768),
        Edge(source="embedding", target="head", kind="skip", tensors=2, bytes=65_536),
        Edge(source="blocks.2", target="head", kind="chain", tensors=1, bytes=32_768),
    ),
    attention={"fp32": "cpu-flash"},
    init="constructor",
    input_bytes=Affine(0, 2048),
    local_sources=("model.py",),
    packages=(),
    warnings=("blocks.2 draws random numbers",),
    digest="1" * 64,
)


def alternating(times: int = 4) -> ModelProfile:
    """A model whose blocks alternate (two of a kind, one of another), and end on the first kind."""
    runs: list[Unit] = []
    for index in range(times):
        runs += [
            _blocks("b", (f"layers.{3 * index}", f"layers.{3 * index + 1}")),
            _blocks("d", (f"layers.{3 * index + 2}",)),
        ]
    runs.append(_blocks("b", (f"layers.{3 * times}",)))
    return replace(PROFILE, units=(PROFILE.units[0], *runs, PROFILE.units[-1]), parameters=(), cuts=(), edges=())


def different(count: int) -> ModelProfile:
    """A model without two equal blocks, the first half of which hands something to the second half."""
    paths = [f"down.{index}" if index < count // 2 else f"up.{index - count // 2}" for index in range(count)]
    blocks = [_blocks(chr(0x100 + index), (path,), f"Stage{index}") for index, path in enumerate(paths)]
    edges = tuple(
        Edge(source=paths[index], target=paths[-1 - index], kind="skip", tensors=1, bytes=2**20 * (index + 1))
        for index in range(count // 2 - 1)
    )
    units = (PROFILE.units[0], *blocks, PROFILE.units[-1])
    return replace(PROFILE, units=units, parameters=(), cuts=(), edges=edges)


HOSTILE = ('<script>alert("1")</script>', "\x00\x1b[2J\ud800", "層" * 60, "a&b'c]]>", "-->", "x" * 200)


def hostile() -> ModelProfile:
    """Names that a user may have given to modules and classes, and would not have."""
    blocks = [_blocks(chr(0x100 + index), (name,), name) for index, name in enumerate(HOSTILE)]
    parameters = tuple(
        Parameter(name=f"{name}.weight", shape=(2,), trainable=True, unit=1 + index, also=(f"{HOSTILE[0]}.weight",))
        for index, name in enumerate(HOSTILE)
    )
    skips = (Edge(source=HOSTILE[0], target=HOSTILE[3], kind="skip", tensors=1, bytes=64),)
    units = (PROFILE.units[0], *blocks, PROFILE.units[-1])
    warnings = (HOSTILE[0],)
    return replace(
        PROFILE, name=HOSTILE[0], units=units, parameters=parameters, edges=skips, cuts=(), warnings=warnings
    )


def rehearsal() -> RehearsalReport:
    """A rehearsal of which one check failed."""
    from shardwright.rehearse.report_types import Change, Check, RehearsalReport, Run

    return RehearsalReport(
        plan=PLAN.name,
        rehearsed="FSDP2 x 4 (ZeRO-3), 1 of 2 blocks checkpointed",
        processes=4,
        steps=3,
        shrunk=(
            Change(key="decision.mesh.dp_shard", before="8", after="4", because="at most 4 processes"),
            Change(key="model.num_hidden_layers", before="32", after="2"),
        ),
        runs=(Run(name="adamw, fp32", seconds=4.21),),
        checks=(
            Check(
                run="adamw, fp32", name="loss", expected="5.545177", found="5.545178", tolerance="1e-05", passed=True
            ),
            Check(
                run="adamw, fp32",
                name="gradients at rest",
                expected="1024 B",
                found="2048 B",
                tolerance="exact",
                passed=False,
            ),
        ),
    )
