"""Profiles that are kept: found again, and not when anything has changed that they depend on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardwright
from passes.jobs import LLAMA, make_job
from shardwright.passes import cache as module
from shardwright.passes.cache import ProfileCache, users_cache
from shardwright.planner import needed_dtypes
from shardwright.schemas import load_job
from shardwright.schemas.job import JobSpec

MODEL = """\
import json
from pathlib import Path

from torch import nn

from helper import activation
from parts.inner import width

try:
    import faster
except ImportError:
    faster = None


def build(layers=1):
    sizes = json.loads((Path(__file__).parent / "sizes.json").read_text())
    hidden = nn.Linear(width(), sizes["vocabulary"])
    return nn.Sequential(nn.Embedding(sizes["vocabulary"], width()), *[activation() for _ in range(layers)], hidden)
"""
JOB = """\
model: {factory: model:build}
data: {synthetic: {vocabulary: 64}}
train: {sequence_length: 32, global_batch: 8, steps: 2}
cluster: {devices: 2 x cpu}
"""
BATCH = {"synthetic": {"vocabulary": 64}}
Arguments = tuple[JobSpec, Path, tuple[Any, ...]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's folder."""
    root = tmp_path / "job"
    (root / "parts").mkdir(parents=True)
    (root / "model.py").write_text(MODEL)
    (root / "helper.py").write_text("from torch import nn\n\nactivation = nn.ReLU\n")
    (root / "parts" / "inner.py").write_text("def width():\n    return 8\n")
    (root / "sizes.json").write_text('{"vocabulary": 64}')
    (root / "job.yaml").write_text(JOB)
    for path in root.rglob("*.*"):
        os.utime(path, (time.time() - 60, time.time() - 60))
    return root


@pytest.fixture
def cache(tmp_path: Path) -> ProfileCache:
    return ProfileCache(tmp_path / "cache")


def job(args: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
    return make_job({"factory": "model:build", "args": args or {}}, kind="cpu", data=BATCH, **changes)


def test_a_kept_profile_is_the_one_that_was_made(cache: ProfileCache, folder: Path) -> None:
    assert cache.find(job(), folder, ("fp32",)) is None
    before = time.time()
    made = cache.make(job(), folder, ("fp32",))
    kept = cache.find(job(), folder, ("fp32",))
    assert kept is not None
    assert kept.profile == made
    assert before <= kept.made <= time.time()
    assert [path.suffix for path in cache.folder.iterdir()] == [".json"]


HARMLESS: dict[str, Callable[[Path], object]] = {
    "a file that nobody reads": lambda folder: (folder / "notes.py").write_text("1 / 0\n"),
    "a plan beside the job": lambda folder: (folder / "plan.json").write_text("{}"),
    "the same text again": lambda folder: (folder / "model.py").write_text(MODEL),
}
HARMFUL: dict[str, Callable[[Path], object]] = {
    "the model": lambda folder: (folder / "model.py").write_text(MODEL.replace("layers=1", "layers=2")),
    "a module that it imports": lambda folder: (folder / "helper.py").write_text(
        "from torch.nn import GELU as activation"
    ),
    "a module of a package without __init__": lambda folder: (folder / "parts/inner.py").write_text(
        "width = lambda: 4\n"
    ),
    "a file that it reads": lambda folder: (folder / "sizes.json").write_text('{"vocabulary": 128}'),
    "a file that it reads is gone": lambda folder: (folder / "sizes.json").unlink(),
    "a package that hides a module": lambda folder: _package(folder / "helper"),
    "a package where none was": lambda folder: (folder / "parts/__init__.py").write_text(""),
    "a package that hides a nested module": lambda folder: _package(folder / "parts/inner"),
    "a module that it would rather import": lambda folder: (folder / "faster.py").write_text(""),
    "a module that hides an installed one": lambda folder: (folder / "torch.py").write_text(""),
}


def _package(folder: Path) -> None:
    folder.mkdir()
    (folder / "__init__.py").write_text("")


def test_every_file_that_matters_is_compared(cache: ProfileCache, folder: Path) -> None:
    """One profile, against each change by itself: files come back as they were."""
    cache.make(job(), folder, ("fp32",))
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".pyc"}
    found = {}
    for name, change in {**HARMLESS, **HARMFUL}.items():
        change(folder)
        found[name] = cache.find(job(), folder, ("fp32",)) is not None
        for path in {*folder.rglob("__init__.py"), *folder.glob("*.*"), *folder.glob("parts/*.py")}:
            if path not in before:
                path.unlink()
        for path, content in before.items():
            path.write_bytes(content)
        for path in (folder / "helper", folder / "parts/inner"):
            if path.is_dir():
                path.rmdir()
        assert cache.find(job(), folder, ("fp32",)) is not None, name
    assert found == {**dict.fromkeys(HARMLESS, True), **dict.fromkeys(HARMFUL, False)}


def test_the_job_that_matters_is_part_of_the_name(cache: ProfileCache, folder: Path, tmp_path: Path) -> None:
    cache.make(job(), folder, ("fp32",))
    assert cache.find(job(), folder, ("fp32",)) is not None
    assert cache.find(job(length=16), folder, ("fp32",)) is None
    assert cache.find(job({"layers": 2}), folder, ("fp32",)) is None
    assert cache.find(job(), folder, ("fp32", "bf16")) is None
    assert cache.find(job(), folder, ("fp32",), compiled=True) is None
    assert cache.find(job(), tmp_path, ("fp32",)) is None
    on_cuda = make_job({"factory": "model:build"}, kind="cuda", data=BATCH)
    assert cache.find(on_cuda, folder, ("fp32",)) is None
    other_data = make_job({"factory": "model:build"}, kind="cpu", data={"synthetic": {"vocabulary": 32}})
    assert cache.find(other_data, folder, ("fp32",)) is None


