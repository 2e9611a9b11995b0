"""What a model, a loss and a dataset must be, and what is said of those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from passes.jobs import GPT2, LLAMA, make_job
from passes.models import profile_of, refusal
from passes.zoo_jobs import ZOO, job_of
from shardwright.passes import profile_model
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.job import TrainSpec
from shardwright.schemas.profile import Affine

OWN_LOSS = """
class build(Model):
    def forward(self, tokens, labels):
        return F.cross_entropy(super().forward(tokens).flatten(0, 1), labels.flatten())
"""
LOSSES = """
def summed(output, batch):
    return F.cross_entropy(output.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
def by_token(output, batch):
    return F.cross_entropy(output.flatten(0, 1), batch["targets"].flatten(), reduction="none")
def constant(output, batch):
    return torch.zeros(())
def broken(output, batch):
    return output.no_such_thing()
"""
DATASET = """
def samples(length=24, targets=True, **extra):
    sample = {"input_ids": torch.arange(length)}
    if targets:
        sample["targets"] = torch.arange(length)
    return [sample | {name: torch.tensor(value) for name, value in extra.items()}]
def pairs():
    return [(1, 2)]
"""


def test_a_head_that_is_the_whole_model_is_priced(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, "build = lambda: nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))")
    (head,) = profile.units
    assert head.kind == "head"
    assert head.costs["fp32"].flops("forward", 2) == 2 * 2 * 24 * 8 * 256
    assert [(cut.after, cut.tensors) for cut in profile.cuts] == [("0", 1)]
    assert profile.input_bytes == Affine(0, 2 * 24 * 8)


@pytest.mark.parametrize("answer", ["x.transpose(0, 1)", "x.argmax(-1)", "(x, None)", "x[:, -1]"])
def test_output_that_is_not_logits(tmp_path: Path, answer: str) -> None:
    source = f"""
    class build(Model):
        def forward(self, tokens):
            x = super().forward(tokens)
            return {answer}
    """
    said = refusal(tmp_path, source)
    assert said.key == "model.loss"
    assert "logits of shape (2, 24, vocabulary)" in said.message


@pytest.mark.parametrize(
    ("data", "key"),
    [({"bytes": ["a.txt"]}, "data.bytes"), ({"synthetic": {"vocabulary": 300}}, "data.synthetic.vocabulary")],
)
@pytest.mark.parametrize(
    "source",
    [
        "build = lambda: Model(vocabulary=200)",
        "def build():\n    model = Model(vocabulary=400)\n    model.head = nn.Linear(16, 200)\n    return model",
    ],
    ids=["embedding", "logits"],
)
def test_vocabulary_too_small_for_the_data(tmp_path: Path, source: str, data: dict[str, Any], key: str) -> None:
    said = refusal(tmp_path, source, data=data)
    assert said.key == key
    assert "200" in said.message


def test_positions_beyond_the_table(tmp_path: Path) -> None:
    source = """
    class build(Model):
        def __init__(self):
            super().__init__()
            self.positions = nn.Embedding(25, 16)
        def forward(self, tokens):
            return super().forward(tokens) + self.positions(torch.arange(1, tokens.shape[1] + 1)).sum()
    """
    profile_of(tmp_path, source, length=24)
    said = refusal(tmp_path, source, length=25)
    assert said.key == "train.sequence_length"
    assert "25 entries" in said.message


def test_hugging_face_positions_beyond_the_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="128 entries"):
        profile_model(make_job({"hf": GPT2}, length=129), tmp_path, ("fp32",))


def test_the_models_own_loss(tmp_path: Path) -> None:
    inputs = {"tokens": "input_ids", "labels": "targets"}
    own = profile_of(tmp_path, OWN_LOSS, loss="model", inputs=inputs)
    ours = profile_of(tmp_path)
    assert [unit.costs["fp32"].flops("forward", 1) for unit in own.units] == [
        unit.costs["fp32"].flops("forward", 1) for unit in ours.units
    ]


def test_a_model_without_the_loss_it_is_said_to_have(tmp_path: Path) -> None:
    said = refusal(tmp_path, loss="model")
    assert said.key == "model.loss"
    assert "a tensor of shape (2, 24, 256)" in said.message


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("by_token", "a tensor of shape (48,)"),
        ("constant", "depends on no parameter"),
        ("broken", "no_such_thing"),
        ("sumed", "no function 'sumed'"),
    ],
)
def test_a_loss_function_that_is_wrong(tmp_path: Path, loss: str, words: str) -> None:
    said = refusal(tmp_path, LOSSES, loss=f"user:{loss}")
    assert said.key == "model.loss"
    assert words in said.message


def test_a_loss_function_that_is_right(tmp_path: Path) -> None:
    head = profile_of(tmp_path, LOSSES, loss="user:summed").units[-1].costs["fp32"]
    assert {operator.module for operator in head.operators} == {"head", "loss"}


def test_inputs_name_fields_that_exist(tmp_path: Path) -> None:
    said = refusal(tmp_path, inputs={"tokens": "inputids"})
    assert said.key == "model.inputs.tokens"
    assert "input_ids" in said.suggestion


def test_arguments_that_forward_lacks(tmp_path: Path) -> None:
    said = refusal(tmp_path, inputs={"token": "input_ids"})
    assert said.key == "model.factory"
    assert "'token'" in said.message


def test_labels_that_would_be_shifted_twice(tmp_path: Path) -> None:
    inputs = {"input_ids": "input_ids", "labels": "targets"}
    with pytest.raises(InputError, match="shifted already"):
        profile_model(make_job({"hf": LLAMA, "loss": "model", "inputs": inputs}), tmp_path, ("fp32",))
    right = make_job({"hf": LLAMA, "loss": "model", "inputs": {**inputs, "shift_labels": "targets"}})
    assert profile_model(right, tmp_path, ("fp32",)).block_paths


def test_a_dataset_gives_shapes(tmp_path: Path) -> None:
    data = {"dataset": "user:samples", "args": {"weight": 1.0}}
    profile = profile_of(tmp_path, DATASET, data=data)
    assert profile.input_bytes == Affine(0, 2 * 24 * 8 + 4)
    assert profile.units == profile_of(tmp_path).units


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"dataset": "user:pairs"}, "a dictionary of tensors"),
        ({"dataset": "user:samples", "args": {"length": 12}}, "(12,)"),
        ({"dataset": "user:samples", "args": {"targets": False}}, "no field 'targets'"),
        ({"dataset": "user:samples", "args": {"length": "x"}}, "TypeError"),
        ({"dataset": "user:sample"}, "no function 'sample'"),
    ],
)
def test_a_dataset_that_is_wrong(tmp_path: Path, data: dict[str, Any], words: str) -> None:
    said = refusal(tmp_path, DATASET, data=data)
    assert said.key == "data.dataset"
    assert words in said.message


def test_held_out_data_must_exist_too(tmp_path: Path) -> None:
    said = refusal(tmp_path, DATASET, data={"dataset": "user:samples", "validation_dataset": "user:others"})
    assert said.key == "data.validation_dataset"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x = x[:2] if len(x) > 2 else x", "logits of shape"),
        ("x = x * 2 if len(x) > 2 else x", "other operators"),
        ("x = (x.flatten(0, 1) @ x.flatten(0, 1).T @ x.flatten(0, 1)).view_as(x)", "of mm in the unit itself are"),
    ],
)
def test_a_cost_that_is_not_affine_in_the_micro_batch(tmp_path: Path, line: str, words: str) -> None:
    source = f"""
    class Odd(Block):
        def forward(self, x):
            {line}
            return super().forward(x)
    class build(Model):
        block = Odd
    """
    said = refusal(tmp_path, source)
    assert words in said.message
    assert "blocks.0: " in said.message or said.key == "model.loss"


def test_samples_without_tokens_need_no_sequence_length() -> None:
    job = job_of("resnet")
    train = TrainSpec.model_validate({"global_batch": 8, "steps": 2})
    profile = profile_model(job.model_copy(update={"train": train}), ZOO, ("fp32",))
    assert profile.sequence_length == 1
    assert profile.input_bytes == Affine(0, 4 * 3 * 16 * 16 + 8)
