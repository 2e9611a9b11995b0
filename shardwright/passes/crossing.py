"""Gradients that pass a block by.

[Note: crossing gradients]
A tensor that is made before a block and used after it (a skip connection of a U-Net, an encoder's output that every
decoder layer reads, the conditioning of a diffusion transformer) has a gradient as soon as the backward of its last use
is done, and keeps it until the backward of what made it. So while the blocks between the two run backward, that
gradient is alive beside their own. Its size is the tensor's; but what was concatenated gets views of the gradient of
the whole (`CatBackward0` narrows it), which stays alive as long as one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardwright.passes.operators import tensors_in
from shardwright.passes.storages import Storages
from shardwright.passes.untyped import DispatchMode

_JOINING = ("aten::cat", "aten::stack")


class Uses(DispatchMode):
    """When storages outside the blocks are made and last used. Time is counted in calls of blocks: `2 k + 1` is call
    number k, and `2 k` what runs before it. Entered after the recorder, so that new storages have their numbers."""

    def __init__(self, storages: Storages, is_paused: Callable[[], bool]) -> None:
        super().__init__()
        self._storages = storages
        self._is_paused = is_paused
        self._made: dict[int, int] = {}
        self._used: dict[int, int] = {}
        self._gradient: dict[int, int] = {}
        """Storage that the gradient of a storage is as large as, from its last use."""
        self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_paused():
            inputs = [*tensors_in(args), *tensors_in(tuple((kwargs or {}).values()))]
            self._use(inputs, self._now)
            self._make(list(tensors_in(result)), self._now)
            if func._schema.name in _JOINING:
                self._join(inputs, result)
        return result

    def call(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """A block was called with these tensors, and returned those."""
        self._use(inputs, self._now + 1)
        taken = {self._storages.number(tensor) for tensor in inputs}
        for number in map(self._storages.number, outputs):
            if number is not None and number not in taken:
                self._made[number] = self._now + 1
        self._now += 2

    def _make(self, tensors: Sequence[torch.Tensor], time: int) -> None:
        for tensor in tensors:
            number = self._storages.number(tensor)
            if number is not None:
                self._made.setdefault(number, time)

    def _join(self, parts: Sequence[torch.Tensor], whole: torch.Tensor) -> None:
        number = self._storages.number(whole)
        for part in map(self._storages.number, parts):
            if part is not None and number is not None:
                self._gradient[part] = number

    def _use(self, tensors: Sequence[torch.Tensor], time: int) -> None:
        for tensor in tensors:
            number = self._storages.number(tensor)
            if number is not None and tensor.requires_grad:
                self._used[number] = time
                self._gradient[number] = number

    def next_call(self) -> dict[int, int]:
        """Of each storage, the number of the first call after it was made."""
        return {number: (time + 1) // 2 for number, time in self._made.items()}

    def crossing(self) -> list[int]:
        """For each call, the bytes of the gradients that pass it by ([Note: crossing gradients])."""
        found = []
        for time in range(1, self._now, 2):
            passing = {self._gradient[n] for n, used in self._used.items() if self._made[n] < time < used}
            found.append(sum(self._storages.size[number] for number in passing))
        return found
