"""A small job on the disk, the command line in this process, and stand-ins for the slow parts behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report import samples
from typer.testing import CliRunner, Result

import shardwright.backends.pytorch
import shardwright.passes
import shardwright.planner
from shardwright.backends.emission import Emission
from shardwright.cli import app
from shardwright.cli.terminal import json_text
from shardwright.schemas.plan import Infeasible, Plan, json_fields

JOB = """\
model: {factory: model:build}
data: {synthetic: {vocabulary: 256}}
train: {sequence_length: 8192, global_batch: 16, steps: 10}
cluster: {devices: 8 x h100-sxm-80gb}
"""

Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a job and its model in it."""
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "model.py").write_text("def build(): ...\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    """Runs the command line; streams apart, no terminal, 80 columns."""

    def invoke(*arguments: str, **environment: str) -> Result:
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "80", **environment}, prog_name="shardwright")

    return invoke


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for the passes and the planner. `outcome` is what a search finds, `calls` what was asked of them."""
    fake = SimpleNamespace(outcome=samples.PLAN, profile=samples.PROFILE, calls=[])

    def profile_model(job: Any, folder: Path, dtypes: Any = (), *, compiled: bool = False) -> Any:
        fake.calls.append(("profile", folder, tuple(dtypes), *(["compiled"] if compiled else [])))
        return fake.profile

    def make_plan(job: Any, profile: Any, *, job_file: str, defaults: Any) -> Plan | Infeasible:
        fake.calls.append(("plan", job_file, defaults))
        found: Plan | Infeasible = fake.outcome
        return found.model_copy(update={"job_file": job_file, "job": job}) if isinstance(found, Plan) else found

    def evaluate(plan: Plan, profile: Any) -> Plan:
        fake.calls.append(("evaluate", plan.decision.micro_batch))
        return plan.model_copy(update={"name": f"edited to micro-batch {plan.decision.micro_batch}"})

    monkeypatch.setattr(shardwright.passes, "profile_model", profile_model)
    monkeypatch.setattr(shardwright.planner, "make_plan", make_plan)
    monkeypatch.setattr(shardwright.planner, "evaluate", evaluate)
    monkeypatch.setattr(shardwright.planner, "needed_dtypes", lambda job: ("fp32",))
    return fake


@pytest.fixture
def plan_file(folder: Path) -> Path:
    """The sample plan, saved; its job file and its model's configuration lie beside it."""
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text('{"model_type": "llama"}')
    path = folder / "plan.json"
    path.write_text(json_text(json_fields(samples.PLAN)))
    return path


@pytest.fixture
def backend(library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for what emits: a script that says its plan's name, and the plan."""

    def emit(plan: Plan, job_folder: Path, out: Path) -> Emission:
        library.calls.append(("emit", job_folder.resolve(), out))
        return Emission(files={"train.py": f"# {plan.name}\n", "plan.json": json_text(json_fields(plan))})

    monkeypatch.setattr(shardwright.backends.pytorch, "emit", emit)
    return library
