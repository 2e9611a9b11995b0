"""Writing without harm: `init`, `plan -o`, `compile -o`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli.conftest import Run
from shardwright.cli.files import (
    check_emission_target,
    check_empty,
    check_plan_target,
    create,
    looks_like_plan,
    write_atomically,
)
from shardwright.schemas.diagnostics import InputError


def refusal(caught: pytest.ExceptionInfo[InputError]) -> str:
    return str(caught.value)


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "below" / "plan.json"
    write_atomically(target, "old\n")
    write_atomically(target, "new ü\n")
    assert target.read_bytes() == "new ü\n".encode()
    assert os.listdir(target.parent) == ["plan.json"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "plan.json"
    target.write_text("old")

    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises((InputError, KeyboardInterrupt)):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_place_that_cannot_be_written_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        write_atomically(tmp_path / "file" / "plan.json", "{}")
    assert "cannot be written" in refusal(caught)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"decision": 1}', "\ufeffx"])
def test_what_is_no_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert not looks_like_plan(tmp_path / "x.json")
    with pytest.raises(InputError, match="not overwritten"):
        check_plan_target(tmp_path / "x.json")


def test_a_folder_is_no_place_for_a_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        check_plan_target(tmp_path)


def test_emission_target(tmp_path: Path) -> None:
    check_emission_target(tmp_path / "new")
    check_emission_target(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="left alone"):
        check_emission_target(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        check_emission_target(tmp_path / "notes.txt")
    (tmp_path / "plan.json").write_text('{"schema_version": 1, "decision": {}}')
    with pytest.raises(InputError, match="left alone"):
        check_emission_target(tmp_path)  # a plan beside a job is no emission
    (tmp_path / "train.py").write_text("")
    check_emission_target(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    check_empty(tmp_path)
    check_empty(tmp_path / "new")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="left alone"):
        check_empty(tmp_path)


def test_create_never_overwrites(tmp_path: Path) -> None:
    create(tmp_path / "new" / "a.txt", "one")
    with pytest.raises(InputError, match="never overwritten"):
        create(tmp_path / "new" / "a.txt", "two")
    assert (tmp_path / "new" / "a.txt").read_text() == "one"


def test_init_writes_a_job_that_checks(run: Run, folder: Path) -> None:
    result = run("init", "fresh")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == ["wrote fresh/job.yaml", "wrote fresh/model.py"]
    assert run("check", "fresh/job.yaml").exit_code == 0


def test_init_overwrites_nothing(run: Run, folder: Path) -> None:
    before = (folder / "job.yaml").read_text()
    (folder / "model.py").unlink()
    result = run("init")
    assert result.exit_code == 2
    assert "job.yaml: error: exists already" in result.stderr
    assert (folder / "job.yaml").read_text() == before
    assert not (folder / "model.py").exists()  # both or nothing
