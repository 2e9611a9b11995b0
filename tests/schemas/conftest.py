"""A folder with the files that the jobs of the corpora name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

MODEL = """\
import torch

def build(layers=2):
    return torch.nn.Linear(layers, layers)

def loss(output, batch):
    return output.sum()

class dataset:
    pass
"""


def tensor_file(dtype: str = "F32", offsets: tuple[int, int] = (0, 8)) -> bytes:
    """A safetensors file with one tensor of two numbers."""
    header = json.dumps({"w": {"dtype": dtype, "shape": [2], "data_offsets": offsets}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


def make_weights(folder: Path) -> None:
    """Folders with weights as people have them: whole, in several files, and in ways that are refused."""
    config = json.dumps({"model_type": "llama", "hidden_size": 64}).encode()
    index = "model.safetensors.index.json"
    folders: dict[str, dict[str, bytes]] = {
        "llama": {"config.json": config, "model.safetensors": tensor_file()},
        "parts": {index: b'{"weight_map": {"w": "a.safetensors"}}', "a.safetensors": tensor_file("F32")},
        "pickled": {"config.json": config, "pytorch_model.bin": b"."},
        "cut-short": {"model.safetensors": tensor_file()[:-1]},
        "no-tensors": {"model.safetensors": b"<html>Please log in</html>"},
        "overlapping": {"model.safetensors": tensor_file(offsets=(0, 4))},
        "escaping": {index: b'{"weight_map": {"w": "../../etc/passwd"}}'},
        "incomplete": {index: b'{"weight_map": {"w": "model-00001-of-00002.safetensors"}}'},
        "unindexed": {index: b'{"weight_map": {"w": "a.safetensors", "w": "a.safetensors"}}'},
        "quantised": {"model.safetensors": tensor_file("F8_E4M3")},
    }
    for name, files in folders.items():
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_bytes(content)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh current folder with a model, configurations, texts, masks and token files."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "broken.py").write_text("def build(:\n    pass\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    (tmp_path / "not-a-model.json").write_text(json.dumps({"hidden_size": 64}))
    text_architecture = {"model_type": "llama", "architectures": "LlamaForCausalLM"}
    (tmp_path / "text-architecture.json").write_text(json.dumps(text_architecture))
    (tmp_path / "long.txt").write_bytes(b"that is the question" * 50)
    for name in ("a", "b"):
        (corpus / f"{name}.txt").write_bytes(b"to be or not to be, " * 20)
        (corpus / f"{name}.mask").write_bytes(bytes([0, 1]) * 200)
    (corpus / "short.mask").write_bytes(bytes(10))
    (tmp_path / "odd.u16").write_bytes(bytes(401))
    (tmp_path / "train.u32").write_bytes(struct.pack("<400I", *range(400)))
    (tmp_path / "train.mask").write_bytes(bytes([1]) * 400)
    (tmp_path / "val.u32").write_bytes(struct.pack("<400I", *range(400)))
    (tmp_path / "node.yaml").write_text("devices: 8 x h100-sxm-80gb\nlauncher: slurm\n")
    make_weights(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
