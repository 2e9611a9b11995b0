"""Real weights in one process: every form that they are stored in, and every folder that must be refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stored import MODELS, from_pretrained, make_folder, model_class
from support.tiny import Tiny, build
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime import weights
from shardwright.backends.pytorch.runtime.initialize import InitializationError, allocate, parameters_on_meta
from shardwright.backends.pytorch.runtime.weights import load_weights

CPU = torch.device("cpu")
SUPPORT = Path(__file__).parents[1] / "support"


def empty(make: Callable[[], nn.Module]) -> Any:
    """A model as an emitted script builds it before it loads."""
    with parameters_on_meta():
        model = make()
    allocate(model, CPU)
    return model


def tiny_state(**changes: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn_like(value) for name, value in build().state_dict().items()} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model's weights in one file."""
    save_file(tiny_state(), tmp_path / "model.safetensors")
    return tmp_path


def load_tiny(folder: Path, **arguments: Any) -> Tiny:
    model: Tiny = empty(lambda: build(tied=arguments.pop("tied", False)))
    load_weights(model, folder, **arguments)
    return model


def test_parameters_and_persistent_buffers_are_filled(folder: Path) -> None:
    found = load_tiny(folder).state_dict()
    for name, value in tiny_state().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_widths_become_the_models(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: value.to(dtype) for name, value in tiny_state().items()}
    save_file(stored, tmp_path / "model.safetensors")
    found = load_tiny(tmp_path).state_dict()
    for name, value in stored.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value.float()), name


def test_large_tensors_are_read_in_stretches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", 300)
    found = load_tiny(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in tiny_state().items())


def test_files_may_be_links_as_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    (folder / "blobs").mkdir()
    (folder / "model.safetensors").rename(folder / "blobs" / "0123abcd")
    (folder / "model.safetensors").symlink_to(Path("blobs", "0123abcd"))
    load_tiny(folder)


def test_any_safetensors_files_will_do_without_an_index(tmp_path: Path) -> None:
    items = list(tiny_state().items())
    save_file(dict(items[:5]), tmp_path / "first.safetensors")
    save_file(dict(items[5:]), tmp_path / "second.safetensors")
    found = load_tiny(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in items)


@pytest.mark.parametrize("absent", ["embed.weight", "head.weight", None])
def test_of_tied_tensors_one_name_is_enough(tmp_path: Path, absent: str | None) -> None:
    state = tiny_state()
    state["head.weight"] = state["embed.weight"].clone()
    expected = state["embed.weight"]
    save_file({name: value for name, value in state.items() if name != absent}, tmp_path / "model.safetensors")
    model = load_tiny(tmp_path, tied=True)
    assert torch.equal(model.embed.weight, expected)
    assert model.head.weight is model.embed.weight


def test_tied_tensors_that_differ_are_refused(folder: Path) -> None:
    with pytest.raises(SystemExit, match="tied to another tensor of the model, but stored with other values"):
        load_tiny(folder, tied=True)


def test_what_does_not_fit_is_counted_and_named(tmp_path: Path) -> None:
    state = tiny_state(**{"positions.weight": torch.zeros(63, 32), "norm.bias": torch.zeros(32, dtype=torch.int8)})
    for number in range(3):
        for kind in ("weight", "bias"):
            state[f"blocks.{number}.norm_1.{kind}"] = state.pop(f"blocks.{number}.norm.{kind}")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit) as caught:
        load_tiny(tmp_path)
    assert str(caught.value).splitlines() == [
        f"could not load the weights of {tmp_path}: they do not fit Tiny",
        "  6 needed by the model and not stored: blocks.0.norm.weight (stored: blocks.0.norm_1.weight?), "
        "blocks.0.norm.bias (stored: blocks.0.norm_1.bias?), "
        "blocks.1.norm.weight (stored: blocks.1.norm_1.weight?) and 3 more",
        "  6 stored, without a place in the model (--unused REGEX leaves them out): blocks.0.norm_1.bias, "
        "blocks.0.norm_1.weight, blocks.1.norm_1.bias and 3 more",
        "  1 of another shape: positions.weight ((63, 32) instead of (64, 32))",
        "  1 of another kind: norm.bias (torch.int8 instead of torch.float32)",
    ]


def test_what_is_not_needed_can_be_left_out(tmp_path: Path) -> None:
    save_file(
        tiny_state(**{"critic.0.weight": torch.zeros(2), "critic.0.bias": torch.zeros(2)}),
        tmp_path / "model.safetensors",
    )
    with pytest.raises(SystemExit, match="2 stored, without a place"):
        load_tiny(tmp_path, unused=["^actor"])
    load_tiny(tmp_path, unused=["^actor", "^critic"])


