from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwright.backends.pytorch.runtime.data import (
    Batch,
    Batches,
    DataError,
    SyntheticTokens,
    byte_files,
    learnt_targets,
    permute,
    token_files,
)


class Numbered:
    """Samples that say which they are."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Batch:
        return {"input_ids": torch.tensor([index])}


def taken(step: int, *, world: int, micro: int, accumulation: int, length: int = 37, seed: int = 3) -> list[int]:
    """Samples of a global batch, in the order of their global index."""
    size = world * micro * accumulation
    found: dict[int, int] = {}
    for rank in range(world):
        batches = Batches(
            Numbered(length), seed=seed, global_batch=size, micro_batch=micro, rank=rank, world_size=world
        )
        for m in range(accumulation):
            for row, value in enumerate(batches(step, m)["input_ids"].flatten().tolist()):
                found[(m * world + rank) * micro + row] = value
    assert sorted(found) == list(range(size))
    return [found[index] for index in range(size)]


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
def test_permutation_is_one(size: int, key: int) -> None:
    size = min(size, 600) if size % 7 else size
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permutations_differ_by_key_and_look_mixed() -> None:
    orders = [[permute(index, 1000, key) for index in range(1000)] for key in range(8)]
    for order in orders:
        assert sum(order[i] == i for i in range(1000)) < 12
        neighbours = sum(abs(a - b) == 1 for a, b in pairwise(order))
        assert neighbours < 15
    assert all(a != b for number, a in enumerate(orders) for b in orders[number + 1 :])
    # Every key should put sample 0 somewhere else: the mean place over many keys is the middle.
    places = [permute(0, 1000, key) for key in range(400)]
    assert 430 < sum(places) / len(places) < 570


def test_a_pass_is_the_global_batches_that_each_sample_once_fills() -> None:
    def per_pass(samples: int) -> int:
        return Batches(Numbered(samples), seed=0, global_batch=4, micro_batch=2).per_pass()

    assert [per_pass(samples) for samples in (1, 4, 7, 8, 41)] == [1, 1, 1, 2, 10]


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 12, 1), (1, 3, 4), (2, 6, 1), (4, 1, 3), (3, 2, 2)])
def test_global_batches_do_not_depend_on_the_world_size(world: int, micro: int, accumulation: int) -> None:
    for step in (0, 1, 5):
        expected = taken(step, world=1, micro=12, accumulation=1)
        assert taken(step, world=world, micro=micro, accumulation=accumulation) == expected


def test_every_sample_comes_once_an_epoch_in_another_order_each_time() -> None:
    stream = [value for step in range(37 * 3 // 3) for value in taken(step, world=1, micro=3, accumulation=1)]
    epochs = [stream[i * 37 : (i + 1) * 37] for i in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert taken(0, world=1, micro=12, accumulation=1, seed=4) != taken(0, world=1, micro=12, accumulation=1)


def test_held_out_batches_keep_the_order_of_the_samples() -> None:
    batches = Batches(Numbered(5), seed=0, global_batch=4, micro_batch=4, shuffle=False)
    assert batches(0)["input_ids"].flatten().tolist() == [0, 1, 2, 3]
    assert batches(1)["input_ids"].flatten().tolist() == [4, 0, 1, 2]


def test_windows_cover_each_file_and_cross_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(11)))
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(bytes(range(100, 104)))
    (tmp_path / "d.txt").write_bytes(bytes(range(200, 209)))
    windows = byte_files(tmp_path, ["*.txt"], 4)
    found = [(windows[i]["input_ids"].tolist(), windows[i]["targets"].tolist()) for i in range(len(windows))]
    assert found == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([4, 5, 6, 7], [5, 6, 7, 8]),
        ([200, 201, 202, 203], [201, 202, 203, 204]),
        ([204, 205, 206, 207], [205, 206, 207, 208]),
    ]
    assert windows[0]["input_ids"].dtype == torch.int64
    for index in (-1, 4):
        with pytest.raises(IndexError):
            windows[index]


@pytest.mark.parametrize(
    ("suffix", "dtype", "top"),
    [("u8", torch.uint8, 255), ("u16", torch.uint16, 65535), ("u32", torch.uint32, 2**32 - 1)],
)
def test_token_files_of_every_width(tmp_path: Path, suffix: str, dtype: torch.dtype, top: int) -> None:
    values = [0, 1, top, top - 1, 7]
    raw = b"".join(value.to_bytes(dtype.itemsize, "little") for value in values)
    (tmp_path / f"x.{suffix}").write_bytes(raw)
    sample = token_files(tmp_path, [f"x.{suffix}"], 4)[0]
    assert [*sample["input_ids"].tolist(), sample["targets"].tolist()[-1]] == values


def test_masks_say_which_targets_are_learnt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(10, 19)))
    (tmp_path / "a.mask").write_bytes(bytes([1, 0, 0, 1, 1, 0, 1, 1, 0]))
    windows = byte_files(tmp_path, ["a.txt"], 4, ["a.mask"])
    assert windows[0]["targets"].tolist() == [-100, -100, 13, 14]
    assert windows[1]["targets"].tolist() == [-100, 16, 17, -100]
    assert learnt_targets([windows[0], windows[1]]) == 4
    assert learnt_targets([{"pixels": torch.zeros(5, 3)}]) == 5


def test_patterns_and_plain_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c[1].txt", "sub/d.txt", "out of place/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 2)
    first = [
        bytes(byte_files(tmp_path, [pattern], 2)[0]["input_ids"].tolist())
        for pattern in ("*.txt", "c[1].txt", "**/d.txt", str(tmp_path / "b.txt"), "sub/../sub/*.txt", "out*/e.txt")
    ]
    assert first == [b"a.", b"c[", b"su", b"b.", b"su", b"ou"]
    weird = tmp_path / "[x]"
    weird.mkdir()
    (weird / "z.txt").write_bytes(b"zzzzz")
    assert len(byte_files(weird, ["*.txt"], 2)) == 2


def test_what_is_missing_or_does_not_fit_is_said(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_bytes(b"1234")
    (tmp_path / "odd.u16").write_bytes(b"12345")
    (tmp_path / "x.tokens").write_bytes(b"12345678")
    (tmp_path / "long.txt").write_bytes(b"123456789")
    with pytest.raises(DataError, match=r"no file matches 'nothing/\*'.*--data"):
        byte_files(tmp_path, ["nothing/*"], 4)
    with pytest.raises(DataError, match=r"takes 5 tokens.*short\.txt, has 4"):
        byte_files(tmp_path, ["short.txt"], 4)
    with pytest.raises(DataError, match="no whole number of 2-byte tokens"):
        token_files(tmp_path, ["odd.u16"], 1)
    with pytest.raises(DataError, match=r"ends in \.u8"):
        token_files(tmp_path, ["x.tokens"], 1)
    with pytest.raises(DataError, match="1 data files but 2 mask files"):
        byte_files(tmp_path, ["long.txt"], 4, ["short.txt", "short.txt"])
    with pytest.raises(DataError, match="4 bytes for the 9 tokens"):
        byte_files(tmp_path, ["long.txt"], 4, ["short.txt"])
    with pytest.raises(DataError, match="empty"):
        Batches(Numbered(0), seed=0, global_batch=1, micro_batch=1)


def test_synthetic_samples_are_a_function_of_seed_and_index() -> None:
    def sample(seed: int, index: int) -> Tensor:
        return SyntheticTokens(50, 16, seed)[index]["input_ids"]

    assert torch.equal(sample(0, 5), sample(0, 5))
    assert not torch.equal(sample(0, 5), sample(1, 5))
    assert not torch.equal(sample(0, 5), sample(0, 6))
    both = SyntheticTokens(50, 16, 0)[9]
    assert torch.equal(both["input_ids"][1:], both["targets"][:-1])
    assert int(both["input_ids"].max()) < 50
    batches = Batches(SyntheticTokens(50, 16, 0), seed=0, global_batch=4, micro_batch=4)
    assert batches(3)["input_ids"].shape == (4, 16)
    assert torch.equal(batches(3)["targets"], batches(3)["targets"])
