"""The whole way with nothing replaced: `init`, `plan`, `compile`, an edited plan, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.test_process import shardwright_process


@pytest.mark.slow
def test_from_init_to_an_edited_plan(tmp_path: Path) -> None:
    job, run, plan = tmp_path / "a job" / "job.yaml", tmp_path / "run", tmp_path / "run" / "plan.json"
    assert shardwright_process("init", str(job.parent)).returncode == 0

    planned = shardwright_process("plan", str(job), "-o", str(tmp_path / "beside" / "plan.json"), "--json")
    assert planned.returncode == 0, planned.stderr
    compiled = shardwright_process("compile", str(job), "-o", str(run), "--json")
    assert compiled.returncode == 0, compiled.stderr
    assert sorted(json.loads(compiled.stdout)["files"]) == sorted(
        path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()
    )
    assert plan.read_text() == planned.stdout == (tmp_path / "beside" / "plan.json").read_text()

    again = tmp_path / "again"
    assert shardwright_process("compile", str(run), "-o", str(again)).returncode == 0
    assert {path.name: path.read_bytes() for path in again.iterdir() if path.is_file()} == {
        path.name: path.read_bytes() for path in run.iterdir() if path.is_file()
    }

    edited = json.loads(plan.read_text())
    edited["decision"]["micro_batch"] = 3
    plan.write_text(json.dumps(edited, indent=2))
    line = 1 + plan.read_text().splitlines().index('    "micro_batch": 3,')
    refused = shardwright_process("compile", str(plan), "-o", str(run))
    assert refused.returncode == 2
    assert f"plan.json:{line}:20: error: decision.micro_batch: " in refused.stderr
    assert shardwright_process("inspect", str(plan), "--why", "micro_batch").returncode == 0
