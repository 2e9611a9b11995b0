"""From a checkpoint to a folder of safetensors files, in one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.stored import MODELS, from_pretrained, make_folder, model_class
from support.tiny import build
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime import weights
from shardwright.backends.pytorch.runtime.average import update_average
from shardwright.backends.pytorch.runtime.checkpoint import Checkpoints, TrainState
from shardwright.backends.pytorch.runtime.export import export_model
from shardwright.backends.pytorch.runtime.tensorfile import FormatError


def saved(folder: Path, model: nn.Module, step: int = 3) -> Path:
    """The folder of a run with a checkpoint of the model."""
    Checkpoints(folder, keep=9).save(TrainState(step, 100, 0), model, torch.optim.SGD(model.parameters(), lr=0.1))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    return saved(tmp_path / "out", build())


def test_parameters_and_buffers_go_by_their_own_names(run: Path, tmp_path: Path) -> None:
    done = export_model(run, tmp_path / "exported", dtype=torch.float32)
    torch.manual_seed(5)
    expected = build().state_dict()
    found = load_file(tmp_path / "exported" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (done.step, done.tensors, done.files) == (3, len(expected), ("model.safetensors",))
    assert done.total_bytes == sum(value.nbytes for value in expected.values())
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["model.safetensors"]


def test_a_checkpoint_may_be_chosen(run: Path, tmp_path: Path) -> None:
    saved(run, build(), step=4)
    assert export_model(run, tmp_path / "newest", dtype=torch.float32).step == 4
    assert export_model(run / "step_00000003", tmp_path / "older", dtype=torch.float32).step == 3


def test_averages_take_the_place_of_trained_parameters(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no averages"):
        export_model(run, tmp_path / "exported", dtype=torch.float32, average=True)
    model = build()
    model.head.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.arange(12)[None]).square().mean().backward()
        optimizer.step()
        update_average(optimizer, 0.5)
    Checkpoints(tmp_path / "averaged", keep=1).save(TrainState(2, 24, 0), model, optimizer)
    for average in (False, True):
        folder = tmp_path / f"exported {average}"
        export_model(tmp_path / "averaged", folder, dtype=torch.float32, average=average)
        found = load_file(folder / "model.safetensors")
        assert found.keys() == model.state_dict().keys()
        for name, parameter in model.named_parameters():
            own = optimizer.state[parameter]["average"] if average and parameter.requires_grad else parameter
            assert torch.equal(found[name], own), name
    assert not torch.equal(found["norm.weight"], model.norm.weight)


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor, found through the index, with the safetensors library."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors[name] = opened.get_tensor(name)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def test_large_models_take_several_files_and_narrow_numbers_less(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", 1000)  # several stretches a tensor
    done = export_model(run, tmp_path / "exported", dtype=torch.bfloat16, max_file_bytes=20_000)
    torch.manual_seed(5)
    expected = build().state_dict()
    found = read_all(tmp_path / "exported")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in expected.items())
    assert len(done.files) > 3
    assert done.files[0] == f"model-00001-of-{len(done.files):05d}.safetensors"
    for file in done.files:
        held = load_file(tmp_path / "exported" / file)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 20_000


def test_the_configuration_and_the_tokenizer_come_along(run: Path, tmp_path: Path) -> None:
    beside = tmp_path / "llama"
    beside.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors", "notes.txt"):
        (beside / name).write_text(name)
    config = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": {"quant_method": "fp8"}}
    export_model(run, tmp_path / "exported", dtype=torch.bfloat16, config=config, companions=beside)
    names = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written == {"model_type": "llama", "torch_dtype": "bfloat16"}
    assert load_file(tmp_path / "exported" / "model.safetensors").keys() == build().state_dict().keys()


def test_nothing_is_overwritten_and_nothing_half_is_left(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exported").mkdir()
    with pytest.raises(FormatError, match="exists already"):
        export_model(run, tmp_path / "exported", dtype=torch.float32)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space"):
        export_model(run, tmp_path / "another", dtype=torch.float32)
    assert sorted(tmp_path.iterdir()) == before


def test_without_a_checkpoint_or_with_a_broken_one_nothing_is_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no checkpoint"):
        export_model(tmp_path / "nowhere", tmp_path / "exported", dtype=torch.float32)
    path = run / "step_00000003" / "rank_00000.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FormatError, match="the header describes"):
        export_model(run, tmp_path / "exported", dtype=torch.float32)
    assert not (tmp_path / "exported").exists()


def names_and_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_models_leave_as_save_pretrained_writes_them(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig

    from shardwright.backends.pytorch.runtime.hugging_face import stored_form

    make_folder(tmp_path / "made", name)
    model: Any = from_pretrained(tmp_path / "made", name)
    saved(tmp_path / "out", model)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    with torch.device("meta"):
        form = stored_form(model_class(name)(AutoConfig.from_pretrained(tmp_path / "made")))
    limit = 40_000
    export_model(
        tmp_path / "out", tmp_path / "out form", dtype=torch.float32, form=form, config=config, max_file_bytes=limit
    )
    again: Any = from_pretrained(tmp_path / "out form", name)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    fresh = model_class(name)(
        model.config
    )  # from_pretrained remembers what it renamed; save_pretrained then does so too
    fresh.save_pretrained(tmp_path / "theirs")
    assert names_and_shapes(tmp_path / "out form") == names_and_shapes(tmp_path / "theirs")


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from shardwright.backends.pytorch.runtime.hugging_face import stored_form

    fields = {
        key: value for key, value in MODELS["llama"]["config"].items() if key not in ("model_type", "architectures")
    }
    with torch.device("meta"):
        form = stored_form(model_class("llama")(LlamaConfig(**fields)))
    with pytest.raises(FormatError, match="holds another model"):
        export_model(run, tmp_path / "exported", dtype=torch.float32, form=form)
