"""The examples and the README hold what they promise."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.backends.pytorch import emit
from shardwright.passes import profile_model
from shardwright.planner import make_plan, needed_dtypes
from shardwright.planner.constants import device_budget
from shardwright.schemas import LoadedJob, load_job
from shardwright.schemas.plan import Plan

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PUBLISHED_PARAMETERS = {
    "gpt2-124m-1xa100": 124_439_808,
    "llama3-8b-8xh100": 8_030_261_248,
    "llama3-70b-64xh100": 70_553_706_496,
    "mixtral-8x7b-8xb200": 46_702_792_704,
    "mixtral-8x7b-64xh100": 46_702_792_704,
    "llama3.1-405b-512xh100": 405_853_388_800,
    "llama3.1-405b-16384xh100": 405_853_388_800,
    "llama3-8b-128k-64xh100": 8_030_261_248,
    "llama3-8b-1m-64xh100": 8_030_261_248,
    "deepseek-v3-256xh100": 671_026_404_352,
    "deepseek-v3-2048xh100": 671_026_404_352,
}
"""https://huggingface.co/openai-community/gpt2, https://huggingface.co/meta-llama, https://huggingface.co/mistralai,
https://huggingface.co/deepseek-ai: sums of the checkpoints' tensors."""
LONG = ("deepseek-v3-2048xh100", "llama3-8b-1m-64xh100", "mixtral-8x7b-64xh100", "llama3-8b-128k-64xh100")
"""Planning each takes half a minute or so: here they are only read."""
ONCE = ("llama3-70b-64xh100", "llama3.1-405b-512xh100", "llama3.1-405b-16384xh100", "deepseek-v3-256xh100")
"""Planned once, because that takes a while."""


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples with their corpus."""
    folder = tmp_path_factory.mktemp("checkout") / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("corpus", "__pycache__"))
    subprocess.run([sys.executable, "make_corpus.py", "corpus"], cwd=folder, check=True, capture_output=True)
    return folder


def planned(loaded: LoadedJob) -> Plan:
    profile = profile_model(loaded.job, loaded.folder, needed_dtypes(loaded.job))
    plan = make_plan(loaded.job, profile, job_file=loaded.path.name, defaults=loaded.defaults)
    assert isinstance(plan, Plan)
    return plan


@pytest.mark.parametrize("name", sorted({path.stem for path in EXAMPLES.glob("*.yaml")} - {*LONG}))
def test_example_plans_and_compiles(name: str, examples: Path, tmp_path: Path) -> None:
    loaded = load_job(examples / f"{name}.yaml")
    plan = planned(loaded)
    assert plan.model.parameters == PUBLISHED_PARAMETERS.get(name, plan.model.parameters)
    memory = plan.prediction.memory
    budget = device_budget(loaded.job.cluster, loaded.job.budget.device_memory)
    assert memory.peak_allocated_bytes <= memory.peak_reserved_bytes <= budget
    assert 0 < plan.prediction.mfu < 1
    assert sum(part.seconds for part in plan.prediction.time) == pytest.approx(plan.prediction.step_time_s)
    emission = emit(plan, loaded.folder, tmp_path / "out")
    if name not in ONCE:
        assert emission.files == emit(planned(loaded), loaded.folder, tmp_path / "out").files, "not deterministic"
    compile(emission.files["train.py"], "train.py", "exec")


@pytest.mark.parametrize("name", LONG)
def test_long_example_is_read(name: str) -> None:
    assert load_job(EXAMPLES / f"{name}.yaml").job.cluster.world_size >= 64


def test_examples_of_published_models_are_all_there() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} >= {*PUBLISHED_PARAMETERS, "bytes-gpt"}


def test_readme_is_short_and_shows_an_example_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 200
    (shown,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert shown == (EXAMPLES / "llama3-8b-8xh100.yaml").read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link


def test_script_that_the_readme_quotes_is_what_is_emitted(examples: Path, tmp_path: Path) -> None:
    (quoted,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    loaded = load_job(examples / "llama3-8b-8xh100.yaml")
    script = emit(planned(loaded), loaded.folder, tmp_path / "out").files["train.py"]
    assert quoted in script


@pytest.mark.processes
@pytest.mark.slow
def test_demo_trains_and_the_loss_falls(examples: Path) -> None:
    shutil.copytree(ROOT / "shardwright", examples.parent / "shardwright")
    done = subprocess.run([sys.executable, str(examples / "demo.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    out = examples.parent / "runs" / "bytes-gpt" / "out"
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 200
    assert losses[-1] < 0.6 * losses[0]
