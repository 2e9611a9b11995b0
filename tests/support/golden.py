"""Plans that together use everything an emitted script can hold, by the name of their golden folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardwright.schemas.plan import Plan, Reason
from support.parallel_plans import GPT2_DIVISIONS, LLAMA_DIVISIONS, MIXTRAL_EXPERTS, parallel_plan
from support.pipeline_plans import pipeline_plan
from support.plans import BLOCKS, make_plan

LEVELS = [
    {"name": "node", "size": 8, "bandwidth": "400GB/s", "latency": "5us"},
    {"name": "rail", "size": 2, "bandwidth": "50GB/s", "latency": "10us"},
]
"""Two nodes of eight."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 259, "n_embd": 64, "n_head": 4}

MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}

GROUPS = {
    "lr": 1e-2,
    "no_decay": ["embed*", "positions.*"],
    "groups": [
        {"match": ["head.*", "norm.*"], "lr_scale": 0.5, "weight_decay": 0.0},
        {"match": "blocks.0.*", "weight_decay": 0.3},
    ],
}

REASONS = (
    Reason(
        key="mesh", value="dp_shard 8", because="One copy of the states over 8 devices. The runner-up is 4 % slower."
    ),
    Reason(key="states.parameters", value="8", because="Spread over 8 devices they take 3.74 GiB each."),
    Reason(key="engine.reshard_after_forward", value="true", because="Saves 14 GiB. Keeping them misses the budget."),
    Reason(
        key="checkpointing",
        value="2 of 3 blocks",
        because="The fewest that fit (71.3 GiB of 74 GiB reserved at the peak); recomputing takes 41 ms a step. One "
        "block fewer would be 1 % faster, but needs 2.1 GiB more than there is.",
    ),
)


PIPELINE_REASONS = (
    Reason(key="pipeline.ranks", value="4", because="The states of a fourth of the model fit on a device."),
    Reason(key="pipeline.schedule", value="zb-v", because="Idle for 7.3 % of the step; the runner-up 1f1b for 15 %."),
)

PARALLEL_REASONS = (
    Reason(key="tensor_parallel.degree", value="2", because="States and activations of half a layer fit on a device."),
    Reason(key="expert_parallel.degree", value="2", because="The tokens cross the node once; all else would gather."),
    Reason(key="context_parallel.method", value="ring", because="Keys and values travel while attention computes."),
)


