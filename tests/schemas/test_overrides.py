"""`--set key.path=value`."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.schemas import InputError, LoadedJob, load_job

JOB = """\
model: {factory: model:build, args: {sizes: [1, 2]}}
data: {bytes: corpus/*.txt}
train: {sequence_length: 64, global_batch: 8, steps: 20}
cluster: dgx-h100
"""


def load(folder: Path, *overrides: str, job: str = JOB) -> LoadedJob:
    (folder / "job.yaml").write_text(job)
    return load_job(Path("job.yaml"), overrides)


def said(folder: Path, *overrides: str, job: str = JOB) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, *overrides, job=job)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.optimizer.lr=3e-3", ("train", "optimizer", "lr"), 3e-3),
        ("train.steps=5", ("train", "steps"), 5),
        ("strategy.micro_batch=[1, 4]", ("strategy", "micro_batch"), (1, 4)),
        ("train.optimizer={name: sgd, momentum: 0.5}", ("train", "optimizer", "momentum"), 0.5),
        ("cluster={devices: 4 x cpu}", ("cluster", "name"), "4 x cpu"),
        ("model.args.sizes.1=7", ("model", "args"), {"sizes": [1, 7]}),
        ("model.args.text='3'", ("model", "args"), {"sizes": [1, 2], "text": "3"}),
        ("model.args.eq=a=b", ("model", "args"), {"sizes": [1, 2], "eq": "a=b"}),
        ("train.optimizer.clip_grad_norm=null", ("train", "optimizer", "clip_grad_norm"), None),
        ("train.optimizer.clip_grad_norm=", ("train", "optimizer", "clip_grad_norm"), None),
    ],
)
def test_sets(override: str, path: tuple[str, ...], value: object, workspace: Path) -> None:
    found: object = load(workspace, override).job
    for name in path:
        found = getattr(found, name)
    assert found == value


def test_the_last_one_wins(workspace: Path) -> None:
    assert load(workspace, "train.steps=5", "train.steps=6").job.train.steps == 6


def test_one_of_two_is_replaced(workspace: Path) -> None:
    train = load(workspace, "train.steps=null", "train.until=1M tokens").job.train
    assert (train.steps, train.total_steps) == (None, 1954)


def test_a_repeated_value_changes_in_one_place(workspace: Path) -> None:
    job = JOB.replace("args: {sizes: [1, 2]}", "args: {one: &x {a: 1}, two: *x}")
    assert load(workspace, "model.args.two.a=2", job=job).job.model.args == {"one": {"a": 1}, "two": {"a": 2}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "--set train.steps=0: error: train.steps: expected a whole number above 0, found 0"),
        (
            "train.optimzer.lr=1",
            "--set train.optimzer.lr=1: error: train.optimzer: unknown key `optimzer`\n"
            "  help: did you mean `optimizer`?",
        ),
        ("train.lr=1", "--set train.lr=1: error: train.lr: unknown key `lr`\n  help: it belongs to `train.optimizer`: "
         "train.optimizer.lr"),
        ("budget.device_memory=80", "--set budget.device_memory=80: error: budget.device_memory: 80 is not a size in "
         "bytes; write a number with its unit, for example 80GiB or 80GB"),
        ("steps", "--set steps: error: expected KEY.PATH=VALUE\n  help: for example --set train.steps=10"),
        ("=3", "--set =3: error: expected KEY.PATH=VALUE\n  help: for example --set train.steps=10"),
        ("a..b=3", "--set a..b=3: error: expected KEY.PATH=VALUE\n  help: for example --set train.steps=10"),
        ("train.steps=[1", "--set train.steps=[1: error: train.steps: a list in brackets is not closed, or a comma is "
         "missing"),
        ("train.steps=!!python/name:os.system x", "--set train.steps=!!python/name:os.system x: error: train.steps: "
         "YAML tags are refused: a job is plain data"),
        (
            "cluster.launcher=slurm",
            "--set cluster.launcher=slurm: error: cluster.launcher: `cluster` is 'dgx-h100', which has no keys to set\n"
            "  help: set the whole: --set 'cluster={launcher: ...}'",
        ),
        ("model.args.sizes.2=7", "--set model.args.sizes.2=7: error: model.args.sizes.2: `model.args.sizes` is a list "
         "of 2: expected an index below that, from 0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(override: str, message: str, workspace: Path) -> None:
    assert said(workspace, override) == message


def test_errors_of_file_and_arguments_together(workspace: Path) -> None:
    text = said(workspace, "train.optimizer.lr=fast", job=JOB.replace("steps: 20", "steps: -2"))
    first, second = [line for line in text.splitlines() if "error:" in line]
    assert first.startswith("job.yaml:3:54: error: train.steps:")
    assert second.startswith("--set train.optimizer.lr=fast: error: train.optimizer.lr:")


def test_checks_between_values_name_the_argument(workspace: Path) -> None:
    said_of_both = said(workspace, "strategy.pp=1", "strategy.tp=1", "strategy.cp=1", "train.global_batch=9")
    assert said_of_both.startswith("--set train.global_batch=9: error: train.global_batch:")


def test_control_characters_of_an_argument_are_not_repeated(workspace: Path) -> None:
    assert "\x1b" not in said(workspace, "train.\x1b[31m=1\x1b[0m")
