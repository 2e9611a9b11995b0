"""The strict reader and writer of safetensors files, against the safetensors library and against forgeries."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shardwright.backends.pytorch.runtime import weights
from shardwright.backends.pytorch.runtime.pieces import Box
from shardwright.backends.pytorch.runtime.tensorfile import (
    DTYPES,
    FormatError,
    checked_shape,
    open_tensors,
    write_tensors,
)

TENSORS = {
    f"a.{name}": (torch.arange(6).reshape(2, 3) % 2).to(dtype) for name, dtype in sorted(DTYPES.items(), reverse=True)
} | {
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "odd": torch.arange(3, dtype=torch.int8),
    "strided": torch.arange(12.0).reshape(3, 4).t(),
}


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "x.safetensors", {"made": "elsewhere"})
    with open_tensors(tmp_path / "x.safetensors") as file:
        assert file.entries.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            rows = tensor.shape[0] if tensor.ndim else 1
            assert torch.equal(file.rows(name, 0, rows), tensor)
        assert torch.equal(file.rows("strided", 1, 3), TENSORS["strided"][1:3])
        assert file.rows("strided", 2, 2).shape == (0, 3)


@given(shape=st.lists(st.integers(1, 4), max_size=4), data=st.data())
def test_a_part_is_what_slicing_gives(
    shape: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever box, read at once or in stretches; nothing before or behind its rows is read."""
    path = tmp_path_factory.getbasetemp() / "parts"
    path.unlink(missing_ok=True)
    tensor = torch.arange(prod(shape), dtype=torch.int16).reshape(shape)
    write_tensors(path, {"before": torch.ones(3), "t": tensor, "behind": torch.ones(2, dtype=torch.int8)})
    spans = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    box = Box(tuple(start for start, _ in spans), tuple(stop for _, stop in spans))
    where = tuple(slice(start, stop) for start, stop in spans)
    with open_tensors(path) as file, pytest.MonkeyPatch.context() as patch:
        assert torch.equal(file.part("t", where), tensor[where])
        patch.setattr(weights, "READ_BYTES", data.draw(st.integers(2, 40)))
        rows, copy = file.rows, torch.full(box.shape, -1, dtype=torch.int16)

        def limited(*arguments: Any) -> torch.Tensor:
            values = rows(*arguments)
            assert values.nbytes <= weights.READ_BYTES
            return values

        patch.setattr(file, "rows", limited)
        for slab in weights.slabs(box, tuple(shape), torch.int16):
            copy[slab.within(box)] = file.part("t", tuple(map(slice, slab.start, slab.stop)))
        assert torch.equal(copy, tensor[where])


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", TENSORS)
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", TENSORS)


def test_dtypes_without_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="complex64"):
        write_tensors(tmp_path / "x", {"c": torch.zeros(1, dtype=torch.complex64)})


def forge(path: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


FORGERIES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: path.write_bytes(b""),
    "less than a length": lambda path: path.write_bytes(b"123"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=0) * 10),
    "a header longer than the file": lambda path: forge(path, entry(), length=10**6),
    "a header of 2**63 bytes": lambda path: forge(path, entry(), length=2**63),
    "no JSON": lambda path: forge(path, b"{'t': 1}"),
    "no UTF-8": lambda path: forge(path, b'{"\xff": {}}'),
    "deep nesting": lambda path: forge(path, b"[" * 100_000 + b"]" * 100_000),
    "not an object": lambda path: forge(path, [1]),
    "a number that is none": lambda path: forge(path, b'{"t":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "one name twice": lambda path: forge(path, b'{"t":%b,"t":%b}' % ((json.dumps(entry()["t"]).encode(),) * 2)),
    "a field too many": lambda path: forge(path, entry(code="import os")),
    "a field too few": lambda path: forge(path, {"t": {"dtype": "F32", "shape": [2]}}),
    "an unknown dtype": lambda path: forge(path, entry(dtype="OBJECT")),
    "a dtype that is no text": lambda path: forge(path, entry(dtype=["F32"])),
    "a negative size": lambda path: forge(path, entry(shape=[-2])),
    "a size that is no number": lambda path: forge(path, entry(shape=[2.0])),
    "a size that is a boolean": lambda path: forge(path, entry(shape=[True, 2])),
    "a huge size": lambda path: forge(path, entry(shape=[2**40, 2**40])),
    "too many dims": lambda path: forge(path, entry(shape=[1] * 17)),
    "more elements than bytes": lambda path: forge(path, entry(shape=[3])),
    "offsets beyond the file": lambda path: forge(path, entry(data_offsets=[8, 16])),
    "offsets turned round": lambda path: forge(path, entry(data_offsets=[8, 0])),
    "negative offsets": lambda path: forge(path, entry(data_offsets=[-8, 0])),
    "three offsets": lambda path: forge(path, entry(data_offsets=[0, 4, 8])),
    "a hole": lambda path: forge(path, entry(data_offsets=[8, 16]), b"\0" * 16),
    "an overlap": lambda path: forge(path, entry() | {"u": entry(data_offsets=[4, 12])["t"]}, b"\0" * 12),
    "bytes that nobody claims": lambda path: forge(path, entry(), b"\0" * 9),
    "a truncated file": lambda path: forge(path, entry(), b"\0" * 7),
    "a link": lambda path: (forge(path.with_name("y"), entry()), path.symlink_to("y"))[0],
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "absence": lambda path: None,
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files_are_refused(tmp_path: Path, name: str) -> None:
    FORGERIES[name](tmp_path / "x")
    with pytest.raises(FormatError), open_tensors(tmp_path / "x"):
        pass


def test_a_file_cut_after_its_header_was_checked_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, {"t": torch.zeros(4096)})
    with open_tensors(path) as file:
        os.truncate(path, 4096)
        with pytest.raises(FormatError, match="ends too early"):
            file.rows("t", 0, 4096)


@settings(max_examples=200)
@given(data=st.data())
def test_no_damaged_header_does_harm(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any bytes changed anywhere: the file is refused, or read within its bounds."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.unlink(missing_ok=True)
    write_tensors(path, {"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.int16)})
    raw = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[position] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        with open_tensors(path) as file:
            for name, found in file.entries.items():
                file.rows(name, 0, found.shape[0] if found.shape else 1)
    except FormatError:
        pass


@pytest.mark.parametrize("value", [None, "12", {"0": 1}, [[1]], [None], [-1], [1] * 17, [2**31, 2**31, 2]])
def test_what_is_no_shape_is_refused(value: Any) -> None:
    with pytest.raises(FormatError):
        checked_shape(value, "it")


def test_a_shape_with_a_zero_in_it_hides_no_overflow() -> None:
    with pytest.raises(FormatError, match="too large"):
        checked_shape([0, 2**40, 2**40], "it")