def golden_plans() -> dict[str, Plan]:
    def train(**changes: Any) -> dict[str, Any]:
        return {"sequence_length": 12, "global_batch": 48, "steps": 4, **changes}

    sgd = {"name": "sgd", "lr": 0.1, "clip_grad_norm": None}
    linear = {"name": "linear", "warmup": 3, "final_ratio": 0.0}
    constant = {"name": "constant", "warmup": 5}
    held_out = {"files": ["held-out.u16"], "mask": ["held-out.mask"]}
    return {
        "single": make_plan(recomputed=3),
        "single-cuda-synthetic": make_plan(
            kind="cuda", accumulation=2, data={"bytes": None, "synthetic": {"vocabulary": 257}}, train=train()
        ),
        "ddp-sgd": make_plan(
            world=2,
            engine="ddp",
            accumulation=3,
            recomputed=1,
            data={
                "bytes": ["a.txt", "texts/*.txt"],
                "mask": ["a.mask", "texts/*.mask"],
                "validation": {"files": ["b.txt"]},
            },
            train=train(optimizer=sgd, schedule=linear, save_every=100, evaluate_every=50),
        ),
        "ddp-cuda-dataset": make_plan(
            world=16,
            engine="ddp",
            kind="cuda",
            sources=("tiny.py", "custom.py"),
            model={"args": {}, "loss": "custom:loss", "inputs": {"ids": "input_ids"}},
            data={
                "bytes": None,
                "dataset": "custom:samples",
                "args": {"size": 10},
                "validation_dataset": "custom:held_out",
            },
            train=train(schedule=constant),
            cluster={"levels": LEVELS},
        ),
        "fsdp2-bf16-checkpointing": make_plan(
            world=8,
            shard=8,
            engine="fsdp2",
            kind="cuda",
            precision="bf16_mixed",
            recomputed=2,
            reasons=REASONS,
            train=train(save_every="1h"),
        ),
        "fsdp2-kept-whole-gradients": make_plan(
            world=16,
            shard=16,
            engine="fsdp2",
            kind="cuda",
            reshard=False,
            accumulation=3,
            gradients=1,
            data={"bytes": None, "tokens": ["mix/*.u16"], "mask": ["mix/*.mask"], "validation": held_out},
            train=train(save_every="1h", evaluate_every="30min"),
            cluster={"levels": LEVELS, "launcher": "slurm"},
        ),
        "hsdp-sgd": make_plan(
            world=16,
            shard=8,
            engine="fsdp2",
            kind="cuda",
            accumulation=3,
            recomputed=3,
            train=train(optimizer=sgd),
            cluster={"levels": LEVELS},
        ),
        "fsdp2-groups-average": make_plan(
            world=2,
            shard=2,
            engine="fsdp2",
            train=train(optimizer=GROUPS, ema=0.999),
        ),
        "fsdp2-hpz": make_plan(
            world=16,
            shard=16,
            secondary=8,
            engine="fsdp2",
            kind="cuda",
            precision="bf16_mixed",
            accumulation=3,
            train=train(),
            cluster={"levels": LEVELS},
        ),
        "amsp-llama-bf16": make_plan(
            world=16,
            engine="amsp",
            kind="cuda",
            axes=(2, 4, 2),
            shard=2,
            gradients=8,
            optimizer=16,
            accumulation=3,
            precision="bf16_mixed",
            recomputed=5,
            init="modules",
            blocks=tuple(f"model.layers.{index}" for index in range(32)),
            sources=(),
            packages=("transformers",),
            model={"factory": None, "args": {}, "hf": LLAMA},
            train=train(save_every="1h"),
            cluster={"levels": LEVELS},
        ),
        "amsp-zero-2-sgd": make_plan(
            world=4,
            engine="amsp",
            axes=(2, 2),
            optimizer=4,
            accumulation=2,
            recomputed=3,
            train=train(optimizer=sgd, schedule=linear),
        ),
        "amsp-hpz-groups-average": make_plan(
            world=16,
            engine="amsp",
            kind="cuda",
            axes=(8, 2),
            shard=16,
            secondary=8,
            int8=("dp_2",),
            int4=("dp_1", "dp_2"),
            data={"validation": {"files": ["held-out.txt"]}},
            train=train(optimizer=GROUPS, ema=0.999, evaluate_every=50),
            cluster={"levels": LEVELS},
        ),
        "amsp-loaded-kept": make_plan(
            world=4,
            engine="amsp",
            axes=(2, 2),
            shard=2,
            optimizer=4,
            reshard=False,
            init="modules",
            model={"weights": "/mnt/weights"},
        ),
        "pipeline-llama-zb-v": pipeline_plan(
            make_plan(
                world=16,
                engine="amsp",
                kind="cuda",
                axes=(2, 2),
                shard=2,
                optimizer=4,
                precision="bf16_mixed",
                init="modules",
                blocks=tuple(f"model.layers.{index}" for index in range(32)),
                sources=(),
                packages=("transformers",),
                reasons=PIPELINE_REASONS,
                model={"factory": None, "args": {}, "hf": LLAMA},
                train=train(global_batch=32, save_every="1h"),
                cluster={"levels": LEVELS},
            ),
            ranks=4,
            chunks=2,
            family="zb-v",
            copies=4,
            micro_batches=8,
            checkpointed=(0, 2, 0, 4, 0, 0, 0, 0),
        ),
        "pipeline-one-copy": pipeline_plan(
            make_plan(
                world=2,
                engine="amsp",
                data={"validation": {"files": ["held-out.txt"]}},
                train=train(ema=0.999, evaluate_every=50),
            ),
            ranks=2,
        ),
        "pipeline-late": pipeline_plan(
            make_plan(
                world=4,
                engine="amsp",
                kind="cuda",
                axes=(2,),
                optimizer=2,
                data={"validation": {"files": ["held-out.txt"]}},
                train=train(ema=0.999, save_every="1h", evaluate_every="30min"),
            ),
            ranks=2,
            copies=2,
            family="zb-h2",
            late_step=True,
        ),
        "pipeline-loaded": pipeline_plan(
            make_plan(
                world=4,
                engine="amsp",
                axes=(2,),
                optimizer=2,
                int4=("dp_1",),
                init="modules",
                model={"weights": "/mnt/weights"},
                train=train(optimizer=GROUPS),
            ),
            ranks=2,
            copies=2,
            micro_batches=3,
            family="zb-h1",
            checkpointed=(1, 0),
        ),
        "bf16-one-device": make_plan(engine="fsdp2", precision="bf16_mixed", accumulation=2, gradients=1),
        "llama-fsdp2": make_plan(
            world=2,
            shard=2,
            engine="fsdp2",
            precision="bf16_mixed",
            recomputed=5,
            init="modules",
            blocks=tuple(f"model.layers.{index}" for index in range(32)),
            sources=(),
            packages=("transformers",),
            model={"factory": None, "args": {}, "hf": LLAMA},
        ),
        "llama-loaded-hsdp": make_plan(
            world=4,
            shard=2,
            engine="fsdp2",
            reshard=False,
            recomputed=2,
            init="modules",
            blocks=tuple(f"model.layers.{index}" for index in range(32)),
            sources=(),
            packages=("transformers",),
            model={"factory": None, "args": {}, "hf": LLAMA | {"dtype": "bfloat16"}, "weights": "llama"},
            train=train(),
        ),
        "loaded-ddp": make_plan(world=2, engine="ddp", init="modules", kind="cuda", model={"weights": "/mnt/weights"}),
        "model-loss-modules": make_plan(
            world=2,
            engine="ddp",
            init="modules",
            blocks=(*BLOCKS[:2], "blocks.5"),
            model={"loss": "model", "inputs": {"input_ids": "input_ids", "labels": "targets"}},
            train=train(optimizer={"clip_grad_norm": None}),
        ),
        **_parallel(train),
    }


