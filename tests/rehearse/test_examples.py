"""Every example, shrunk to at most four CPU processes, computes and moves what its plan says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.passes import profile_model
from shardwright.planner import make_plan, needed_dtypes
from shardwright.rehearse import rehearse
from shardwright.rehearse.rehearsal import LEAST_STEPS
from shardwright.rehearse.trials import trials
from shardwright.schemas.plan import Plan
from shardwright.schemas.source import load_job

pytestmark = [pytest.mark.processes, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"
PROCESSES = {
    "bytes-gpt": 2,
    "gpt2-124m-1xa100": 1,
    "llama3-8b-8xh100": 4,
    "llama3-70b-64xh100": 4,
    "mixtral-8x7b-8xb200": 4,
}
"""How many are left of each example's devices."""
WITHOUT_PLAN = {"llama3.1-405b-512xh100"}
SHARED = {
    "deepseek-v3-2048xh100",
    "deepseek-v3-256xh100",
    "llama3-8b-128k-64xh100",
    "llama3-8b-1m-64xh100",
    "llama3.1-405b-16384xh100",
    "mixtral-8x7b-64xh100",
}
"""Of large clusters, whose search takes long: how they share layers, sequences and experts is rehearsed with small
models in test_parallel_plans.py."""


def test_no_example_is_left_out() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == PROCESSES.keys() | WITHOUT_PLAN | SHARED


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_an_example_holds(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("corpus", "__pycache__"))
    subprocess.run([sys.executable, "make_corpus.py", "corpus"], cwd=folder, check=True, capture_output=True)
    loaded = load_job(folder / f"{name}.yaml")
    profile = profile_model(loaded.job, folder, needed_dtypes(loaded.job))
    plan = make_plan(loaded.job, profile, job_file=loaded.path.name, defaults=loaded.defaults)
    assert isinstance(plan, Plan)
    report = rehearse(plan, folder, processes=4, steps=LEAST_STEPS)
    assert report.error == "", report.log
    assert [f"{check.run}: {check.name}: {check.found}" for check in report.checks if not check.passed] == []
    assert report.passed
    assert report.processes == PROCESSES[name]
    assert len(report.runs) == len(trials(plan))
    assert not any(change.key.startswith("data.bytes") for change in report.shrunk), "the corpus was not used"
