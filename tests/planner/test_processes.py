"""Predicted bytes at rest and collectives against running processes: plain torch, gloo, four ranks, one launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.profiles import cpu_cluster, toy
from shardwright.planner import at_rest_bytes, step_collectives
from shardwright.planner.groups import Groups
from shardwright.planner.space import Point, decide
from shardwright.schemas.job import TrainSpec
from shardwright.schemas.profile import Parameter

WORLD = 4
OPTIMIZERS = {
    "adamw": {"name": "adamw"},
    "sgd momentum": {"name": "sgd", "momentum": 0.9},
    "sgd": {"name": "sgd", "momentum": 0.0},
}


def case(engine: str, shard: int = 1, *, world: int = WORLD, **others: Any) -> dict[str, Any]:
    defaults = {
        "kept": False,
        "accumulation": 1,
        "precision": "fp32",
        "checkpointed": 0,
        "optimizer": "adamw",
        "model": "plain",
        "bucket_cap_bytes": 64 * 2**20,
        "ema": None,
        "second": None,
    }
    return {"engine": engine, "world": world, "shard": shard, "gradient_degree": shard, **defaults, **others}


CASES = {
    "single": case("single", world=1),
    "single, accumulation, sgd": case("single", world=1, accumulation=3, optimizer="sgd momentum"),
    "one device in bf16": case("fsdp2", world=1, precision="bf16_mixed", accumulation=2),
    "ddp": case("ddp"),
    "ddp, accumulation, sgd with momentum": case("ddp", accumulation=3, optimizer="sgd momentum"),
    "ddp, tied, sgd": case("ddp", model="tied", optimizer="sgd"),
    "ddp, frozen": case("ddp", model="frozen"),
    "ddp, frozen, averages": case("ddp", model="frozen", ema=0.9),
    "ddp, small buckets": case("ddp", model="chain", bucket_cap_bytes=700),
    "ddp, smaller buckets": case("ddp", model="chain", bucket_cap_bytes=400, accumulation=2),
    "zero-3": case("fsdp2", 4),
    "zero-3 in bf16": case("fsdp2", 4, precision="bf16_mixed"),
    "zero-3, accumulation": case("fsdp2", 4, precision="bf16_mixed", accumulation=3),
    "zero-3, whole gradients": case("fsdp2", 4, precision="bf16_mixed", accumulation=3, gradient_degree=1),
    "zero-3, whole gradients, fp32": case("fsdp2", 4, accumulation=2, gradient_degree=1),
    "kept": case("fsdp2", 4, precision="bf16_mixed", kept=True),
    "kept, accumulation": case("fsdp2", 4, precision="bf16_mixed", kept=True, accumulation=3),
    "kept, whole gradients": case("fsdp2", 4, kept=True, accumulation=3, gradient_degree=1),
    "checkpointed": case("fsdp2", 4, precision="bf16_mixed", checkpointed=2),
    "kept, checkpointed": case("fsdp2", 4, kept=True, checkpointed=3),
    "zero-3, tied, sgd with momentum": case("fsdp2", 4, model="tied", optimizer="sgd momentum"),
    "zero-3, frozen, sgd": case("fsdp2", 4, model="frozen", optimizer="sgd", precision="bf16_mixed"),
    "zero-3, averages, sgd": case("fsdp2", 4, optimizer="sgd", ema=0.9, precision="bf16_mixed"),
    "second copy": case("fsdp2", 4, second=2),
    "second copy, accumulation, in bf16": case("fsdp2", 4, second=2, accumulation=3, precision="bf16_mixed"),
    "second copy, checkpointed, tied": case("fsdp2", 4, second=2, checkpointed=3, model="tied"),
    "second copy, frozen": case("fsdp2", 4, second=2, model="frozen", precision="bf16_mixed"),
    "hsdp": case("fsdp2", 2),
    "hsdp, accumulation": case("fsdp2", 2, precision="bf16_mixed", accumulation=3),
    "hsdp, whole gradients, kept": case("fsdp2", 2, kept=True, accumulation=3, gradient_degree=1),
    "hsdp, tied, checkpointed": case("fsdp2", 2, model="tied", checkpointed=1, precision="bf16_mixed"),
    "replicated in bf16": case("fsdp2", 1, precision="bf16_mixed"),
    "replicated in bf16, accumulation": case("fsdp2", 1, precision="bf16_mixed", accumulation=3, kept=True),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank counted."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "cases.json").write_text(json.dumps(CASES))
    worker = Path(__file__).parent / "worker.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    done = subprocess.run(
        [*launch, str(worker), str(folder / "cases.json"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", CASES)
def test_bytes_at_rest_of_every_rank(measured: list[dict[str, Any]], name: str) -> None:
    point, groups = point_of(CASES[name]), groups_of(measured[0][name])
    optimizer, ema = OPTIMIZERS[CASES[name]["optimizer"]], CASES[name]["ema"]
    train = TrainSpec.model_validate({"global_batch": 4, "steps": 1, "optimizer": optimizer, "ema": ema})
    decision = decide(point, cpu_cluster(point.world), blocks=3)
    for rank in range(WORLD):
        counted = measured[rank][name]["at_rest"]
        assert counted == at_rest_bytes(decision, groups, train, rank % point.world)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", CASES)
def test_collectives_of_every_rank(measured: list[dict[str, Any]], name: str) -> None:
    point = point_of(CASES[name])
    predicted = step_collectives(point, groups_of(measured[0][name]), CASES[name]["bucket_cap_bytes"])
    for rank in range(WORLD):
        counted: Counter[tuple[str, tuple[int, ...], int]] = Counter()
        for each in predicted:
            counted[each.kind, ranks_of(point, each.axis, each.group_size, rank), each.bytes] += each.count
        rows = measured[rank][name]["collectives"]
        assert {(kind, tuple(ranks), size): count for kind, ranks, size, count in rows} == counted


def ranks_of(point: Point, axis: str, size: int, rank: int) -> tuple[int, ...]:
    """The group of an axis; of `dp_shard`, neighbours, as many as a second copy is spread over or all."""
    if axis == "dp_replicate":
        assert size == point.replicas
        return tuple(rank % point.shard + index * point.shard for index in range(size))
    assert size in ((WORLD,) if axis == "world" else (point.shard, point.secondary))
    return tuple(rank // size * size + index for index in range(size))


def point_of(case: dict[str, Any]) -> Point:
    return Point(
        engine=case["engine"],
        world=case["world"],
        shard=case["shard"],
        optimizer_degree=case["shard"],
        kept=case["kept"] if case["engine"] == "fsdp2" else None,
        gradient_degree=case["gradient_degree"],
        secondary=case["second"],
        micro_batch=1,
        accumulation=case["accumulation"],
        checkpointed=case["checkpointed"],
        precision=case["precision"],
    )


def groups_of(result: dict[str, Any]) -> Groups:
    parameters = tuple(
        Parameter(
            name=each["name"],
            shape=tuple(each["shape"]),
            trainable=each["trainable"],
            unit=-1,
            also=tuple(each["also"]),
        )
        for each in result["parameters"]
    )
    profile = toy(blocks=len(result["blocks"]))
    assert profile.block_paths == tuple(result["blocks"])
    return Groups(replace(profile, parameters=parameters))
