"""Jobs that are right: what they load to, which keys count as defaults, and that a plan can hold them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.schemas import load_job
from shardwright.schemas.job import JobSpec, TrainSpec
from shardwright.schemas.units import Amount

CORPUS = sorted((Path(__file__).parent / "good").glob("*.yaml"))


@pytest.fixture
def folder(workspace: Path) -> Path:
    for path in CORPUS:
        shutil.copy(path, workspace)
    return workspace


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_good_job_survives_a_plan(path: Path, folder: Path) -> None:
    job = load_job(folder / path.name).job
    written = job.model_dump_json()
    assert JobSpec.model_validate_json(written, strict=True) == job
    assert JobSpec.model_validate_json(written, strict=True).model_dump_json() == written


def test_laptop(folder: Path) -> None:
    loaded = load_job(folder / "laptop.yaml")
    assert loaded.folder == folder
    assert loaded.job.data.bytes == ("corpus/*.txt",)
    assert loaded.job.train.optimizer.lr == 3e-3
    assert loaded.job.cluster.world_size == 2


def test_defaults_are_the_keys_that_nobody_wrote(folder: Path) -> None:
    defaults = load_job(folder / "laptop.yaml").defaults
    assert "train.optimizer.betas" in defaults  # beside written keys of one part
    assert "strategy.states.parameters" in defaults  # in a part that is absent as a whole
    assert "quality" in defaults
    assert not {"train.optimizer.lr", "model.loss", "train.optimizer", "strategy"} & set(defaults)
    assert not [key for key in defaults if key.startswith("cluster")]


def test_parameter_groups(folder: Path) -> None:
    loaded = load_job(folder / "parameter-groups.yaml")
    optimizer = loaded.job.train.optimizer
    assert optimizer.no_decay == ("*.bias", "embed*")
    assert [(each.match, each.lr_scale, each.weight_decay) for each in optimizer.groups] == [
        (("head.*",), 0.5, None),
        (("blocks.0.*", "blocks.1.*"), 2.0, 0.0),
    ]
    assert [key for key in loaded.defaults if "groups" in key] == ["train.optimizer.groups.0.weight_decay"]
    assert load_job(folder / "laptop.yaml", ["train.optimizer.no_decay=embed*"]).job.train.optimizer.no_decay == (
        "embed*",
    )
    assert load_job(folder / "laptop.yaml", ["train.optimizer.no_decay=auto"]).job.train.optimizer.no_decay == "auto"


def test_an_explicit_default_is_written(folder: Path) -> None:
    defaults = load_job(folder / "laptop.yaml", ["train.seed=0", "strategy.states.gradients=auto"]).defaults
    assert "train.seed" not in defaults
    assert "strategy.states.gradients" not in defaults
    assert "strategy.states.parameters" in defaults


def test_one_node(folder: Path) -> None:
    job = load_job(folder / "one-node.yaml").job
    assert job.train.global_batch == Amount(2**20, "tokens")
    assert job.train.global_batch_sequences == 4096
    assert job.train.save_every == Amount(3600.0, "seconds")
    assert job.data.validation is not None
    assert job.data.validation.files == ("val.u32",)


def test_choices_become_tuples(folder: Path) -> None:
    strategy = load_job(folder / "levels-and-limits.yaml").job.strategy
    assert strategy.micro_batch == (1, 2)
    assert strategy.reshard_after_forward == (True,)
    assert strategy.checkpointing == ("none", "full", 12)
    assert strategy.states.optimizer_states == ("node", "all", 4)
    assert strategy.states.gradients == "auto"


def test_arguments_keep_the_types_of_yaml_1_2(folder: Path) -> None:
    args = load_job(folder / "resized-nodes.yaml").job.model.args
    assert args == {"name": "3e-4", "on": "off", "ratio": 3e-4, "none": None, "deep": [1, [2.5, {"x": "yes"}]]}
    assert isinstance(args["deep"], list)  # a factory is called with what YAML says, not with tuples


def test_octal(folder: Path) -> None:
    assert load_job(folder / "own-device.yaml").job.train.seed == 15


def test_a_json_job(folder: Path) -> None:
    text = '{"model": {"factory": "model:build"}, "data": {"bytes": "corpus/a.txt"}, "cluster": "dgx-h100",\n'
    text += '"train": {"sequence_length": 8, "global_batch": 8, "steps": 1}}'
    (folder / "job.json").write_text(text)
    assert load_job(folder / "job.json").job.cluster.world_size == 8


def test_files_may_be_elsewhere(folder: Path) -> None:
    for name in ("model.py", "corpus/a.txt", "corpus/b.txt"):
        (folder / name).unlink()
    assert load_job(folder / "laptop.yaml", check_model=False, check_data=False).job.model.factory == "model:build"


@pytest.mark.parametrize(
    ("tokens", "length", "sequences"),
    [
        ("1M tokens", 8192, 128),  # 122.07 sequences: 128 is nearer than 112
        ("4M tokens", 8192, 512),
        ("1Mi tokens", 8192, 128),
        ("983040 tokens", 8192, 120),  # a whole number stays
        ("900k tokens", 8192, 112),
        ("5 tokens", 8192, 1),
        ("20 tokens", 8, 2),
    ],
)
def test_tokens_become_a_round_number_of_sequences(tokens: str, length: int, sequences: int) -> None:
    train = TrainSpec.model_validate({"sequence_length": length, "global_batch": tokens, "steps": 1})
    assert train.global_batch_sequences == sequences


@given(st.integers(1, 10**12), st.integers(1, 10**6))
def test_rounding_to_sequences_stays_within_an_eighth(tokens: int, length: int) -> None:
    train = TrainSpec.model_validate({"sequence_length": length, "global_batch": f"{tokens} tokens", "steps": 1})
    exact = tokens / length
    assert exact < 4 or abs(train.global_batch_sequences / exact - 1) <= 0.125


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.evaluate_every=null"],  # nothing asked for
        ["data.validation=corpus/b.txt", "train.evaluate_every=5", "train.evaluate_batches=2"],
        ["strategy.engine=[ddp, fsdp2]", "strategy.reshard_after_forward=true"],
        ["strategy.engine=ddp", "strategy.reshard_after_forward=auto"],
        ["data={synthetic: {vocabulary: 256}, args: {}}"],
        ["data.bytes=[corpus/a.txt, corpus/*.txt]", "data.mask=[corpus/a.mask, corpus/a.mask, corpus/b.mask]"],
        ["model={hf: {model_type: xlstm, architectures: [xLSTMForCausalLM, 3]}}"],
        ["model={hf: {model_type: llama, architectures: null}}"],
    ],
)
def test_what_a_refusal_must_not_reach(overrides: list[str], folder: Path) -> None:
    assert load_job(folder / "laptop.yaml", overrides).job.cluster.world_size == 2
