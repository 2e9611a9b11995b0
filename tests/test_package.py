"""The wheel holds all that the program needs, and works from an empty directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
JOB = """
model: {hf: {architectures: [GPT2LMHeadModel], model_type: gpt2, n_layer: 2, n_embd: 32, n_head: 2, vocab_size: 64,
  n_positions: 16, resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}}
data: {synthetic: {vocabulary: 64}}
train: {sequence_length: 16, global_batch: 4, steps: 2}
cluster: {devices: 2 x cpu}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_data_files_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"shardwright", "shardwright-0.1.0.dist-info"}
    assert "shardwright/py.typed" in names
    assert any(name.startswith("shardwright/backends/pytorch/templates/") for name in names)


@pytest.mark.slow
def test_wheel_works_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    unpacked, work = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(unpacked)
    work.mkdir()
    (work / "job.yaml").write_text(JOB)
    environment = os.environ | {"PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}

    def shardwright(*arguments: str) -> str:
        command = [sys.executable, "-m", "shardwright", *arguments]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "0.1.0" in shardwright("--version")
    shardwright("compile", "job.yaml", "-o", "out")
    assert {path.name for path in (work / "out").iterdir()} >= {"train.py", "plan.json", "launch.sh"}