def test_what_is_installed_is_part_of_the_name(
    cache: ProfileCache, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.make(job(), folder, ("fp32",))
    for target, name, value in (
        (module, "own_sources", lambda: "edited"),
        (shardwright, "__version__", "0.0.0"),
        (sys, "version", "4.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert cache.find(job(), folder, ("fp32",)) is None, name
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_SETTING", "1")
        assert cache.find(job(), folder, ("fp32",)) is None
    with monkeypatch.context() as patch:
        (tmp_path / "site" / "flash_attn-3.0.dist-info").mkdir(parents=True)
        patch.syspath_prepend(str(tmp_path / "site"))
        assert cache.find(job(), folder, ("fp32",)) is None
    assert cache.find(job(), folder, ("fp32",)) is not None


def test_own_sources_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hash is over what lies beside the module, so an edit of any pass changes it."""
    digests = []
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / "passes").mkdir(exist_ok=True)
        (tmp_path / "passes" / "trace.py").write_text(text)
        monkeypatch.setattr(module, "__file__", str(tmp_path / "passes" / "cache.py"))
        digests.append(module.own_sources.__wrapped__())
    assert digests[0] != digests[1]


def test_an_edited_configuration_is_another_model(cache: ProfileCache, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    os.utime(path, (1, 1))
    hf = make_job({"hf": "config.json"})
    made = cache.make(hf, tmp_path, ("bf16",))
    kept = cache.find(hf, tmp_path, ("bf16",))
    assert kept is not None
    assert kept.profile == made
    path.write_text(json.dumps({**LLAMA, "num_hidden_layers": 2}))
    assert cache.find(hf, tmp_path, ("bf16",)) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        lambda text: '{"profile": 1}',
        lambda text: json.dumps({**json.loads(text), "evidence": {"files": 3}}),
        lambda text: text.replace('"sequence_length":32', '"sequence_length":64'),
    ],
    ids=["empty", "half", "nested", "other", "no evidence", "another number"],
)
def test_a_spoilt_file_is_as_good_as_none(cache: ProfileCache, folder: Path, spoil: Callable[[str], str]) -> None:
    made = cache.make(job(), folder, ("fp32",))
    (path,) = cache.folder.iterdir()
    whole = path.read_text()
    assert spoil(whole) != whole
    path.write_text(spoil(whole))
    assert cache.find(job(), folder, ("fp32",)) is None
    assert cache.make(job(), folder, ("fp32",)) == made
    assert cache.find(job(), folder, ("fp32",)) is not None


def test_a_cache_that_cannot_be_written_is_an_empty_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ProfileCache(tmp_path / "file" / "below")
    assert cache.make(job(), folder, ("fp32",)).numel > 0
    assert cache.find(job(), folder, ("fp32",)) is None


def test_what_was_not_used_for_longest_goes_first(
    cache: ProfileCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_FILES", 2)
    for age, length in ((30, 8), (20, 16)):
        before = set(cache.folder.glob("*"))
        cache.make(job(length=length), folder, ("fp32",))
        (path,) = set(cache.folder.glob("*")) - before
        os.utime(path, (time.time() - age, time.time() - age))
    (cache.folder / "abandoned.tmp").write_text("")
    os.utime(cache.folder / "abandoned.tmp", (1, 1))
    assert cache.find(job(length=8), folder, ("fp32",)) is not None  # used, so the other is older now
    cache.make(job(length=32), folder, ("fp32",))
    kept = [cache.find(job(length=length), folder, ("fp32",)) is not None for length in (8, 16, 32)]
    assert kept == [True, False, True]
    assert not list(cache.folder.glob("*.tmp"))


def test_a_dataset_of_the_users_own_is_not_trusted(cache: ProfileCache, folder: Path) -> None:
    (folder / "samples.py").write_text(
        "import torch\n\n\ndef load():\n    row = torch.zeros(32, dtype=torch.int64)\n"
        "    return [{'input_ids': row, 'targets': row}]\n"
    )
    own = make_job({"factory": "model:build"}, kind="cpu", data={"dataset": "samples:load"})
    cache.make(own, folder, ("fp32",))
    assert cache.find(own, folder, ("fp32",)) is None


def test_a_file_written_meanwhile_is_not_trusted(cache: ProfileCache, folder: Path) -> None:
    (folder / "sizes.json").write_text('{"vocabulary": 64}')
    os.utime(folder / "sizes.json", (time.time() + 60, time.time() + 60))
    cache.make(job(), folder, ("fp32",))
    assert cache.find(job(), folder, ("fp32",)) is None


def test_a_kept_profile_is_found_without_torch(folder: Path, tmp_path: Path) -> None:
    loaded = load_job(folder / "job.yaml")
    made = ProfileCache(tmp_path / "named" / "profiles").make(loaded.job, folder, needed_dtypes(loaded.job))
    code = (
        "import sys\nfrom shardwright.cli import app\n"
        "try:\n    app(['profile', 'job.yaml', '--json'])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    sources = str(Path(shardwright.__file__).parents[1])
    environment = os.environ | {"SHARDWRIGHT_CACHE": str(tmp_path / "named"), "PYTHONPATH": sources}
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["digest"] == made.digest
    assert "profile from the cache, made " in run.stderr
    assert "profiling the model" not in run.stderr


def test_where_the_users_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def folder() -> Path | None:
        found = users_cache()
        return found.folder if found else None

    assert folder() is None  # as for all tests
    monkeypatch.delenv("SHARDWRIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "shardwright" / "profiles"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "shardwright" / "profiles"
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "here"))
    assert folder() == tmp_path / "here" / "profiles"