class Derived(nn.Module):
    """Computes a buffer from a parameter as it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("norm", self.weight.detach().norm())


def test_a_buffer_that_needs_a_parameters_values_is_refused() -> None:
    with pytest.raises(InitializationError, match=r"the buffer norm is computed .*init: constructor"):
        empty(Derived)


def header(path: Path, text: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def index(folder: Path, file: Any, name: str = "norm.bias") -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = dict.fromkeys(tiny_state(), "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | {name: file}}))


def in_two_files(folder: Path) -> None:
    index(folder, "b.safetensors")
    save_file({"norm.bias": torch.zeros(32), "head.weight": torch.zeros(2)}, folder / "b.safetensors")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 5000), "the header describes"),
    "cut within the header": (lambda f: os.truncate(f / "model.safetensors", 300), "header's length does not fit"),
    "a header of 2**60 bytes": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "length",
    ),
    "not a shape": (
        lambda f: header(f / "model.safetensors", b'{"t":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"0000"),
        "NaN is not a number",
    ),
    "overlapping": (
        lambda f: header(
            f / "model.safetensors",
            b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"u":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"0000",
        ),
        "overlap or leave holes",
    ),
    "a device": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").symlink_to("/dev/zero")),
        "not a regular",
    ),
    "a pipe": (lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")), "not a regular"),
    "out of the folder": (lambda f: index(f, "../../etc/passwd"), "no file of this folder"),
    "absolute": (lambda f: index(f, "/etc/passwd.safetensors"), "no file of this folder"),
    "another suffix": (lambda f: index(f, "pytorch_model.bin"), "no file of this folder"),
    "no text": (lambda f: index(f, ["a.safetensors"]), "no file of this folder"),
    "an absent file": (lambda f: index(f, "b.safetensors"), "cannot be opened"),
    "not in its file": (lambda f: index(f, "a.safetensors", "norm.gain"), "norm.gain is not in a.safetensors"),
    "in two files": (in_two_files, "head.weight is stored in a.safetensors as well"),
    "an index twice": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / weights.INDEX).write_text('{"weight_map": {}, "weight_map": {}}'),
        ),
        "a key comes twice",
    ),
    "an empty index": (
        lambda f: ((f / "model.safetensors").unlink(), (f / weights.INDEX).write_text("{}")),
        "no weight_map",
    ),
    "a deep index": (
        lambda f: ((f / "model.safetensors").unlink(), (f / weights.INDEX).write_text("[" * 10**5)),
        "not valid JSON",
    ),
    "a pickle alone": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pytorch_model\.bin, a pickle, .*save_pretrained",
    ),
    "a pickle inside": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"a": 1})), "length does not fit"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_or_hostile_folder_is_refused(folder: Path, name: str) -> None:
    damage, message = HOSTILE[name]
    damage(folder)
    with pytest.raises(SystemExit, match=message):
        load_tiny(folder)


def test_an_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no folder"):
        load_tiny(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "amsp"])
def test_a_process_reads_and_holds_its_share_alone(tmp_path: Path, engine: str) -> None:
    """One of 64 processes, limited to 40 MiB, of a model of 1 GiB: 16 MiB are its own. Flat buckets are cut from a
    block that is whole for a moment, of 64 MiB, twice."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(SUPPORT / "little_memory.py"), str(tmp_path), engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["limited"], "the limit must be one that a whole tensor does not fit into"
    assert found["read"] == 2**30 // 64
    assert found["firsts"] == [layer * 10000 + 37 * 64 for layer in range(16)]


def load_hugging_face(folder: Path, name: str) -> nn.Module:
    from transformers import AutoConfig

    from shardwright.backends.pytorch.runtime.hugging_face import hugging_face_names

    config = AutoConfig.from_pretrained(folder / "config.json")
    model: nn.Module = empty(lambda: model_class(name)(config))
    load_weights(model, folder, naming=hugging_face_names)
    return model


def assert_equal_to_from_pretrained(folder: Path, name: str) -> None:
    found, expected = load_hugging_face(folder, name), from_pretrained(folder, name)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    for (key, value), (_, usual) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(value, usual), key


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_models_are_loaded_as_from_pretrained_does(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path, name)
    if name == "llama":
        assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    assert_equal_to_from_pretrained(tmp_path, name)


def renamed(folder: Path, rename: Callable[[str], str], **more: Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(
        {rename(name): value for name, value in state.items()} | more, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.slow
def test_old_names_are_understood(tmp_path: Path) -> None:
    """As the first BERTs were stored, with a buffer that is computed since."""
    make_folder(tmp_path, "bert")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    before = set(load_file(tmp_path / "model.safetensors"))

    def rename(name: str) -> str:
        for new, was in old.items():
            name = name.replace(new, was)
        return name

    renamed(tmp_path, rename, **{"bert.embeddings.position_ids": torch.arange(512)[None]})
    assert len(before - set(load_file(tmp_path / "model.safetensors"))) > 8
    assert_equal_to_from_pretrained(tmp_path, "bert")


@pytest.mark.slow
def test_fused_experts_are_loaded_as_they_are(tmp_path: Path) -> None:
    make_folder(tmp_path / "made", "mixtral")
    model = from_pretrained(tmp_path / "made", "mixtral")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)  # type: ignore[operator]
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    assert_equal_to_from_pretrained(tmp_path / "fused", "mixtral")


@pytest.mark.slow
def test_experts_that_do_not_count_up_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, "mixtral")
    renamed(tmp_path, lambda name: name.replace(".experts.1.", ".experts.7."))
    with pytest.raises(SystemExit, match="do not count up from 0"):
        load_hugging_face(tmp_path, "mixtral")


@pytest.mark.slow
def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, "mixtral")
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if ".experts.2." not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        SystemExit, match=r"6 of another shape: .*gate_up_proj \(4 x \(40, 48\) instead of \(3, 80, 48\)\)"
    ):
        load_hugging_face(tmp_path, "mixtral")


@pytest.mark.slow
def test_a_conversion_that_is_not_known_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwright.backends.pytorch.runtime import hugging_face

    make_folder(tmp_path, "mixtral")
    monkeypatch.setattr(hugging_face, "CONVERSIONS", {("Chunk",): hugging_face.CONVERSIONS["Chunk",]})
    with pytest.raises(
        SystemExit, match=r"models of type mixtral .* MergeModulelist and Concatenate .*save_original_format=False"
    ):
        load_hugging_face(tmp_path, "mixtral")