def _parallel(train: Callable[..., dict[str, Any]]) -> dict[str, Plan]:
    """Tensor, sequence, context and expert parallelism."""

    def hugging_face(config: dict[str, Any], blocks: int, path: str = "model.layers", **made: Any) -> Plan:
        changes: dict[str, Any] = {
            "init": "modules",
            "blocks": tuple(f"{path}.{index}" for index in range(blocks)),
            "sources": (),
            "packages": ("transformers",),
            "model": {"factory": None, "args": {}, "hf": config},
            "train": train(),
        }
        return make_plan(**(changes | made))

    held_out = {"validation": {"files": ["held-out.txt"]}}
    llama, gpt2 = {"divisions": LLAMA_DIVISIONS, "sequence": True}, {"divisions": GPT2_DIVISIONS}
    return {
        "tensor-fsdp2-sequence": parallel_plan(
            hugging_face(
                LLAMA,
                32,
                world=4,
                shard=4,
                engine="fsdp2",
                kind="cuda",
                precision="bf16_mixed",
                accumulation=3,
                recomputed=5,
                reasons=PARALLEL_REASONS[:1],
                data=held_out,
            ),
            tp=2,
            **llama,
        ),
        "tensor-amsp-parts": parallel_plan(
            hugging_face(GPT2, 12, "transformer.h", world=4, engine="amsp", axes=(2, 2), shard=2, optimizer=4),
            tp=2,
            **gpt2,
        ),
        "tensor-single": parallel_plan(hugging_face(GPT2, 12, "transformer.h", data=held_out), tp=2, **gpt2),
        "tensor-ddp": parallel_plan(
            hugging_face(GPT2, 12, "transformer.h", world=2, engine="ddp", accumulation=2), tp=2, **gpt2
        ),
        "tensor-pipeline": parallel_plan(
            pipeline_plan(
                hugging_face(LLAMA, 32, world=4, engine="amsp", axes=(2,), optimizer=2, data=held_out),
                ranks=2,
                copies=2,
                micro_batches=3,
                family="zb-h1",
            ),
            tp=2,
            **llama,
        ),
        "tensor-context-pipeline-late": parallel_plan(
            pipeline_plan(
                hugging_face(LLAMA, 32, world=4, engine="amsp", axes=(2,), optimizer=2),
                ranks=2,
                copies=2,
                micro_batches=3,
                family="zb-h2",
                late_step=True,
            ),
            tp=2,
            cp=2,
            **llama,
        ),
        "context-ring": parallel_plan(
            hugging_face(
                LLAMA, 32, world=4, shard=4, engine="fsdp2", data=held_out, reasons=PARALLEL_REASONS[2:], recomputed=32
            ),
            cp=2,
        ),
        "context-gather-ddp": parallel_plan(
            make_plan(world=4, engine="ddp", data=held_out, train=train()), cp=4, method="gather", head=""
        ),
        "experts-fsdp2": parallel_plan(
            hugging_face(
                MIXTRAL,
                32,
                world=8,
                shard=4,
                engine="fsdp2",
                kind="cuda",
                precision="bf16_mixed",
                reasons=PARALLEL_REASONS[1:2],
            ),
            ep=2,
            expert_modules=MIXTRAL_EXPERTS,
        ),
        "experts-amsp": parallel_plan(
            hugging_face(
                MIXTRAL, 32, world=8, engine="amsp", axes=(2, 4), shard=2, optimizer=8, int8=("dp_1",), int4=("dp_2",)
            ),
            ep=2,
            expert_modules=MIXTRAL_EXPERTS,
        ),
        "experts-tensor-fsdp2": parallel_plan(
            hugging_face(MIXTRAL, 32, world=2, shard=2, engine="fsdp2"),
            tp=2,
            sequence=True,
            ep=2,
            divisions=LLAMA_DIVISIONS,
            expert_modules=MIXTRAL_EXPERTS,
        ),
    }
