"""A checkpoint of a run as a folder of safetensors files, in the layout that transformers saves and loads.

Nothing is ever whole in memory: each tensor is read from the pieces of the checkpoint, converted and written in
stretches. The folder appears when it is complete, and never takes the place of another.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoints
from .index import INDEX as CHECKPOINT_INDEX
from .index import Index, Stored, check_cover, key_of, read_index
from .parts import Part, Shape, as_it_is
from .pieces import Box, whole
from .tensorfile import Entry, FormatError, open_tensors, write_pieces
from .weights import INDEX, SINGLE, slabs

MAX_FILE_BYTES = 5_000_000_000
AVERAGES = "optimizer.average."
"""Before the name of a parameter, that of its moving average (average.py)."""
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What is copied from beside the initial weights, where it is there."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    step: int
    tensors: int
    files: tuple[str, ...]
    total_bytes: int


def export_model(
    checkpoint: Path,
    folder: Path,
    *,
    dtype: torch.dtype,
    form: Mapping[str, Sequence[Part]] | None = None,
    config: Mapping[str, Any] | None = None,
    companions: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    average: bool = False,
) -> Exported:
    """Write the model of a checkpoint into a new folder; floating-point numbers become `dtype`.

    `checkpoint`: a checkpoint's folder, or the folder of a run, of which the newest one is taken. `form`: where in
    which stored tensor each tensor of the model goes (`stored_form`); None to store them as they are. `config`: the
    content of `config.json`, which gets the dtype. `companions`: where to copy tokenizer files from. `average`: write
    the moving averages of the parameters; those that have none, such as frozen ones, as they are. Raises FormatError
    for a broken checkpoint, one of another model or without averages, and an existing `folder`.
    """
    checkpoint = checkpoint_folder(checkpoint)
    index = read_index(checkpoint)
    if folder.exists():
        raise FormatError(f"{folder} exists already; nothing is overwritten")
    model = {name.split(".", 1)[1]: name for name in index.tensors if name.startswith(("model.", "buffer."))}
    if average:
        model |= _averages(checkpoint, index)
    if form is None:
        form = {name: [as_it_is(name, index.tensors[key].shape)] for name, key in model.items()}
    if form.keys() != model.keys():
        raise FormatError(f"{checkpoint}: holds another model; they differ in {min(form.keys() ^ model.keys())}")
    source = _Source(checkpoint, index, model, form, dtype)
    files = _divide(source.layout, max_file_bytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, tensors in files.items():
            layout = {tensor: source.layout[tensor] for tensor in tensors}
            write_pieces(staging / name, layout, source.pieces, {"format": "pt"})
        total = sum(map(source.bytes, source.layout))
        if len(files) > 1:
            where = {tensor: name for name, tensors in files.items() for tensor in tensors}
            _write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
        if companions is not None:
            for name in COMPANIONS:
                if (companions / name).is_file():
                    shutil.copyfile(companions / name, staging / name)
        if config is not None:
            _write_json(staging / "config.json", _with_dtype(config, dtype))
        staging.chmod(0o755)
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Exported(index.train.step, len(source.layout), tuple(files), total)


def _averages(checkpoint: Path, index: Index) -> dict[str, str]:
    """The stored names of the moving averages, by parameter. Raises FormatError where there are none."""
    found = {name.removeprefix(AVERAGES): name for name in index.tensors if name.startswith(AVERAGES)}
    if not found:
        raise FormatError(f"{checkpoint}: holds no averages of the parameters")
    return found


def checkpoint_folder(path: Path) -> Path:
    """A checkpoint's folder as it is, or the newest one of a run's folder. Raises FormatError without one."""
    if (path / CHECKPOINT_INDEX).exists():
        return path
    newest = Checkpoints(path, keep=1).latest()
    if newest is None:
        raise FormatError(f"{path} holds no checkpoint")
    return path / newest


class _Source:
    """The stored form of a checkpoint's model, read tensor by tensor."""

    def __init__(
        self,
        folder: Path,
        index: Index,
        model: Mapping[str, str],
        form: Mapping[str, Sequence[Part]],
        dtype: torch.dtype,
    ) -> None:
        self._folder = folder
        self._parts: dict[str, list[tuple[str, Stored, Part]]] = defaultdict(list)
        self._headers: dict[str, Mapping[str, Entry]] = {}
        for name, parts in form.items():
            key = model[name]
            stored = index.tensors[key]
            check_cover(name, stored.shape, [part.box for part in parts])
            for part in parts:
                self._parts[part.stored].append((key, stored, part))
        self.layout: dict[str, tuple[torch.dtype, Shape]] = {}
        for name, owners in self._parts.items():
            boxes = [part.to_stored(part.box) for _, _, part in owners]
            shape = tuple(map(max, zip(*(box.stop for box in boxes), strict=True)))
            check_cover(name, shape, boxes)
            own = owners[0][1].dtype
            self.layout[name] = (dtype if own.is_floating_point else own, shape)

    def bytes(self, name: str) -> int:
        """Size of a stored tensor."""
        dtype, shape = self.layout[name]
        return prod(shape) * dtype.itemsize

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A stored tensor in stretches of rows."""
        dtype, shape = self.layout[name]
        for slab in slabs(whole(shape), shape, torch.float64):
            values = torch.empty(slab.shape, dtype=dtype)
            for key, stored, part in self._parts[name]:
                common = slab.overlap(part.to_stored(part.box))
                if common is not None:
                    self._read(key, stored, part, common, values[common.within(slab)])
            yield values

    def _read(self, key: str, stored: Stored, part: Part, box: Box, values: Tensor) -> None:
        """Fill `values` with a box of a stored tensor, from the pieces of the checkpoint that overlap it."""
        wanted = part.to_model(box)
        values = values.unsqueeze(0) if part.stacked else values
        for file_name, piece in stored.pieces:
            common = wanted.overlap(piece)
            if common is None:
                continue
            with open_tensors(self._folder / file_name, self._headers.get(file_name)) as file:
                self._headers[file_name] = file.entries
                piece_key = key_of(key, piece)
                entry = file.entries.get(piece_key)
                if entry is None or (entry.dtype, entry.shape) != (stored.dtype, piece.shape):
                    raise FormatError(f"{file.path}: does not hold {piece_key} as the index says")
                values[common.within(wanted)] = file.part(piece_key, common.within(piece)).to(values.dtype)


def _divide(layout: Mapping[str, tuple[torch.dtype, Shape]], most: int) -> dict[str, list[str]]:
    """Names of files, and of the tensors in each: at most so many bytes a file, but one tensor at least."""
    groups: list[list[str]] = []
    room = 0
    for name, (dtype, shape) in layout.items():
        size = prod(shape) * dtype.itemsize
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    if len(groups) <= 1:
        return {SINGLE: list(layout)}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The configuration of what is stored now: its dtype under the key that it has for it, no quantisation."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    key = "dtype" if "dtype" in kept else "torch_dtype"
    return kept | {key: str(dtype).removeprefix("torch.")}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
