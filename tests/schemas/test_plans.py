"""Reading a plan: where its errors are, edits with `--set`, and what is looked for on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from shardwright.schemas import Diagnostic, InputError, load_job, load_plan, plan_schema
from shardwright.schemas.plan import Plan

DECISION: dict[str, Any] = {
    "mesh": {"world_size": 2, "axes": [{"name": "dp_shard", "size": 2, "levels": ["node"]}]},
    "states": {
        "parameters": {"degree": 2, "levels": ["node"]},
        "gradients": {"degree": 2, "levels": ["node"]},
        "optimizer_states": {"degree": 2, "levels": ["node"]},
    },
    "micro_batch": 4,
    "accumulation": 2,
    "checkpointing": {"policy": "none", "blocks": 0, "of": 4},
    "precision": "fp32",
    "engine": {"name": "fsdp2"},
}
MEMORY: dict[str, Any] = {
    "peak_allocated_bytes": 10,
    "peak_reserved_bytes": 12,
    "stages": [],
    "at_rest": {"parameters": 1, "gradients": 1, "optimizer_states": 2},
    "host_bytes": 0,
}


@pytest.fixture
def plan_path(workspace: Path) -> Path:
    """A plan of the laptop job, in the folder `out` below the job's."""
    shutil.copy(Path(__file__).parent / "good" / "laptop.yaml", workspace)
    loaded = load_job(workspace / "laptop.yaml")
    fields = {
        "name": "FSDP2 x 2",
        "job": loaded.job.model_dump(mode="json"),
        "defaults": loaded.defaults,
        "job_file": "../laptop.yaml",
        "profile_digest": "0" * 64,
        "model": {
            "name": "model:build", "parameters": 100, "block_paths": ["blocks.0"], "init": "constructor",
            "attention": "none", "local_sources": ["model.py"], "packages": [],
        },
        "decision": DECISION,
        "prediction": {
            "step_time_s": 0.1, "time": [{"name": "forward", "seconds": 0.1}], "tokens_per_s": 20480.0, "mfu": 0.4,
            "mfu_formula": "model FLOPs / (time x peak)", "model_flops_per_step": 1e9, "memory": MEMORY,
            "collectives": [],
        },
        "search": {"considered": 1, "measured": 1, "feasible": 1, "alternatives": []},
        "reasons": [],
        "assumptions": [],
    }  # fmt: skip
    plan = Plan.model_validate_json(json.dumps(fields))
    path = workspace / "out" / "plan.json"
    path.parent.mkdir()
    path.write_text(plan.model_dump_json(indent=2))
    return path


def test_reads_what_was_written(plan_path: Path) -> None:
    loaded = load_plan(plan_path)
    assert loaded.plan.model_dump_json(indent=2) == plan_path.read_text()
    assert loaded.folder == plan_path.parent
    assert loaded.job_folder.resolve() == plan_path.parent.parent.resolve()


def test_the_schema_accepts_it(plan_path: Path) -> None:
    Draft202012Validator(plan_schema()).validate(json.loads(plan_path.read_text()))


def test_edits(plan_path: Path) -> None:
    plan = load_plan(plan_path, ["decision.micro_batch=8", "job.train.steps=7"]).plan
    assert (plan.decision.micro_batch, plan.job.train.steps) == (8, 7)


def test_errors_have_places(plan_path: Path) -> None:
    text = plan_path.read_text().replace('"micro_batch": 4', '"micro_batch": 0').replace('"fsdp2"', '"fsdp3"')
    plan_path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_plan(plan_path, ["decision.precison=fp32"])
    first, second, third = caught.value.diagnostics
    assert (first.key, second.key, third.key) == ("decision.micro_batch", "decision.engine.name", "decision.precison")
    assert text.splitlines()[first.line - 1].strip() == '"micro_batch": 0,'
    assert first.excerpt.splitlines()[1].endswith("^")
    assert second.suggestion == "did you mean `fsdp2`?"
    assert third.suggestion == "did you mean `precision`?"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema_version": 1', '"schema_version": 2', "expected `schema_version` 1, found 2"),
        ('"schema_version": 1,', "", "expected `schema_version` 1, found none"),
        ('"accumulation": 2', '"accumulation": 2,,', "expected a key in double quotes"),
        ('"accumulation": 2', '"accumulation" 2', "expected `:`"),
        ('"accumulation": 2', '"accumulation": NaN', "expected a JSON value"),
        ('"accumulation": 2', '"accumulation": 1e999', "the number is too large"),
        ('"accumulation": 2', '"accumulation": 2, "accumulation": 3', "stands twice in one mapping"),
        ('"accumulation": 2', '"accumulation": ' + "[" * 100, "nested deeper than 64 levels"),
        ('"precision": "fp32"', '"precision": "fp32', "text that is not closed"),
        ('"precision": "fp32"', '"precision": "\\ud800"', "half of a surrogate pair"),
    ],
)
def test_wrong_json(old: str, new: str, message: str, plan_path: Path) -> None:
    plan_path.write_text(plan_path.read_text().replace(old, new))
    with pytest.raises(InputError) as caught:
        load_plan(plan_path)
    (only,) = caught.value.diagnostics
    assert message in only.message
    assert only.line > 0


def test_a_job_is_no_plan_and_a_plan_no_job(plan_path: Path) -> None:
    with pytest.raises(InputError, match="this is a plan, not a job"):
        load_job(plan_path)
    with pytest.raises(InputError, match="expected `schema_version` 1, found none"):
        load_plan(plan_path.parent.parent / "laptop.yaml")


def test_checks_of_the_job_hold_in_a_plan(plan_path: Path) -> None:
    # Every number is written in a plan; `defaults` tells that nobody asked for AdamW's momentum.
    assert "train.optimizer.momentum" in load_plan(plan_path).plan.defaults
    with pytest.raises(InputError) as caught:
        load_plan(
            plan_path, ["job.strategy.pp=1", "job.strategy.tp=1", "job.strategy.cp=1", "job.train.global_batch=9"]
        )
    (only,) = caught.value.diagnostics
    assert (only.key, only.file) == ("job.train.global_batch", "--set job.train.global_batch=9")


def test_the_model_is_looked_for_but_not_the_data(plan_path: Path) -> None:
    for name in ("corpus/a.txt", "corpus/b.txt"):
        (plan_path.parent.parent / name).unlink()
    load_plan(plan_path)
    (plan_path.parent.parent / "model.py").unlink()
    with pytest.raises(InputError) as caught:
        load_plan(plan_path)
    (only,) = caught.value.diagnostics
    assert only.key == "job.model.factory"
    assert plan_path.read_text().splitlines()[only.line - 1].strip() == '"factory": "model:build",'
    assert load_plan(plan_path, check_model=False).plan.name == "FSDP2 x 2"


def test_locate_knows_keys_of_the_plan_and_of_its_job(plan_path: Path) -> None:
    lines = plan_path.read_text().splitlines()
    located = load_plan(plan_path).locate(
        InputError([Diagnostic(key="decision.accumulation", message="a"), Diagnostic(key="train.steps", message="b")])
    )
    assert [lines[each.line - 1].strip() for each in located.diagnostics] == ['"accumulation": 2,', '"steps": 300,']
