"""Initial weights from a folder of safetensors files, read into a model that is sharded already.

[Note: a folder of weights]
As `save_pretrained` of transformers writes it: `model.safetensors`, or several files and
`model.safetensors.index.json`, whose `weight_map` says in which of them each tensor lies. Without either, all files
that end in `.safetensors`. Every process reads the headers of all files, and then of each tensor the rows of its own
shard, at most READ_BYTES at a time: none ever holds the whole model, or even a whole tensor of it. Files may be links,
as in the cache of the Hugging Face hub. No pickle is read.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import CheckpointError, together
from .held import STOCK, Held, Holder
from .index import check_cover
from .parts import Naming, Part, original_class, own_names
from .pieces import Box
from .tensorfile import Entry, FormatError, TensorFile, first_wide, open_regular, open_tensors, strict_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 100_000_000
READ_BYTES = 64 * 2**20
"""Most bytes of a tensor that are read at a time."""

_FILE = re.compile(r"[^/\\\0]+\.safetensors")
_SHOWN = 3


class Located(NamedTuple):
    """A stored tensor."""

    path: Path
    entry: Entry


class Fill(NamedTuple):
    """A part of a stored tensor to copy into a tensor of the model; or, for a tied one, to compare with it."""

    name: str
    tensor: Tensor
    part: Part
    compare: bool


def load_weights(
    model: nn.Module,
    folder: Path,
    *,
    naming: Naming = own_names,
    unused: Sequence[str] = (),
    holder: Holder = STOCK,
) -> None:
    """Fill the parameters and persistent buffers of a model from a folder; see [Note: a folder of weights].

    `unused`: regular expressions of stored tensors that the model has no place for. `holder`: as for `Checkpoints`.
    Floating-point numbers are converted to the dtype that the model is kept in. Raises SystemExit in every process when
    any of them finds the folder broken, or unfit for the model: then every tensor that is missing, left over, of
    another shape or kind is counted.
    """
    try:
        with holder.filling():
            _load(model, folder, naming, unused, holder)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error


def _load(model: nn.Module, folder: Path, naming: Naming, unused: Sequence[str], holder: Holder) -> None:
    what = f"the weights of {folder}"
    stored: dict[str, Located] = {}
    fills: list[Fill] = []
    first = not dist.is_initialized() or dist.get_rank() == 0
    # The first process looks alone, so that what is wrong with the folder is said once.
    for turn in (first, not first):
        with together("load", what):
            if turn:
                stored = stored_tensors(folder)
                fills = match(model, stored, naming, unused, holder)
    by_file: dict[Path, list[Fill]] = defaultdict(list)
    for fill in fills:
        by_file[stored[fill.part.stored].path].append(fill)
    with together("load", what):
        # Tied tensors are compared when all are filled.
        for compare in (False, True):
            for path, wanted in by_file.items():
                with open_tensors(path) as file:
                    for fill in wanted:
                        if fill.compare == compare:
                            _read(file, fill, holder.held(fill.tensor))


def stored_tensors(folder: Path) -> dict[str, Located]:
    """All tensors of a folder by name, from the files' headers. Raises FormatError."""
    tensors: dict[str, Located] = {}
    expected: dict[str, str] = {}
    if (folder / SINGLE).exists():
        files = [SINGLE]
    elif (folder / INDEX).exists():
        expected = _weight_map(folder / INDEX)
        files = sorted(set(expected.values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise FormatError(_without_weights(folder))
    for file_name in files:
        path = Path(os.path.realpath(folder / file_name))
        with open_tensors(path) as file:
            for name, entry in file.entries.items():
                if name in tensors:
                    raise FormatError(f"{folder / file_name}: {name} is stored in {tensors[name].path.name} as well")
                tensors[name] = Located(path, entry)
    for name, file_name in expected.items():
        if name not in tensors or tensors[name].path != Path(os.path.realpath(folder / file_name)):
            raise FormatError(f"{folder / INDEX}: {name} is not in {file_name}")
    return tensors


def match(
    model: nn.Module,
    stored: Mapping[str, Located],
    naming: Naming,
    unused: Sequence[str],
    holder: Holder = STOCK,
) -> list[Fill]:
    """What to read into which tensor of the model. Raises FormatError unless every tensor of the model gets all its
    elements, and every stored one has a place or matches one of `unused`."""
    parts = naming(model, {name: located.entry.shape for name, located in stored.items()})
    tensors: dict[str, Tensor] = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
    }
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    missing, shapes, kinds, fills = [], [], [], []
    for tied in names.values():
        found = [name for name in tied if name in parts]
        missing += [] if found else [tied[0]]
        for number, name in enumerate(found):
            tensor = tensors[name]
            shapes += _misshapen(name, holder.held(tensor).shape, parts[name], stored)
            kinds += _of_another_kind(name, tensor, parts[name], stored)
            fills += [Fill(name, tensor, part, compare=number > 0) for part in parts[name]]
    left = [part.stored for name in parts.keys() - tensors.keys() for part in parts[name]]
    left = sorted(name for name in left if not any(re.search(pattern, name) for pattern in unused))
    problems = [
        _several("needed by the model and not stored", missing, [_near(name, left) for name in missing[:_SHOWN]]),
        _several("stored, without a place in the model (--unused REGEX leaves them out)", left, left),
        _several("of another shape", shapes, shapes),
        _several("of another kind", kinds, kinds),
    ]
    if any(problems):
        raise FormatError(f"they do not fit {original_class(model).__name__}\n" + "\n".join(filter(None, problems)))
    return fills


def _read(file: TensorFile, fill: Fill, held: Held) -> None:
    """Copy this process's share of a part, or compare with it."""
    entry = file.entries[fill.part.stored]
    for box, memory in held.parts:
        common = box.overlap(fill.part.box)
        if common is None:
            continue
        for source in slabs(fill.part.to_stored(common), entry.shape, entry.dtype):
            values = file.part(fill.part.stored, tuple(map(slice, source.start, source.stop)))
            slot = memory[fill.part.to_model(source).within(box)]
            values = values.reshape(slot.shape)
            if not fill.compare:
                slot.copy_(values)
            elif not torch.equal(slot, values.to(slot)):
                raise FormatError(
                    f"{fill.name} is tied to another tensor of the model, but stored with other values: "
                    "write tie_word_embeddings: false in the configuration, if that is what ties them"
                )


def slabs(box: Box, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Box]:
    """The box of a tensor of this shape in stretches, in row-major order, that take at most READ_BYTES each to read."""
    if not shape:
        yield box
        return
    dim = first_wide(box.shape)
    row_bytes = prod(shape[dim + 1 :]) * dtype.itemsize
    rows = max(1, READ_BYTES // max(1, row_bytes))
    for start in range(box.start[dim], box.stop[dim], rows):
        stop = min(start + rows, box.stop[dim])
        slab = Box((*box.start[:dim], start, *box.start[dim + 1 :]), (*box.stop[:dim], stop, *box.stop[dim + 1 :]))
        if row_bytes > READ_BYTES:
            yield from slabs(slab, shape, dtype)
        else:
            yield slab


def _weight_map(path: Path) -> dict[str, str]:
    with open_regular(Path(os.path.realpath(path))) as file:
        text = file.read(MAX_INDEX_BYTES + 1)
    if len(text) > MAX_INDEX_BYTES:
        raise FormatError(f"{path}: larger than any index")
    fields = strict_json(text, str(path))
    found = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(found, dict) or not found:
        raise FormatError(f"{path}: has no weight_map")
    for name, file_name in found.items():
        if not isinstance(file_name, str) or not _FILE.fullmatch(file_name):
            raise FormatError(f"{path}: {name[:200]} is in {str(file_name)[:80]!r}, which is no file of this folder")
    return found


def _without_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if not pickles:
        return f"{folder} holds no {SINGLE} and no {INDEX}"
    return (
        f"{folder} holds {pickles[0]}, a pickle, which could run any code: convert it where you trust it, with "
        "from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of the model's class in transformers"
    )


def _misshapen(name: str, shape: tuple[int, ...], parts: Sequence[Part], stored: Mapping[str, Located]) -> list[str]:
    try:
        check_cover(name, shape, [part.box for part in parts])
    except FormatError:
        shapes = sorted({stored[part.stored].entry.shape for part in parts})
        count = f"{len(parts)} x " if len(parts) > 1 else ""
        return [f"{name} ({count}{' and '.join(map(str, shapes))} instead of {shape})"]
    return []


def _of_another_kind(name: str, tensor: Tensor, parts: Sequence[Part], stored: Mapping[str, Located]) -> list[str]:
    """Floating-point numbers become others; all else must be what it is."""
    for part in parts:
        dtype = stored[part.stored].entry.dtype
        if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.dtype.is_floating_point):
            return [f"{name} ({dtype} instead of {tensor.dtype})"]
    return []


def _near(name: str, others: Sequence[str]) -> str:
    near = get_close_matches(name, others, n=1)
    return f"{name} (stored: {near[0]}?)" if near else name


def _several(what: str, names: Sequence[str], shown: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {len(names)} {what}: {', '.join(shown[:_SHOWN])}{more}"
