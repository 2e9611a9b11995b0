"""Each command, with stand-ins for the passes and the planner: streams, exit codes, JSON, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from report import samples

import shardwright
from cli.conftest import Run
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Plan

COMMANDS = ("init", "check", "profile", "plan", "compile", "inspect", "rehearse", "schedule", "schema", "devices")


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"shardwright {shardwright.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_fits_80_columns(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"shardwright {command}" in result.stdout.split("Example", 1)[1]
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_help_lists_every_command(run: Run) -> None:
    listed = run("--help").stdout.split("Commands:")[1]
    assert {line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "} == set(
        COMMANDS
    )


@pytest.mark.parametrize(
    "arguments", [("plan",), ("plan", "job.yaml", "--nothing"), ("fly",), ("profile", "job.yaml", "--micro-batch", "0")]
)
def test_wrong_usage_is_wrong_input(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_check_says_what_was_understood(run: Run) -> None:
    result = run("check", "job.yaml", "--set", "train.steps=5")
    assert result.exit_code == 0
    words = {tuple(line.split()) for line in result.stdout.splitlines()}
    assert ("train.steps", "5") in words
    assert ("train.seed", "0", "default") in words
    assert ("world", "size", "8", "processes") in words


def test_check_shows_groups_of_parameters_by_their_places(run: Run) -> None:
    result = run("check", "job.yaml", "--set", "train.optimizer.groups=[{match: a.*}, {match: b.*, lr_scale: 0.5}]")
    assert result.exit_code == 0
    words = {tuple(line.split()) for line in result.stdout.splitlines()}
    assert ("train.optimizer.groups.0.lr_scale", "1.0", "default") in words
    assert ("train.optimizer.groups.1.lr_scale", "0.5") in words


def test_check_json(run: Run) -> None:
    facts = json.loads(run("check", "job.yaml", "--json").stdout)
    assert (facts["world_size"], facts["total_steps"], facts["total_tokens"]) == (8, 10, 10 * 16 * 8192)
    assert facts["job"]["train"]["steps"] == 10
    assert "train.seed" in facts["defaults"]


def test_profile(run: Run, library: SimpleNamespace) -> None:
    result = run("profile", "job.yaml", "--micro-batch", "2")
    assert result.exit_code == 0
    assert "micro-batch 2 of 128 tokens" in result.stdout
    assert "profiling the model" in result.stderr
    refused = run("profile", "job.yaml", "--dtype", "bf16")
    assert refused.exit_code == 2
    assert "it may use fp32" in refused.stderr


def test_profile_goes_into_detail_when_asked(run: Run, library: SimpleNamespace) -> None:
    plain, detailed = run("profile", "job.yaml"), run("profile", "job.yaml", "--operators", "--compile")
    assert library.calls[-1][-1] == "compiled"
    assert detailed.stdout.startswith(plain.stdout)
    assert "mlp: mm" in detailed.stdout
    assert "mlp: mm" not in plain.stdout
    assert max(map(len, detailed.stdout.splitlines())) <= 80


def test_profile_says_its_warnings_once(run: Run, library: SimpleNamespace) -> None:
    result = run("profile", "job.yaml")
    assert "blocks.2 draws random numbers" in result.stdout
    assert "blocks.2 draws random numbers" not in result.stderr
    machine = run("profile", "job.yaml", "--json")
    assert json.loads(machine.stdout)["warnings"] == ["blocks.2 draws random numbers"]


@pytest.mark.parametrize(("name", "beginning"), [("model.svg", "<?xml"), ("model.html", "<!DOCTYPE html>")])
def test_profile_draws_the_model(run: Run, library: SimpleNamespace, folder: Path, name: str, beginning: str) -> None:
    for _ in range(2):  # a drawing of ours is drawn anew
        result = run("profile", "job.yaml", "--graph", name)
        assert result.exit_code == 0, result.stderr
        assert f"wrote {name}" in result.stderr
        assert (folder / name).read_text().startswith(beginning)


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.png", "ends in none of .svg, .html"), ("mine.svg", "not a drawing of ours"), ("drawn.svg", "is a folder")],
)
def test_profile_refuses_to_draw_over_what_is_not_ours(
    run: Run, library: SimpleNamespace, folder: Path, name: str, said: str
) -> None:
    (folder / "mine.svg").write_text("<svg/>")
    (folder / "drawn.svg").mkdir()
    result = run("profile", "job.yaml", "--graph", name)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not library.calls
    assert (folder / "mine.svg").read_text() == "<svg/>"


def test_a_profile_is_kept_unless_unwanted(
    run: Run, library: SimpleNamespace, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from dataclasses import replace

    from shardwright.passes.serialise import digest

    library.profile = replace(library.profile, digest=digest(library.profile))
    kept = {"SHARDWRIGHT_CACHE": str(tmp_path_factory.mktemp("cache"))}
    os.utime(folder / "model.py", (1, 1))
    first, second = run("profile", "job.yaml", **kept), run("profile", "job.yaml", **kept)
    anew = run("profile", "job.yaml", "--no-cache", **kept)
    assert first.stdout == second.stdout == anew.stdout
    assert "profiling the model" in first.stderr
    assert second.stderr.startswith("profile from the cache, made ")
    assert "profiling the model" in anew.stderr
    assert len(library.calls) == 2
    plan = run("plan", "job.yaml", **kept)
    assert "profile from the cache" in plan.stderr


def test_plan_draws_on_stdout_and_notes_on_stderr(run: Run, library: SimpleNamespace) -> None:
    result = run("plan", "job.yaml")
    assert result.exit_code == 0
    assert result.stdout.startswith(samples.PLAN.name)
    assert "searching for plans" in result.stderr
    assert "searching for plans" not in result.stdout


def test_plan_is_saved_for_the_folder_it_lies_in(run: Run, library: SimpleNamespace, folder: Path) -> None:
    result = run("plan", "job.yaml", "-o", "plans/plan.json", "--json")
    saved = (folder / "plans" / "plan.json").read_text()
    assert saved == result.stdout
    assert Plan.model_validate_json(saved).job_file == "../job.yaml"
    assert [path.name for path in (folder / "plans").iterdir()] == ["plan.json"]
    assert run("plan", "job.yaml", "-o", "plans/plan.json").exit_code == 0  # a plan may be replaced


def test_plan_never_replaces_what_is_no_plan(run: Run, library: SimpleNamespace, folder: Path) -> None:
    before = (folder / "job.yaml").read_text()
    result = run("plan", "job.yaml", "-o", "job.yaml")
    assert result.exit_code == 2
    assert "job.yaml: error:" in result.stderr
    assert (folder / "job.yaml").read_text() == before
    assert library.calls == []


@pytest.mark.parametrize("command", [("plan",), ("compile", "-o", "run"), ("inspect",)])
def test_no_plan_fits(run: Run, library: SimpleNamespace, folder: Path, command: tuple[str, ...]) -> None:
    library.outcome = samples.INFEASIBLE
    result = run(*command, "job.yaml")
    assert result.exit_code == 1
    assert result.stdout.startswith("No plan fits.")
    machine = run(*command, "job.yaml", "--json")
    assert machine.exit_code == 1
    assert json.loads(machine.stdout)["infeasible"]["needed_bytes"] == samples.INFEASIBLE.needed_bytes
    assert not (folder / "run").exists()


def test_wrong_input_is_shown_in_full(run: Run, folder: Path) -> None:
    (folder / "job.yaml").write_text("model: {factory: model:build}\ntrain: {stepz: 10}\n")
    result = run("check", "job.yaml")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "job.yaml:2:9: error: " in result.stderr
    assert "^" in result.stderr
    assert "help: " in result.stderr
    assert result.stderr.count("error: ") >= 2
    assert "\x1b[" not in result.stderr


def test_wrong_input_as_json(run: Run, folder: Path) -> None:
    (folder / "job.yaml").write_text("train: {stepz: 10}\n")
    result = run("check", "job.yaml", "--json")
    assert result.exit_code == 2
    first = json.loads(result.stdout)["diagnostics"][0]
    assert first["file"].endswith("job.yaml")
    assert first["message"]


def test_an_error_with_only_a_key_is_located(
    run: Run, library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InputError(Diagnostic(message="no such factory", key="model.factory"))

    monkeypatch.setattr("shardwright.passes.profile_model", refuse)
    result = run("plan", "job.yaml")
    assert result.exit_code == 2
    assert "job.yaml:1:" in result.stderr
    assert "no such factory" in result.stderr


def test_a_bug_says_so(run: Run, library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("unit 7")

    monkeypatch.setattr("shardwright.passes.profile_model", fail)
    result = run("plan", "job.yaml")
    assert result.exit_code == 3
    assert "bug: KeyError: 'unit 7'" in result.stderr
    assert "report it" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback (most recent call last)" in run("--traceback", "plan", "job.yaml").stderr
    assert "Traceback (most recent call last)" in run("plan", "job.yaml", SHARDWRIGHT_TRACEBACK="1").stderr


def test_interruption(run: Run, library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shardwright.passes.profile_model", stop)
    result = run("plan", "job.yaml")
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted\n")


def test_what_the_model_prints_stays_out_of_stdout(
    run: Run, library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatty(*_: object, **__: object) -> object:
        print("hello from the model")
        return samples.PROFILE

    monkeypatch.setattr("shardwright.passes.profile_model", chatty)
    result = run("plan", "job.yaml", "--json")
    assert json.loads(result.stdout)["name"] == samples.PLAN.name
    assert "hello from the model" in result.stderr


def test_warnings_of_the_profile_are_said(run: Run, library: SimpleNamespace) -> None:
    from dataclasses import replace

    library.profile = replace(samples.PROFILE, warnings=("operator `x` costs nothing",))
    result = run("plan", "job.yaml")
    assert "warning: operator `x` costs nothing" in result.stderr


def test_inspect_shows_a_saved_plan_as_it_is(run: Run, library: SimpleNamespace, plan_file: Path) -> None:
    result = run("inspect", "plan.json")
    assert result.exit_code == 0
    for part in (
        "Memory of the fullest device",
        "Time of one step",
        "Collectives",
        "Why",
        "Alternatives",
        "Assumptions",
    ):
        assert f"\n{part}" in result.stdout
    assert library.calls == []
    assert json.loads(run("inspect", "plan.json", "--json").stdout)["name"] == samples.PLAN.name


def test_inspect_with_set_predicts_again(run: Run, library: SimpleNamespace, plan_file: Path) -> None:
    result = run("inspect", "plan.json", "--set", "decision.micro_batch=2")
    assert result.stdout.startswith("edited to micro-batch 2")
    assert ("evaluate", 2) in library.calls


def test_inspect_why(run: Run, plan_file: Path) -> None:
    assert run("inspect", "plan.json", "--why", "micro_batch").stdout.startswith("micro_batch = 1\n")
    assert json.loads(run("inspect", "plan.json", "--why", "micro_batch", "--json").stdout)[0]["value"] == "1"
    wrong = run("inspect", "plan.json", "--why", "microbatch")
    assert wrong.exit_code == 2
    assert "did you mean `micro_batch`?" in wrong.stderr


def test_a_plan_is_no_job(run: Run, plan_file: Path) -> None:
    result = run("check", "plan.json")
    assert result.exit_code == 2
    assert "is a plan" in result.stderr


@pytest.mark.parametrize("kind", ["job", "plan"])
def test_schema(run: Run, kind: str) -> None:
    schema = json.loads(run("schema", kind).stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert "train" in schema["properties"] if kind == "job" else "decision" in schema["properties"]


def test_devices(run: Run) -> None:
    assert "h100-sxm-80gb" in run("devices").stdout
    assert "h100-sxm-80gb" in [device["name"] for device in json.loads(run("devices", "--json").stdout)]
