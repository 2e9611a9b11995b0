"""Emitted files as they are committed under tests/golden: read them to see what a change does.

`SHARDWRIGHT_REGENERATE=1 python -m pytest tests/backends/test_golden.py` writes them anew.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.golden import golden_plans

from shardwright.backends.emission import Emission, write
from shardwright.backends.pytorch import emit
from shardwright.schemas.plan import Plan

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SUPPORT = ROOT / "tests" / "support"
SHOWN = ("train.py", "export.py", "launch.sh", "train.slurm")
"""Files that a plan shapes; the runtime and the user's own are copies."""

LONGEST = {"pipeline-late": 330, "tensor-pipeline": 285, "tensor-context-pipeline-late": 330}
"""Lines of the scripts that may be longer than others: with late steps the log, too, is written a step later."""

PLANS = golden_plans()


def emission(plan: Plan) -> Emission:
    return emit(plan, SUPPORT, SUPPORT / "out")


@pytest.mark.parametrize("name", PLANS)
def test_emitted_files_are_the_committed_ones(name: str) -> None:
    files = emission(PLANS[name]).files
    if os.environ.get("SHARDWRIGHT_REGENERATE"):
        (GOLDEN / name).mkdir(exist_ok=True)
        for file in SHOWN:
            (GOLDEN / name / file).write_text(files[file], encoding="utf-8")
    for file in SHOWN:
        assert files[file] == (GOLDEN / name / file).read_text(encoding="utf-8")


def test_no_golden_folder_is_left_over() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_scripts_are_short_and_say_what_they_are(name: str) -> None:
    text = emission(PLANS[name]).files["train.py"]
    tree = ast.parse(text)
    # A table of divisions comes on top, one a line, rarely four.
    table = 4 + 2 * len(PLANS[name].model.divisions)
    assert len(text.splitlines()) <= LONGEST.get(name, 270) + (table if PLANS[name].model.divisions else 0)
    docstring = ast.get_docstring(tree)
    assert docstring is not None
    assert "--resume" in docstring
    assert "step time" in docstring
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert all(ast.get_docstring(function) for function in functions)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("script", ["launch.sh", "train.slurm"])
def test_shell_scripts_are_shell_scripts(name: str, script: str) -> None:
    text = emission(PLANS[name]).files[script]
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert text.startswith("#!")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scripts in one folder under names of their own, with everything that lies beside them."""
    folder = tmp_path_factory.mktemp("emitted")
    for name, plan in PLANS.items():
        files = dict(emission(plan).files)
        for script in ("train", "export"):
            files[f"{script}_{name.replace('-', '_')}.py"] = files.pop(f"{script}.py")
        write(Emission(files), folder)
    return folder


def scripts_of(folder: Path) -> list[str]:
    return sorted(path.name for pattern in ("train_*.py", "export_*.py") for path in folder.glob(pattern))


def run(folder: Path, *command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_are_formatted_and_clean(folder: Path) -> None:
    run(folder, "ruff", "format", "--isolated", "--line-length", "120", "--check", ".")
    rules = "E,F,W,I,UP,B,C4,SIM,RUF,PLE,ANN,D1,T10"
    options = ("--isolated", "--line-length", "120", "--select", rules, "--ignore", "ANN401,D105,D107")
    run(folder, "ruff", "check", *options, "shardwright_runtime", *scripts_of(folder))


@pytest.mark.slow
def test_scripts_are_typed(folder: Path) -> None:
    scripts = scripts_of(folder)
    assert len(scripts) == 2 * len(PLANS)
    config = folder / "mypy.ini"
    config.write_text("[mypy]\nstrict = True\n[mypy-transformers.*]\nfollow_imports = skip\n")
    run(folder, "mypy", "--config-file", "mypy.ini", "--cache-dir", str(ROOT / ".mypy_cache" / "golden"), *scripts)
