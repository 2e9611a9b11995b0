"""Drives sharded states from module hooks.

[Note: order of collectives]
All processes issue the same collectives in the same order, whatever parameters or units a batch happens to use. Units
are gathered in the order in which they were handed over, as many ahead as the gather has axes, so that each axis is
busy with another unit; a unit that this process skips is gathered and reduced with the others'. A unit is reduced when
the gradient reaches the unit before it, not when its own gradients are complete. A unit that runs more than once before
backward is gathered each time and reduced at the end of backward, as are those that the gradient does not reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .states import ShardedStates


class Hooks:
    """Hooks of the units and of the model, and what they remember from forward to backward."""

    def __init__(self, states: ShardedStates, *, reshard_after_forward: bool) -> None:
        self.states, self.reshard = states, reshard_after_forward
        self._root = 0
        self._at = -1
        """The unit that forward has reached."""
        self._seen: set[int] = set()
        """Units that ran in a forward whose backward is to come."""
        self._repeated: set[int] = set()
        """Those of them that ran again, or in another order: they are reduced at the end."""
        self._lowest: int | None = None
        """The first unit that backward will reach."""
        self._running = 0
        """The unit whose backward runs."""
        self._in_backward, self._last = False, True

    def attach(self, module: nn.Module, unit: int, *, root: bool) -> None:
        """Hooks for a unit; units come in order of execution, the model itself (`root`) last."""
        if root:
            self._root = unit
            module.register_forward_pre_hook(lambda _, a, k: self._before_model(a, k), with_kwargs=True)
            module.register_forward_hook(lambda *_: self._after_model())
        else:
            module.register_forward_pre_hook(lambda _, a, k: self._before_unit(unit, a, k), with_kwargs=True)
            module.register_forward_hook(lambda _, __, output: self._after_unit(unit, output))

    def _before_model(self, args: Any, kwargs: Any) -> Any:
        if not self._in_backward:
            self._at = -1
            ahead = max(self.states.levels.parameters, 1)
            start = [self._root, *range(min(ahead, self._root))]
            for turn in range(ahead):
                for unit in start[: turn + 2]:
                    self.states.gather(unit)
            self.states.wait(self._root)
        return self._cast((args, kwargs))

    def _after_model(self) -> None:
        if not self._in_backward:
            self._skip_to(self._root)
            if not torch.is_grad_enabled():
                self.states.release(self._root)

    def _before_unit(self, unit: int, args: Any, kwargs: Any) -> Any:
        if self._in_backward:  # it is recomputed
            self.states.wait(unit, again=True)
        else:
            if torch.is_grad_enabled():
                self._repeated.update(range(unit, self._at + 1))
            self._skip_to(unit)
            self._enter(unit)
        return self._cast((args, kwargs))

    def _enter(self, unit: int) -> None:
        self._at = max(unit, self._at)
        if torch.is_grad_enabled():
            if unit in self._seen:
                self._repeated.add(unit)
            self._seen.add(unit)
        self.states.wait(unit)
        for ahead in range(unit + 1, min(unit + 1 + max(self.states.levels.parameters, 1), self._root)):
            self.states.gather(ahead)
        # The last reductions of the micro-batch before end here, not in its backward: their buffers are the largest.
        self.states.advance()

    def _skip_to(self, unit: int) -> None:
        """Units that this process does not use are gathered as where they are used."""
        for skipped in range(self._at + 1, unit):
            self._enter(skipped)
            if torch.is_grad_enabled() and any(bucket.trainable for bucket in self.states.units[skipped]):
                self._reaches(skipped)
            self._leave(skipped)

    def _after_unit(self, unit: int, output: Any) -> None:
        if self._in_backward:
            return
        found = False
        for value in tensors_of(output):
            found = True
            if value.requires_grad:
                value.register_hook(lambda _: self._before_backward(unit))  # type: ignore[no-untyped-call]
                self._reaches(unit)
        if not found:
            raise TypeError(f"unit {unit} returns a {type(output).__name__} in which no tensors are found")
        self._leave(unit)

    def _leave(self, unit: int) -> None:
        if self.reshard or not torch.is_grad_enabled():
            self.states.release(unit, secondary=torch.is_grad_enabled())

    def _reaches(self, unit: int) -> None:
        self._lowest = unit if self._lowest is None else min(unit, self._lowest)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward, and the reductions of every unit."""
        states, self._running = self.states, self._root
        self._in_backward, self._last = True, last
        states.wait(self._root)
        self._gather_below(self._root)
        torch.autograd.backward(loss)
        self._go_back(self._end())
        self._release(self._running)
        if self._running != self._root and self._running not in self._repeated:
            states.reduce(self._running, last=last)
        self._release(self._root)
        self._repeated.update(range(self._end()))
        for unit in (*sorted(self._repeated, reverse=True), self._root):
            states.reduce(unit, last=last)
        self._in_backward, self._lowest = False, None
        self._seen.clear()
        self._repeated.clear()
        if last:
            states.finish()

    def _end(self) -> int:
        return self._root if self._lowest is None else self._lowest

    def _before_backward(self, unit: int) -> None:
        if not self._in_backward:
            raise RuntimeError("the gradient of a sharded unit is computed outside `ShardedStates.backward`")
        if unit < self._running:
            self._go_back(unit)
        elif unit > self._running:
            self._move(unit)

    def _go_back(self, unit: int) -> None:
        for reached in range(self._running - 1, unit - 1, -1):
            self._move(reached)

    def _move(self, unit: int) -> None:
        """The gradient has left one unit and reaches another."""
        before, self._running = self._running, unit
        if before != self._root:
            self._release(before)
        self.states.wait(unit, again=True)
        self._gather_below(unit)
        if before != self._root and before not in self._repeated:
            self.states.reduce(before, last=self._last)

    def _gather_below(self, unit: int) -> None:
        for ahead in range(unit - 1, max(self._end(), unit - max(self.states.levels.secondary, 1)) - 1, -1):
            self.states.gather(ahead, again=True)

    def _release(self, unit: int) -> None:
        if self.reshard or self._last:
            self.states.release(unit)

    def _cast(self, values: Any) -> Any:
        dtype = self.states.dtype
        if dtype == torch.float32:
            return values
        return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of what a module returns: of sequences, mappings, registered pytrees and dataclasses."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from tensors_of(getattr(leaf, field.name))
