from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from shardwright.backends.emission import Emission, write
from shardwright.schemas.diagnostics import InputError

FILES = Emission(
    {"plan.json": "{}", "train.py": "new\n", "package/module.py": "new\n"}, executable=frozenset({"train.py"})
)


def listing(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_files_are_put_into_a_new_folder(tmp_path: Path) -> None:
    write(FILES, tmp_path / "a" / "b")
    assert listing(tmp_path / "a" / "b") == dict(FILES.files)
    assert (tmp_path / "a" / "b" / "train.py").stat().st_mode & stat.S_IXUSR
    assert not (tmp_path / "a" / "b" / "package" / "module.py").stat().st_mode & stat.S_IXUSR


def test_what_else_lies_in_the_folder_stays(tmp_path: Path) -> None:
    checkpoint = tmp_path / "out" / "step_00000003" / "index.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("{}")
    (tmp_path / "plan.json").write_text("{old}")
    (tmp_path / "train.py").write_text("old\n")
    assert write(FILES, tmp_path) == ("train.py",)
    kept = {"out/step_00000003/index.json": "{}", "train.py.old": "old\n"}
    assert listing(tmp_path) == {**FILES.files, **kept}


def test_files_of_a_folder_that_is_no_emission_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("new\n")
    write(FILES, tmp_path)
    (tmp_path / "plan.json").unlink()
    (tmp_path / "train.py").write_text("somebody's own\n")
    with pytest.raises(InputError, match=r"train\.py would be replaced"):
        write(FILES, tmp_path)
    assert (tmp_path / "train.py").read_text() == "somebody's own\n"


def test_an_interrupted_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").write_text("{old}")
    (tmp_path / "train.py").write_text("old\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(FILES, tmp_path)
    assert listing(tmp_path) == {"plan.json": "{old}", "train.py": "old\n"}


def test_modules_that_an_earlier_emission_left_in_its_package_are_removed(tmp_path: Path) -> None:
    owner = Emission(FILES.files, packages=frozenset({"package"}))
    (tmp_path / "package" / "deeper").mkdir(parents=True)
    kept = ("package/notes.txt", "package/deeper/old.py", "old.py")
    for name in ("package/old.py", *kept):
        (tmp_path / name).write_text("old\n")
    write(owner, tmp_path)
    assert (tmp_path / "package" / "old.py").exists()  # the folder was none of ours before
    write(FILES, tmp_path)
    assert (tmp_path / "package" / "old.py").exists()
    write(owner, tmp_path)
    assert listing(tmp_path) == {**FILES.files, **dict.fromkeys(kept, "old\n")}


@pytest.mark.parametrize("name", ["/etc/passwd", "../train.py", "a/../../b", "a//b", "./a"])
def test_paths_out_of_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a path below"):
        Emission({name: ""})


def test_places_taken_by_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.py").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        write(FILES, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        write(FILES, tmp_path / "file")
