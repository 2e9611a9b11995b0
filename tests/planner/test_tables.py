"""The tables of what a plan may choose: they hold what the schemas name, and what they say is so."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from planner.profiles import cpu_cluster, cuttable, gpu_cluster, job, toy
from shardwright.planner import DDP_BUCKET_CAP_MIB, ENGINES, LR_SCHEDULES, OPTIMIZERS, PRECISIONS, needed_dtypes
from shardwright.planner.explain import REASONED
from shardwright.planner.predict import Predictor
from shardwright.planner.reasons import buys, shown
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.search import Search
from shardwright.planner.space import block_count, decide
from shardwright.schemas.job import STOCK_ENGINES, OptimizerSpec, ScheduleName, ScheduleSpec, TrainSpec
from shardwright.schemas.plan import Decision, Engine


@pytest.mark.parametrize(
    ("table", "model", "field"),
    [
        (ENGINES, Engine, "name"),
        (PRECISIONS, Decision, "precision"),
        (OPTIMIZERS, OptimizerSpec, "name"),
        (LR_SCHEDULES, ScheduleSpec, "name"),
    ],
)
def test_tables_hold_what_the_schemas_name(table: dict[str, Any], model: Any, field: str) -> None:
    assert set(table) == set(get_args(model.model_fields[field].annotation))


def test_the_table_of_schedules_holds_what_the_schemas_name() -> None:
    assert set(SCHEDULES) == set(get_args(ScheduleName))


@pytest.mark.parametrize(
    ("engine", "world", "degree", "precision", "runs"),
    [
        ("single", 1, 1, "fp32", True),
        ("single", 1, 1, "bf16_mixed", False),
        ("single", 2, 1, "fp32", False),
        ("ddp", 1, 1, "fp32", False),
        ("ddp", 8, 1, "fp32", True),
        ("ddp", 8, 2, "fp32", False),
        ("ddp", 8, 1, "bf16_mixed", False),
        ("fsdp2", 1, 1, "bf16_mixed", True),
        ("fsdp2", 8, 1, "bf16_mixed", True),
        ("fsdp2", 8, 1, "fp32", False),
        ("fsdp2", 8, 4, "fp32", True),
    ],
)
def test_what_engines_run(engine: Any, world: int, degree: int, precision: Any, runs: bool) -> None:
    assert ENGINES[engine].runs(world=world, degree=degree, precision=precision) is runs


@pytest.mark.parametrize(("world", "degree"), [(1, 1), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_exactly_one_stock_engine_runs_each_point(world: int, degree: int, precision: Any) -> None:
    assert sum(ENGINES[each].runs(world=world, degree=degree, precision=precision) for each in STOCK_ENGINES) == 1
    assert set(STOCK_ENGINES) == {name for name, each in ENGINES.items() if not each.flat}


def test_optimizer_bytes() -> None:
    adamw, sgd = OPTIMIZERS["adamw"], OPTIMIZERS["sgd"]
    default, plain, momentum = (
        TrainSpec.model_validate({"global_batch": 8, "steps": 1, "optimizer": optimizer})
        for optimizer in ({}, {"name": "sgd", "momentum": 0}, {"name": "sgd", "momentum": 0.9})
    )
    assert adamw.state_bytes(default, elements=100, tensors=3) == 812
    assert sgd.state_bytes(plain, elements=100, tensors=3) == 0
    assert sgd.state_bytes(momentum, elements=100, tensors=3) == 400
    assert [adamw.traffic_bytes(default), sgd.traffic_bytes(plain), sgd.traffic_bytes(momentum)] == [28, 12, 20]
    averaged = [train.model_copy(update={"ema": 0.9}) for train in (default, plain)]
    assert adamw.state_bytes(averaged[0], elements=100, tensors=3) == 1212
    assert sgd.state_bytes(averaged[1], elements=100, tensors=3) == 400
    assert [adamw.traffic_bytes(averaged[0]), sgd.traffic_bytes(averaged[1])] == [40, 24]


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)]
)
def test_lr_schedules(name: Any, middle: float, end: float) -> None:
    assert LR_SCHEDULES[name](0.0, 0.1) == pytest.approx(1.0)
    assert LR_SCHEDULES[name](0.5, 0.1) == pytest.approx(middle)
    assert LR_SCHEDULES[name](1.0, 0.1) == pytest.approx(end)


def test_needed_dtypes_follow_strategy_quality_and_device() -> None:
    assert needed_dtypes(job(gpu_cluster())) == ("fp32", "bf16")
    assert needed_dtypes(job(gpu_cluster(), quality="exact")) == ("fp32",)
    assert needed_dtypes(job(gpu_cluster(), strategy={"precision": "bf16_mixed"})) == ("fp32", "bf16")
    old = cpu_cluster(2)
    old = old.model_copy(update={"device": old.device.model_copy(update={"peak": {"fp32": 1e9}})})
    assert needed_dtypes(job(old)) == ("fp32",)


@pytest.mark.parametrize("strategy", [{"engine": "fsdp2"}, {"pp": 2}, {"pp": 2, "late_step": True}], ids=str)
def test_every_reasoned_key_has_words(strategy: dict[str, Any]) -> None:
    spec = job(cpu_cluster(2), batch=8, sequence=16, strategy=strategy)
    predictor = Predictor(spec, cuttable(toy()))
    candidate = Search(predictor).chosen()
    assert candidate is not None
    decision = decide(candidate.point, spec.cluster, block_count(predictor.profile))
    of_stages = {"pipeline.schedule", "pipeline.cuts", "pipeline.late_step"} if candidate.point.pipe is None else set()
    for key in REASONED.keys() - of_stages:
        assert buys(key, predictor, candidate)
        assert shown(decision, key)


def test_bucket_cap_is_a_whole_number_of_mebibytes() -> None:
    assert isinstance(DDP_BUCKET_CAP_MIB, int)
