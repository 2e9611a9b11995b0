"""`rehearse`, with a stand-in for the rehearsal itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report import samples

from cli.conftest import Run
from shardwright.schemas.diagnostics import Diagnostic, InputError


@pytest.fixture
def rehearsal(library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`result` is what the rehearsal finds; `asked` is what it was asked."""
    fake = SimpleNamespace(result=samples.rehearsal(), asked=[])

    def rehearse(plan: Any, folder: Path, *, progress: Callable[[str], None], **options: Any) -> Any:
        fake.asked.append((plan.name, folder.resolve(), options))
        progress("run 1 of 2")
        return fake.result

    monkeypatch.setattr("shardwright.rehearse.rehearse", rehearse)
    return fake


def test_a_failed_check_fails_the_command(run: Run, rehearsal: SimpleNamespace, folder: Path) -> None:
    result = run("rehearse", "job.yaml", "--processes", "4", "--steps", "3", "--keep", "kept")
    assert result.exit_code == 1
    assert result.stdout.endswith("FAIL  1 of 2 checks hold\n")
    assert "rehearsing: run 1 of 2" in result.stderr
    assert rehearsal.asked == [
        (samples.PLAN.name, folder.resolve(), {"processes": 4, "steps": 3, "keep": Path("kept")})
    ]


def test_all_checks_hold(run: Run, rehearsal: SimpleNamespace) -> None:
    rehearsal.result = replace(rehearsal.result, checks=rehearsal.result.checks[:1])
    assert run("rehearse", "job.yaml").exit_code == 0
    result = run("rehearse", "job.yaml", "--json")
    assert result.exit_code == 0
    fields = json.loads(result.stdout)
    assert fields["passed"] is True
    assert fields["checks"][0]["name"] == "loss"


def test_a_run_that_ended_early_is_told(run: Run, rehearsal: SimpleNamespace) -> None:
    rehearsal.result = replace(rehearsal.result, checks=(), error="process 1 died", log=("Traceback", "ValueError"))
    result = run("rehearse", "job.yaml")
    assert result.exit_code == 1
    assert "process 1 died\n  Traceback\n  ValueError\n" in result.stdout


def test_keep_needs_an_empty_folder(run: Run, rehearsal: SimpleNamespace) -> None:
    result = run("rehearse", "job.yaml", "--keep", ".")
    assert result.exit_code == 2
    assert rehearsal.asked == []


def test_a_wrong_option_is_not_looked_for_in_the_job(
    run: Run, library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InputError(
            [Diagnostic(key="--steps", message="too few"), Diagnostic(key="model.args", message="too big")]
        )

    monkeypatch.setattr("shardwright.rehearse.rehearse", refuse)
    result = run("rehearse", "job.yaml")
    assert result.exit_code == 2
    assert "\nerror: --steps: too few\njob.yaml:1:1: error: model.args: too big\n" in result.stderr
