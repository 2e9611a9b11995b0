"""The index of a checkpoint: which file holds which part of which tensor. Read as a stranger's file would be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .pieces import Box
from .tensorfile import DTYPES, NAMES, FormatError, checked_shape, open_regular, strict_json

FORMAT = "shardwright-checkpoint"
VERSION = 1
INDEX = "index.json"
MAX_INDEX_BYTES = 1_000_000_000

_FILE = re.compile(r"rank_\d{5,}\.safetensors")
_NAME = re.compile(r"(model|buffer|optimizer\.[^.]+)\..+", re.DOTALL)
_KEY = re.compile(r"(?P<name>.+)\[(?P<box>(\d+:\d+(,\d+:\d+)*)?)\]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where training stands."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Targets learnt so far, all processes together."""
    seed: int


class Piece(NamedTuple):
    """A box of a tensor, and the file that holds it."""

    file: str
    box: Box


class Stored(NamedTuple):
    """A whole tensor of the checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Everything that a checkpoint says of itself."""

    train: TrainState
    optimizer: str
    """Class of the optimizer whose states are stored."""
    tensors: Mapping[str, Stored]
    """`model.<parameter>`, `buffer.<buffer>`, `optimizer.<state>.<parameter>`."""


def file_of(rank: int) -> str:
    """The file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def key_of(name: str, box: Box) -> str:
    """The name of a piece inside its file: `model.head.weight[0:16,0:32]`."""
    spans = ",".join(f"{start}:{stop}" for start, stop in zip(box.start, box.stop, strict=True))
    return f"{name}[{spans}]"


def parse_key(key: str) -> tuple[str, Box]:
    """The inverse of `key_of`. Raises FormatError."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise FormatError(f"{key[:200]!r} does not name a piece of a tensor")
    spans = [tuple(map(int, span.split(":"))) for span in match["box"].split(",")] if match["box"] else []
    return match["name"], Box(tuple(span[0] for span in spans), tuple(span[1] for span in spans))


def index_to_json(index: Index) -> str:
    """The text of `index.json`."""
    tensors = {
        name: {
            "dtype": NAMES[stored.dtype],
            "shape": stored.shape,
            "pieces": [{"file": file, "start": box.start, "stop": box.stop} for file, box in stored.pieces],
        }
        for name, stored in index.tensors.items()
    }
    head = {"format": FORMAT, "version": VERSION, "train": asdict(index.train), "optimizer": index.optimizer}
    return json.dumps(head | {"tensors": tensors}, separators=(",", ":"), allow_nan=False)


def read_index(folder: Path) -> Index:
    """Read and check the index of a checkpoint's folder. Raises FormatError for anything that is not exactly right."""
    path = folder / INDEX
    with open_regular(path) as file:
        text = file.read(MAX_INDEX_BYTES + 1)
    if len(text) > MAX_INDEX_BYTES:
        raise FormatError(f"{path}: larger than any index")
    fields = _object(strict_json(text, str(path)), {"format", "version", "train", "optimizer", "tensors"}, str(path))
    if fields["format"] != FORMAT or fields["version"] != VERSION:
        raise FormatError(f"{path}: not a checkpoint of version {VERSION}")
    train = _object(fields["train"], {"step", "tokens", "seed"}, f"{path}: train")
    if not all(type(value) is int and value >= 0 for value in train.values()):
        raise FormatError(f"{path}: train holds something else than whole numbers")
    if not isinstance(fields["optimizer"], str) or not isinstance(fields["tensors"], dict):
        raise FormatError(f"{path}: optimizer or tensors have the wrong type")
    tensors = {name: _stored(name, value, f"{path}: {name[:200]}") for name, value in fields["tensors"].items()}
    return Index(TrainState(**train), fields["optimizer"], tensors)


def check_cover(what: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raises FormatError unless the boxes lie inside the shape, are disjoint and cover it."""
    inside = all(
        len(box.start) == len(shape)
        and all(0 <= a <= b <= n for a, b, n in zip(box.start, box.stop, shape, strict=True))
        for box in boxes
    )
    if not inside:
        raise FormatError(f"{what}: a piece lies outside the tensor")
    ordered = sorted(boxes)
    for number, box in enumerate(ordered):
        last = tuple(stop - 1 for stop in box.stop)
        for other in ordered[number + 1 :]:
            # In row-major order, all elements of the others come after this box.
            if other.start > last:
                break
            if box.overlap(other):
                raise FormatError(f"{what}: two pieces overlap")
    if sum(box.numel for box in boxes) != prod(shape):
        raise FormatError(f"{what}: the pieces do not cover the tensor")


def _stored(name: str, value: Any, what: str) -> Stored:
    fields = _object(value, {"dtype", "shape", "pieces"}, what)
    if not _NAME.fullmatch(name):
        raise FormatError(f"{what}: not the name of a parameter, buffer or optimizer state")
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        raise FormatError(f"{what}: unknown dtype {str(fields['dtype'])[:80]!r}")
    if not isinstance(fields["pieces"], list):
        raise FormatError(f"{what}: pieces are not a list")
    shape = checked_shape(fields["shape"], what)
    pieces = tuple(_piece(piece, what) for piece in fields["pieces"])
    check_cover(what, shape, [piece.box for piece in pieces])
    return Stored(DTYPES[fields["dtype"]], shape, pieces)


def _piece(value: Any, what: str) -> Piece:
    fields = _object(value, {"file", "start", "stop"}, what)
    if not isinstance(fields["file"], str) or not _FILE.fullmatch(fields["file"]):
        raise FormatError(f"{what}: {str(fields['file'])[:80]!r} is not a file of a checkpoint")
    start, stop = checked_shape(fields["start"], what), checked_shape(fields["stop"], what)
    if len(start) != len(stop):
        raise FormatError(f"{what}: start and stop of a piece differ in length")
    return Piece(fields["file"], Box(start, stop))


def _object(value: Any, keys: set[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != keys:
        raise FormatError(f"{what}: expected exactly {', '.join(sorted(keys))}")
    return value
