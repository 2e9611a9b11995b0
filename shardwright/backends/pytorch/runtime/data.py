"""Batches as a pure function of (seed, step, index): nothing to save, nothing to restore, the same on any world size.

[Note: which sample]
Sample `index` of step `step` has the position `step * global_batch + index` in an endless sequence. Every
`len(samples)` positions make an epoch, in which each sample comes exactly once, in an order that the seed and the
epoch decide. Rank `rank` of `world_size` takes, as row `row` of its micro-batch `micro`, the index
`(micro * world_size + rank) * micro_batch + row`.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from glob import escape, glob
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .session import seed_for

Batch = dict[str, Tensor]

IGNORED = -100
"""The target that is not learnt, as in `torch.nn.functional.cross_entropy`."""

TOKEN_DTYPES = {".u8": torch.uint8, ".u16": torch.uint16, ".u32": torch.uint32}
_FEISTEL_ROUNDS = 6


class DataError(Exception):
    """The data is missing, too short or does not fit together."""


class Samples(Protocol):
    """An indexable dataset; each sample is a dictionary of tensors of the same shapes."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """Sample `index`."""


class Batches:
    """The micro-batches of one rank ([Note: which sample]); `shuffle=False` takes the samples in their own order."""

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        if len(samples) == 0:
            raise DataError("the dataset is empty")
        self.samples = samples
        self.seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle

    def __call__(self, step: int, micro: int = 0) -> Batch:
        """Micro-batch `micro` of step `step`: each field stacked to (micro_batch, ...)."""
        first = step * self.global_batch + (micro * self.world_size + self.rank) * self.micro_batch
        rows = [self.samples[self._sample(position)] for position in range(first, first + self.micro_batch)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def per_pass(self) -> int:
        """Global batches that each sample once fills; 1 where there are fewer samples than a global batch has."""
        return max(1, len(self.samples) // self.global_batch)

    def _sample(self, position: int) -> int:
        epoch, index = divmod(position, len(self.samples))
        return permute(index, len(self.samples), seed_for(self.seed, "order", epoch)) if self.shuffle else index


def permute(index: int, size: int, key: int) -> int:
    """The place of `index` in the permutation of range(size) that `key` selects, without storing the permutation.

    A balanced Feistel network over the smallest even number of bits that holds `size`, walked until it lands inside
    (cycle-walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, https://eprint.iacr.org/2001/012,
    section 3); less than four walks on average. It shuffles; it is not meant to keep secrets.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right + key + number * 0x9E3779B97F4A7C15) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    value &= 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def learnt_targets(batches: Iterable[Batch]) -> int:
    """Targets that the loss counts: those that are not -100; without targets, the samples."""
    return sum(
        int((batch["targets"] != IGNORED).sum()) if "targets" in batch else len(next(iter(batch.values())))
        for batch in batches
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class TokenWindows:
    """Windows of `sequence_length` tokens, next to each other, in memory-mapped files; none crosses from file to file.

    A sample holds `input_ids` and `targets` (the following token each), both (sequence_length,) int64. Every token of
    a file but its first is the target of one window at most; what is left at a file's end is not used.
    """

    def __init__(
        self, files: Sequence[tuple[Path, torch.dtype]], sequence_length: int, masks: Sequence[Path] = ()
    ) -> None:
        if masks and len(masks) != len(files):
            raise DataError(f"{len(files)} data files but {len(masks)} mask files; each data file needs one")
        self.sequence_length = sequence_length
        self._files = [_Mapped(path, dtype) for path, dtype in files]
        self._masks = [_Mapped(path, torch.uint8) for path in masks]
        for file, mask in zip(self._files, self._masks, strict=False):
            if len(file) != len(mask):
                raise DataError(f"{mask.path} has {len(mask)} bytes for the {len(file)} tokens of {file.path}")
        self._ends = list(accumulate(max(0, len(file) - 1) // sequence_length for file in self._files))
        if self._ends[-1] == 0:
            longest = max(self._files, key=len)
            raise DataError(
                f"no file is long enough: one sample takes {sequence_length + 1} tokens, "
                f"the longest file, {longest.path}, has {len(longest)}"
            )

    def __len__(self) -> int:
        """Number of windows of all files."""
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> Batch:
        """Window `index`; a target whose mask byte is 0 becomes -100."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        first = (index - (self._ends[number - 1] if number else 0)) * self.sequence_length
        tokens = self._files[number].read(first, first + self.sequence_length + 1)
        targets = tokens[1:]
        if self._masks:
            learnt = self._masks[number].read(first + 1, first + self.sequence_length + 1)
            targets = targets.masked_fill(learnt == 0, IGNORED)
        return {"input_ids": tokens[:-1], "targets": targets}


class _Mapped:
    """A file of little-endian integers of one type, mapped into memory for reading."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path = path
        self.dtype = dtype
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise DataError(f"{path} has {size} bytes, which is no whole number of {dtype.itemsize}-byte tokens")
        self._length = size // dtype.itemsize
        with path.open("rb") as file:
            # An empty file cannot be mapped, and is never read from.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) as int64."""
        assert self._map is not None
        raw = bytearray(self._map[start * self.dtype.itemsize : stop * self.dtype.itemsize])
        return torch.frombuffer(raw, dtype=self.dtype).to(torch.int64)


def byte_files(root: Path, patterns: Sequence[str], sequence_length: int, masks: Sequence[str] = ()) -> TokenWindows:
    """Files read as they are, token ids 0 to 255. Patterns are relative to `root`.

    Raises DataError when nothing matches, when no file holds one sample, when masks do not fit.
    """
    files = [(path, torch.uint8) for path in matching(root, patterns)]
    return TokenWindows(files, sequence_length, matching(root, masks))


def token_files(root: Path, patterns: Sequence[str], sequence_length: int, masks: Sequence[str] = ()) -> TokenWindows:
    """Files of little-endian token ids, their width in the name: `.u8`, `.u16`, `.u32`. Else as `byte_files`."""
    paths = matching(root, patterns)
    for path in paths:
        if path.suffix not in TOKEN_DTYPES:
            raise DataError(f"{path}: a token file ends in {', '.join(TOKEN_DTYPES)}")
    return TokenWindows([(path, TOKEN_DTYPES[path.suffix]) for path in paths], sequence_length, matching(root, masks))


def matching(root: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that each path or pattern names, sorted by name within a pattern, in the order of the patterns."""
    found: list[Path] = []
    for pattern in patterns:
        literal = root / pattern
        names = [str(literal)] if literal.is_file() else glob(os.path.join(escape(str(root)), pattern), recursive=True)
        files = sorted(path for path in map(Path, names) if path.is_file())
        if not files:
            raise DataError(f"no file matches {pattern!r} in {root}; `--data DIR` says where relative paths start")
        found += files
    return found


class SyntheticTokens:
    """Uniformly random token ids, as many samples as anyone could ask for: to measure speed without data."""

    def __init__(self, vocabulary: int, sequence_length: int, seed: int) -> None:
        self.vocabulary = vocabulary
        self.sequence_length = sequence_length
        self.seed = seed

    def __len__(self) -> int:
        """Number of different samples."""
        return 2**48

    def __getitem__(self, index: int, /) -> Batch:
        """Sample `index`: `input_ids` and `targets`, both (sequence_length,) int64."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "synthetic", index))
        tokens = torch.randint(self.vocabulary, (self.sequence_length + 1,), generator=generator)
        return {"input_ids": tokens[:-1], "targets": tokens[1:]}
