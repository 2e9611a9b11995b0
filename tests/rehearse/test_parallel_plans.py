"""Rehearsals of plans whose processes share layers, sequences and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.parallel_jobs import MODELS, PLAIN, VOCABULARY

from shardwright.passes import profile_model
from shardwright.planner import make_plan, needed_dtypes
from shardwright.rehearse import rehearse
from shardwright.rehearse.rehearsal import LEAST_STEPS
from shardwright.schemas.plan import Plan
from shardwright.schemas.source import load_job

pytestmark = [pytest.mark.processes, pytest.mark.slow]

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "layers alone": ("t5", 2, {"tp": 2}),
    "layers and stages, the last process with fewer rows of the vocabulary": (
        "gpt2",
        4,
        {"tp": 2, "pp": 2, "schedule": "zb-h1"},
    ),
    "experts of stages with different numbers of layers": (
        "mixtral",
        4,
        {"ep": 2, "pp": 2, "schedule": "1f1b", "engine": "amsp"},
    ),
    "layers, sequences and experts": (
        "qwen3 moe",
        4,
        {"tp": 2, "cp": 2, "ep": 2, "engine": "fsdp2"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_holds(name: str, tmp_path: Path) -> None:
    model, world, strategy = CASES[name]
    job = {
        "model": MODELS[model] | {"hf": MODELS[model]["hf"] | {"num_hidden_layers": 3, "n_layer": 3}},
        "data": {"synthetic": {"vocabulary": VOCABULARY}},
        "train": {"sequence_length": 32, "global_batch": 8, "steps": 50},
        "cluster": {"devices": f"{world} x cpu"},
        "strategy": PLAIN | strategy,
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    loaded = load_job(tmp_path / "job.yaml")
    profile = profile_model(loaded.job, tmp_path, needed_dtypes(loaded.job))
    plan = make_plan(loaded.job, profile, job_file="job.yaml", defaults=loaded.defaults)
    assert isinstance(plan, Plan)
    report = rehearse(plan, tmp_path, processes=4, steps=LEAST_STEPS)
    assert report.error == "", report.log
    assert [f"{check.run}: {check.name}: {check.found}" for check in report.checks if not check.passed] == []
    assert report.passed
    assert report.processes == world
