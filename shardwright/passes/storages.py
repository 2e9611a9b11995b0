"""The bytes that a run keeps alive.

[Note: bytes alive]
A storage counts from the operator that makes it until nobody holds it: a local variable, the autograd graph, an
attribute. That is what an allocator sees, so it covers what an operator saves for backward, what a custom autograd
function stashes, and temporaries, alike. Storages that exist before the recording starts (parameters, buffers, the
batch) never count.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable

import torch


class Storages:
    """The storages that count, numbered; [Note: bytes alive]. Moments are told by their place in time."""

    def __init__(self) -> None:
        self.time = 0
        self.live: Counter[str] = Counter()
        self.inputs_live = 0
        self.size: list[int] = []
        self.region: list[str] = []
        self.born: list[int] = []
        self.died: dict[int, int] = {}
        self._number: dict[int, int] = {}
        self._watch: list[weakref.ref[torch.UntypedStorage]] = []

    def number(self, tensor: torch.Tensor) -> int | None:
        """Number of a tensor's storage, never used twice; None if the storage does not count."""
        return self._number.get(tensor.untyped_storage()._cdata)

    def alive(self) -> list[int]:
        """Numbers of the storages that somebody holds."""
        return list(self._number.values())

    def add(self, tensor: torch.Tensor, region: str, is_input: bool, forget: Callable[[int], object]) -> int | None:
        """Number of the tensor's storage if it is new. `forget` is told the key of a storage that is gone: it may come
        back as the key of another."""
        storage = tensor.untyped_storage()
        key, size, number = storage._cdata, storage.nbytes(), len(self.size)
        if key in self._number:
            return None
        self._number[key] = number
        self.size.append(size)
        self.region.append(region)
        self.born.append(self.time)
        self.live[region] += size * (not is_input)
        self.inputs_live += size * is_input

        def gone(_: object) -> None:
            self.live[region] -= size * (not is_input)
            self.inputs_live -= size * is_input
            self.died[number] = self.time
            del self._number[key]
            forget(key)

        self._watch.append(weakref.ref(storage, gone))
        return number
