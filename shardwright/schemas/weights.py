"""The folder that a model's weights come from: whether it holds safetensors files, and what their headers say.

Headers alone are read, and without torch: the files may be larger than this machine. The emitted script reads them
once more, and compares them with the model.

Format: https://huggingface.co/docs/safetensors, "Format"; index: `save_pretrained` of transformers.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from shardwright.schemas.diagnostics import Diagnostic, shown
from shardwright.schemas.expected import nearest
from shardwright.schemas.job import ModelSpec
from shardwright.schemas.paths import is_file, is_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library allows."""

KEY = "model.weights"
_FILE = re.compile(r"[^/\\\0]+\.safetensors")
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth")


class _Unfit(Exception):
    """A file is not what it should be. The message says what it is called and why; `hint` the way out."""

    def __init__(self, message: str, hint: str = "fetch the files anew, or save them again") -> None:
        super().__init__(message)
        self.hint = hint


def weights_folder(model: ModelSpec, folder: Path) -> str | None:
    """The folder of weights as the job writes it, relative to `folder` or absolute; None for random weights, and where
    `load` has no folder to load from."""
    if model.weights != "load":
        return None if model.weights == "random" else model.weights
    if not isinstance(model.hf, str):
        return None
    return model.hf if is_folder(folder / model.hf) else str(Path(model.hf).parent)


def check_weights(model: ModelSpec, folder: Path) -> Iterator[Diagnostic]:
    """Everything about `model.weights` that can be seen without the model."""
    if model.weights == "random":
        return
    written = weights_folder(model, folder)
    if written is None:
        what = "a `factory` has no files of its own" if model.hf is None else "the configuration is written inline"
        hint = "write the folder of the safetensors files: weights: path/to/folder"
        yield Diagnostic(key=KEY, message=f"`load` takes the files beside the configuration; {what}", suggestion=hint)
        return
    path = folder / written
    if not is_folder(path):
        near = nearest(written, ["random", "load"])
        hint = f"did you mean `{near}`?" if near else "nothing is fetched from the hub: save the files beside the job"
        yield Diagnostic(key=KEY, message=f"there is no folder {shown(written)}", suggestion=hint)
        return
    try:
        files = list(_files(path))
        if not files:
            yield _no_safetensors(path, written)
            return
        for file in files:
            _header(file)
    except _Unfit as error:
        yield Diagnostic(key=KEY, message=str(error), suggestion=error.hint)


def stored_dtype(path: Path) -> str | None:
    """The dtype of most floating-point numbers of a folder of weights, by its name in the format ("BF16"); None where
    nothing can be read or there are none."""
    amounts: dict[str, int] = {}
    if not is_folder(path):
        return None
    try:
        for file in _files(path):
            for entry in _header(file).values():
                amounts[entry["dtype"]] = amounts.get(entry["dtype"], 0) + prod(entry["shape"])
    except _Unfit:
        return None
    floating = {name: amount for name, amount in amounts.items() if "F" in name}
    return max(floating, key=lambda name: floating[name], default=None)


def _files(path: Path) -> Iterator[Path]:
    """The files that the weights lie in. Raises _Unfit for an index that does not say."""
    if is_file(path / SINGLE):
        yield path / SINGLE
    elif is_file(path / INDEX):
        for name in _indexed(path / INDEX):
            if not is_file(path / name):
                raise _Unfit(f"{INDEX} names {shown(name)}, which is not there")
            yield path / name
    else:
        yield from sorted(file for file in path.glob("*.safetensors") if is_file(file))


def _indexed(path: Path) -> list[str]:
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise _Unfit(f"{INDEX} is larger than any index")
    content = _parsed(path.read_bytes(), INDEX)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise _Unfit(f"{INDEX} has no `weight_map`")
    for name, file in found.items():
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise _Unfit(f"{INDEX}: {shown(name)} is said to lie in {shown(file)}, which is no file of this folder")
    return sorted(set(found.values()))


def _header(path: Path) -> Mapping[str, Any]:
    """The tensors of a file by name. Raises _Unfit unless they fill the file without holes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise _Unfit(f"{shown(path.name)} is cut short, or no safetensors file: its header does not fit into it")
        header = _parsed(file.read(length), path.name)
    if not isinstance(header, dict):
        raise _Unfit(f"{shown(path.name)}: the header is not an object")
    header.pop("__metadata__", None)
    spans = sorted(_span(f"{shown(path.name)}: {shown(name)}", entry) for name, entry in header.items())
    end = 0
    for start, stop in spans:
        if start != end:
            raise _Unfit(f"{shown(path.name)}: its tensors overlap or leave holes")
        end = stop
    if end != size - 8 - length:
        held = size - 8 - length
        raise _Unfit(f"{shown(path.name)} holds {held} bytes of tensors, but its header describes {end}")
    return header


def _span(what: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends. Raises _Unfit for what is no tensor, or one that cannot be trained."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Unfit(f"{what} is no tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        hint = "start from weights that are stored in bf16, fp16 or fp32"
        raise _Unfit(f"{what} is stored as {shown(dtype)}; quantised weights are not read", hint)
    if not _whole_numbers(shape) or len(shape) > 16 or prod(size for size in shape if size) > 2**62:
        raise _Unfit(f"{what} has no shape")
    if not _whole_numbers(offsets) or len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != prod(shape) * _BITS[dtype]:
        raise _Unfit(f"{what}: its bytes do not hold its shape")
    return offsets[0], offsets[1]


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _parsed(text: bytes, name: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name comes twice")
        return found

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _Unfit(f"{shown(name)} is not valid: {error}") from error


def _no_safetensors(path: Path, written: str) -> Diagnostic:
    where = "the job's folder" if written == "." else shown(written)
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if not pickles:
        return Diagnostic(key=KEY, message=f"{where} holds no safetensors files", suggestion=f"such as {SINGLE}")
    return Diagnostic(
        key=KEY,
        message=f"{where} holds {shown(pickles[0])}, a pickle, which could run any code and is never read",
        suggestion="convert it where you trust it: from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of the model's "
        "class in transformers",
    )
