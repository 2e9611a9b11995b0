"""Files of named tensors in the safetensors format, read strictly: a file from a stranger can be refused, never run.

The format (https://huggingface.co/docs/safetensors, "Format"): eight bytes with the length of the header,
little-endian; the header, a JSON object that maps each name to `dtype`, `shape` and `data_offsets`; the tensors' bytes,
without holes.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 16
_ALIGNMENT = 8


class FormatError(Exception):
    """A file is not what it should be; nothing of it was used."""


class Entry(NamedTuple):
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a new file and wait until the disk has it. Tensors come to the host one at a time.

    Raises FileExistsError, OSError (a full disk), FormatError for a dtype without a name.
    """
    write_pieces(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, lambda name: [tensors[name]])


def write_pieces(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """As `write_tensors`, for tensors that are never whole in memory: `pieces` gives each one's elements in their
    order, in its dtype."""
    # Wide types first: then every tensor starts at a multiple of its element size.
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        dtype, shape = layout[name]
        if dtype not in NAMES:
            raise FormatError(f"{name}: {dtype} has no place in a file of tensors")
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            dtype, shape = layout[name]
            written = 0
            for piece in pieces(name):
                assert piece.dtype == dtype
                held = piece.detach().cpu().contiguous()
                written += file.write(_bytes_of(held))
            assert written == prod(shape) * dtype.itemsize
        file.flush()
        os.fsync(file.fileno())


class TensorFile:
    """The tensors of one file, for reading; its header is checked whole before anything else is read."""

    def __init__(self, path: Path, file: BufferedReader, entries: Mapping[str, Entry] | None = None) -> None:
        self.path = path
        self._file = file
        self.entries = _entries(path, file) if entries is None else entries

    def rows(self, name: str, start: int, stop: int, at: Sequence[int] = ()) -> Tensor:
        """Rows [start, stop) of a tensor, or of what it holds at the indices `at` of its first dims, read from the disk
        now; a scalar counts as one row, shape ()."""
        entry = self.entries[name]
        shape, row = entry.shape[len(at) :], 0
        for index, size in zip((*at, start), entry.shape, strict=False):
            row = row * size + index
        tensor = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=entry.dtype)
        self._file.seek(entry.start + row * prod(shape[1:]) * entry.dtype.itemsize)
        if tensor.numel() and self._file.readinto(_bytes_of(tensor)) != tensor.numel() * entry.dtype.itemsize:
            raise FormatError(f"{self.path}: ends too early")
        return tensor

    def part(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, one slice a dim: rows of the first dim of more than one index are read, and cut."""
        if not where:
            return self.rows(name, 0, 1)
        dim = first_wide(tuple(span.stop - span.start for span in where))
        at = tuple(span.start for span in where[:dim])
        values = self.rows(name, where[dim].start, where[dim].stop, at)
        return values[(*(None for _ in at), slice(None), *where[dim + 1 :])]


def first_wide(shape: Sequence[int]) -> int:
    """The first dim of more than one index, or the last one."""
    return next((dim for dim, size in enumerate(shape) if size != 1), len(shape) - 1)


@contextmanager
def open_tensors(path: Path, entries: Mapping[str, Entry] | None = None) -> Iterator[TensorFile]:
    """Open a regular file for reading. Raises FormatError unless it is exactly in the format.

    `entries`: what a file that was opened before said of itself, so that its header is not read again.
    """
    with open_regular(path) as file:
        yield TensorFile(path, file, entries)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file; a link, a pipe or a device in its place is refused, and none is waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise FormatError(f"{path}: cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def strict_json(text: bytes, what: str) -> Any:
    """Parse JSON; NaN, infinities, repeated keys and text that is not UTF-8 are refused with a FormatError."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key comes twice")
        return found

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON ({error})") from error


def checked_shape(value: Any, what: str) -> tuple[int, ...]:
    """A shape from JSON: a list of at most 16 whole numbers, none negative, and not more elements than 2**62."""
    if (
        not isinstance(value, list)
        or len(value) > MAX_DIMS
        or not all(type(size) is int and size >= 0 for size in value)
    ):
        raise FormatError(f"{what}: {str(value)[:80]} is not a shape")
    if prod(size for size in value if size) > 2**62:
        raise FormatError(f"{what}: the shape {str(value)[:80]} is too large")
    return tuple(value)


def _entries(path: Path, file: BufferedReader) -> dict[str, Entry]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise FormatError(f"{path}: the header's length does not fit the file")
    header = strict_json(file.read(length), str(path))
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is not an object")
    header.pop("__metadata__", None)
    data_start = 8 + length
    entries = {name: _entry(f"{path}: {name[:200]}", fields, data_start) for name, fields in header.items()}
    # Each tensor begins where the one before it ends, and the last ends with the file: no hole, no overlap.
    expected = data_start
    for _, entry in sorted(entries.items(), key=lambda item: (item[1].start, prod(item[1].shape))):
        if entry.start != expected:
            raise FormatError(f"{path}: the tensors overlap or leave holes")
        expected += prod(entry.shape) * entry.dtype.itemsize
    if expected != size:
        raise FormatError(f"{path}: {size} bytes, but the header describes {expected}")
    return entries


def _entry(what: str, fields: Any, data_start: int) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{what}: expected dtype, shape and data_offsets")
    name, offsets = fields["dtype"], fields["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise FormatError(f"{what}: unknown dtype {str(name)[:80]!r}")
    shape = checked_shape(fields["shape"], what)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise FormatError(f"{what}: data_offsets are not two whole numbers")
    dtype = DTYPES[name]
    if offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise FormatError(f"{what}: {offsets[1] - offsets[0]} bytes do not hold {dtype} of shape {shape}")
    return Entry(dtype, shape, data_start + offsets[0])


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, without a copy; the tensor must outlive it."""
    size = tensor.numel() * tensor.dtype.itemsize
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr() if size else 1)).cast("B")
