"""`compile`, with a stand-in for the backend: from a job, from a plan, into folders of all kinds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from report import samples

from cli.conftest import Run
from shardwright.schemas.plan import Plan


def test_job_to_folder(run: Run, backend: SimpleNamespace, folder: Path) -> None:
    result = run("compile", "job.yaml", "-o", "out/run")
    assert result.exit_code == 0
    assert (folder / "out/run/train.py").read_text() == f"# {samples.PLAN.name}\n"
    assert "out/run/train.py" in result.stdout
    assert Plan.model_validate_json((folder / "out/run/plan.json").read_text()).job_file == "../../job.yaml"
    assert ("emit", folder.resolve(), Path("out/run")) in backend.calls


def test_json_lists_the_files(run: Run, backend: SimpleNamespace) -> None:
    listed = json.loads(run("compile", "job.yaml", "-o", "run", "--json").stdout)
    assert listed == {"plan": samples.PLAN.name, "folder": "run", "files": ["plan.json", "train.py"]}


def test_again_replaces_the_files_and_keeps_checkpoints(run: Run, backend: SimpleNamespace, folder: Path) -> None:
    assert run("compile", "job.yaml", "-o", "run").exit_code == 0
    checkpoint = folder / "run" / "out" / "step-10" / "weights"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("precious")
    backend.outcome = samples.PLAN.model_copy(update={"name": "another plan"})
    assert run("compile", "job.yaml", "-o", "run").exit_code == 0
    assert (folder / "run" / "train.py").read_text() == "# another plan\n"
    assert checkpoint.read_text() == "precious"


def test_a_folder_of_the_user_is_left_alone(run: Run, backend: SimpleNamespace, folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    result = run("compile", "job.yaml", "-o", ".")
    assert result.exit_code == 2
    assert "left alone" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == before
    assert backend.calls == []


def test_an_edited_plan_is_checked_and_predicted_again(
    run: Run, backend: SimpleNamespace, folder: Path, plan_file: Path
) -> None:
    edited = json.loads(plan_file.read_text())
    edited["decision"]["micro_batch"] = 2
    plan_file.write_text(json.dumps(edited))
    result = run("compile", "plan.json", "-o", "run")
    assert result.exit_code == 0
    assert ("evaluate", 2) in backend.calls
    assert (folder / "run" / "train.py").read_text() == "# edited to micro-batch 2\n"
    assert "profile is no longer the one of this plan" in result.stderr


def test_an_emitted_folder_stands_for_its_plan(run: Run, backend: SimpleNamespace, folder: Path) -> None:
    assert run("compile", "job.yaml", "-o", "run").exit_code == 0
    result = run("inspect", "run")
    assert result.exit_code == 0
    assert result.stdout.startswith(samples.PLAN.name)


def test_a_folder_without_a_plan(run: Run, folder: Path) -> None:
    (folder / "empty").mkdir()
    result = run("inspect", "empty")
    assert result.exit_code == 2
    assert "plan.json" in result.stderr
