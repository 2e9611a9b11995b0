"""Model states that every data-parallel process holds whole, driven by a timetable as `ShardedStates` are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Replicas:
    """Parameters that stay where they are, with gradients in `.grad`, summed over the processes of a group.

    Without a group there is one process, and nothing to sum.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.units: list[list[nn.Parameter]] = []
        self._taken: set[nn.Parameter] = set()
        self._reducing: list[tuple[dist.Work, Tensor, list[nn.Parameter]]] = []

    def take(self, parameters: Iterable[nn.Parameter]) -> int:
        """Takes over, as one unit, the parameters that no other unit has; returns its number."""
        own = [each for each in parameters if each.requires_grad and each not in self._taken]
        self._taken.update(own)
        self.units.append(own)
        return len(self.units) - 1

    def gather(self, unit: int) -> None:
        """Parameters are always whole."""

    def wait(self, unit: int) -> None:
        """Parameters are always whole."""

    def release(self, unit: int) -> None:
        """Parameters stay whole."""

    def reduce(self, unit: int, *, last: bool) -> None:
        """Starts to sum the gradients of a unit, after its last one in a step."""
        if self.group is None or not last:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self.units[unit]:
            if parameter.grad is None:  # another process may have one
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter)
        for members in by_dtype.values():
            flat = torch.cat([each.grad.flatten() for each in members if each.grad is not None])
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            assert work is not None
            for parameter in members:
                parameter.grad = None
            self._reducing.append((work, flat, members))

    def finish(self) -> None:
        """Gradients are sums over the group when this returns."""
        for work, flat, members in self._reducing:
            work.wait()
            start = 0
            for parameter in members:
                parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
        self._reducing.clear()
