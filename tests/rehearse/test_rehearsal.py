"""Real rehearsals: plans that hold pass, and every planted fault fails under its right name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardwright.backends.emission import Emission
from shardwright.passes import profile_model
from shardwright.planner import make_plan, needed_dtypes
from shardwright.rehearse import RehearsalReport, rehearse
from shardwright.rehearse.launch import Failure, run
from shardwright.rehearse.rehearsal import compile_trial, profile_small
from shardwright.rehearse.shrink import shrink
from shardwright.rehearse.trials import trials
from shardwright.rehearse.verdict import check_pair
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.plan import Plan
from shardwright.schemas.source import load_job

pytestmark = [pytest.mark.processes, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"
JOB = """
model:
  factory: bytes_gpt:build
  args: {layers: 6, width: 32, heads: 2, context: 128}
data: {synthetic: {vocabulary: 256}}
train:
  sequence_length: 128
  global_batch: 64
  steps: 100
  optimizer:
    name: adamw
    lr: 3e-3
    clip_grad_norm: 1.0
    groups: [{match: "blocks.5.*", lr_scale: 0.5}, {match: ["blocks.4.*", "blocks.1.*"], lr_scale: 2}]
  ema: 0.9
cluster: {devices: 8 x cpu}
quality: lossy
"""


def plan_of(folder: Path, *overrides: str, text: str = JOB) -> Plan:
    shutil.copy(EXAMPLES / "bytes_gpt.py", folder)
    (folder / "job.yaml").write_text(text)
    loaded = load_job(folder / "job.yaml", [f"strategy.{override}" for override in overrides])
    profile = profile_model(loaded.job, folder, needed_dtypes(loaded.job))
    plan = make_plan(loaded.job, profile, job_file="job.yaml", defaults=loaded.defaults)
    assert isinstance(plan, Plan)
    return plan


def failed(report: RehearsalReport) -> list[str]:
    return [f"{check.run}: {check.name}: {check.found}" for check in report.checks if not check.passed]


WHOLE_GRADIENTS = ("engine=fsdp2", "precision=fp32", "states.parameters=8", "states.gradients=1", "micro_batch=2")
AMSP = ("engine=amsp", "reshard_after_forward=true", "states.optimizer_states=8", "micro_batch=2")
SECOND_COPY = (
    *(*AMSP, "states.parameters=4", "states.gradients=2", "states.secondary=2"),
    *("int8_gathers=node", "int4_reductions=node", "precision=bf16_mixed", "checkpointing=3"),
)
INDEPENDENT = (
    *(*AMSP, "states.parameters=2", "states.gradients=2", "states.secondary=none"),
    *("int8_gathers=none", "int4_reductions=none", "precision=fp32"),
)
HYBRID = ("engine=fsdp2", "precision=bf16_mixed", "states.parameters=4", "states.gradients=4", "micro_batch=2")


@pytest.mark.parametrize(
    ("overrides", "processes", "axis", "size"),
    [
        (("engine=ddp", "precision=fp32", "micro_batch=2"), 4, "dp_replicate", "4"),
        ((*HYBRID, "reshard_after_forward=true", "checkpointing=3"), 8, "dp_shard", "2"),
        ((*WHOLE_GRADIENTS, "reshard_after_forward=false"), 3, "dp_shard", "2"),
        (SECOND_COPY, 4, "axes", "2 x 2"),
    ],
    ids=["ddp", "hsdp-bf16-freed-checkpointed", "fsdp2-fp32-kept-whole-gradients", "amsp-bf16-second-copy-int8-int4"],
)
def test_a_plan_holds(tmp_path: Path, overrides: tuple[str, ...], processes: int, axis: str, size: str) -> None:
    plan = plan_of(tmp_path, *overrides)
    said: list[str] = []
    report = rehearse(plan, tmp_path, processes=processes, progress=said.append)
    assert report.error == "", report.log
    assert failed(report) == []
    assert report.passed
    shrunk = {change.key: change.after for change in report.shrunk}
    assert shrunk[f"decision.mesh.{axis}"] == size
    assert shrunk["decision.accumulation"] == "3"
    assert len(report.runs) == len(trials(plan))
    assert len(said) == 1 + 2 * len(report.runs)


def test_masked_bytes_on_one_device_hold(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "mask").write_bytes(bytes([0, 0, 1] * 3414)[: 256 * 40])
    text = JOB.replace("{synthetic: {vocabulary: 256}}", "{bytes: text, mask: mask}").replace("8 x cpu", "1 x cpu")
    plan = plan_of(tmp_path, "precision=bf16_mixed", "micro_batch=4", "checkpointing=full", text=text)
    report = rehearse(plan, tmp_path, keep=tmp_path / "kept")
    assert failed(report) == []
    assert report.passed
    assert report.processes == 1
    assert len(list((tmp_path / "kept").glob("*/plan/out/metrics.jsonl"))) == 2


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(script: str) -> str:
        assert script.count(old) == 1, f"{old!r} occurs {script.count(old)} times"
        return script.replace(old, new)

    return change


NUMBERS = {"loss of 4 steps", "gradient norm of 4 steps", "parameters"}
FAULTS: dict[str, tuple[Callable[[str], str], set[str]]] = {
    "none": (lambda script: script, set()),
    "wrong scale": (replaced("scale = WORLD_SIZE / ", "scale = 1.0 / "), NUMBERS),
    "one micro-batch twice": (replaced("batches(state.step, micro)", "batches(state.step, micro // 2)"), NUMBERS),
    "same data everywhere": (replaced("rank=rank", "rank=0"), NUMBERS),
    "gradients never reduced but in the last step": (
        replaced(
            "model.set_requires_gradient_sync(last)", "model.set_requires_gradient_sync(last and state.step == 3)"
        ),
        NUMBERS,
    ),
    "gradients reduced too often": (
        replaced("model.set_requires_gradient_sync(last)", "model.set_requires_gradient_sync(True)"),
        {"reduce_scatter in group [0, 1]"},
    ),
    "a stale collective": (
        replaced("optimizer.zero_grad()", "optimizer.zero_grad(); dist.all_reduce(torch.zeros(3))"),
        {"all_reduce in group [0, 1]"},
    ),
    "no optimizer state": (
        replaced("momentum=MOMENTUM", "momentum=0.0"),
        {"optimizer states at rest, B", "parameters"},
    ),
    "a checkpoint of something else": (
        replaced(
            "\n    checkpoints.save(",
            "\n    with torch.no_grad():\n        next(model.parameters()).add_(1.0)\n    checkpoints.save(",
        ),
        {"checkpoint"},
    ),
}


AMSP_FAULTS: dict[str, tuple[Callable[[str], str], set[str]]] = {
    "none": (lambda script: script, set()),
    "wrong scale": (replaced("scale = 1.0 / ", "scale = WORLD_SIZE / "), NUMBERS),
    "a lost micro-batch": (replaced("summed * scale", "summed * scale * (micro > 0)"), NUMBERS),
    "updates that stay where they are": (
        replaced("states.publish()", "[b.publish() for unit in states.units[1:] for b in unit]"),
        {"gradient norm of 4 steps", "parameters", "all_gather over dp_2"},
    ),
    "gradients at another level": (
        replaced("GRADIENT_SHARDS = 2", "GRADIENT_SHARDS = 4"),
        {"reduce_scatter in group [0, 2]"},
    ),
    "parameters never freed": (
        replaced("RESHARD_AFTER_FORWARD = True", "RESHARD_AFTER_FORWARD = False"),
        {"all_gather over dp_1"},
    ),
}


@pytest.mark.parametrize(
    ("overrides", "processes", "faults"),
    [(WHOLE_GRADIENTS, 2, FAULTS), (INDEPENDENT, 4, AMSP_FAULTS)],
    ids=["fsdp2", "amsp"],
)
def test_every_planted_fault_is_found_and_named(
    tmp_path: Path, overrides: tuple[str, ...], processes: int, faults: dict[str, Any]
) -> None:
    """All in one launch: the reference, the plan as it is, and the plan with one fault after the other."""
    plan = plan_of(tmp_path, *overrides)
    small = shrink(plan, tmp_path, processes=processes, steps=4)
    profile = profile_small(small, plan.decision, tmp_path)
    chosen = next(one for one in trials(plan) if "sgd" in one.name)
    pair = compile_trial(small, plan, profile, chosen, tmp_path, tmp_path / "compiled")
    launches = [pair.launch_alone]
    for name, (change, _) in faults.items():
        folder = tmp_path / name.replace(" ", "-")
        shutil.copytree(pair.launch.folder, folder)
        script = folder / "train.py"
        script.write_text(change(script.read_text()))
        launches.append(replace(pair.launch, folder=str(folder)))
    outcomes = list(run(launches, profile.packages, tmp_path))
    assert not [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    for launch, (name, (_, expected)) in zip(launches[1:], faults.items(), strict=True):
        checks = check_pair(chosen, pair.plan, Path(launch.folder), Path(pair.launch_alone.folder), profile)
        found = {check.name for check in checks if not check.passed}
        assert found >= expected, f"{name}: {found}"
        assert bool(found) == bool(expected), f"{name}: {found}"


def planting(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    """Scripts for several processes are emitted with a fault."""
    import shardwright.backends.pytorch as backend

    emit = backend.emit

    def faulty(plan: Plan, *args: Any) -> Emission:
        emission = emit(plan, *args)
        if plan.decision.mesh.world_size == 1:
            return emission
        return Emission(dict(emission.files) | {"train.py": change(emission.files["train.py"])}, emission.executable)

    monkeypatch.setattr(backend, "emit", faulty)


def test_a_script_that_fails_is_an_error_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planting(monkeypatch, replaced("optimizer.zero_grad()", "raise OverflowError('planted')"))
    plan = plan_of(tmp_path, "engine=ddp", "precision=fp32")
    report = rehearse(plan, tmp_path, processes=2)
    assert not report.passed
    assert re.search(r"adamw, fp32, .*DDP.*: process \d of 2 failed with exit code 1", report.error)
    assert report.log[-1] == "OverflowError: planted"


def test_a_wrong_scale_fails_the_whole_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planting(monkeypatch, replaced("scale = WORLD_SIZE / ", "scale = 1.0 / "))
    plan = plan_of(tmp_path, "engine=ddp", "precision=fp32")
    report = rehearse(plan, tmp_path, processes=2)
    assert not report.passed
    assert {name.split(": ")[1] for name in failed(report)} == NUMBERS


def test_dropout_that_stays_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "engine=ddp", "precision=fp32")
    model = (tmp_path / "bytes_gpt.py").read_text()
    assert model.count("return x + self.mlp(self.norm2(x))") == 1
    dropping = model.replace("return x + self.mlp(self.norm2(x))", "return x + F.dropout(self.mlp(self.norm2(x)), 0.1)")
    (tmp_path / "bytes_gpt.py").write_text(dropping)
    report = rehearse(plan, tmp_path, processes=2)
    assert not report.passed
    assert any("model.rehearse" in name for name in failed(report))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"processes": 1}, "cannot be rehearsed by one process"), ({"steps": 2}, "2 steps are too few")],
)
def test_too_little_is_refused(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    plan = plan_of(tmp_path, "engine=ddp", "precision=fp32")
    with pytest.raises(InputError, match=message):
        rehearse(plan, tmp_path, **settings)


def test_a_model_that_stays_too_large_is_refused(tmp_path: Path) -> None:
    text = JOB.replace("{layers: 6, width: 32, heads: 2, context: 128}", "{layers: 6, width: 16384, heads: 2}")
    text = text.replace("8 x cpu", "64 x h100-sxm-80gb")
    plan = plan_of(tmp_path, text=text)
    with pytest.raises(InputError, match=r"(?s)model\.rehearse.*parameters.*this machine has"):
        rehearse(plan, tmp_path)


def test_a_folder_that_holds_something_is_not_used(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "engine=ddp", "precision=fp32")
    with pytest.raises(InputError, match="is not empty"):
        rehearse(plan, tmp_path, keep=tmp_path)
