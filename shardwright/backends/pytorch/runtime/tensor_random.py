"""Random numbers where several processes share every layer.

[Note: own draws]
The processes that share a layer draw the same numbers, so that whole values stay equal on all. Where each has its own
part of the values, from columns to rows, or of the sequence, it must not draw what the others do for other parts: it
draws from a seed of its own. That comes from the next number of the CPU's default generator, which recomputation puts
back, so it repeats; afterwards the default generators go on as if nothing but that number had been drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .session import seed_for
from .tensor_exchange import Group


def _cuda_state() -> Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


class _Scope:
    """Inside a region: the states of the default generators while this process draws on its own."""

    def __init__(self) -> None:
        self.saved: tuple[Tensor, Tensor | None] | None = None

    def begin(self, group: Group) -> None:
        if self.saved is None:
            number = int(torch.randint(2**62, ()))
            self.saved = (torch.get_rng_state(), _cuda_state())
            seed = seed_for("tp", number, group.rank)
            torch.default_generator.manual_seed(seed)
            if self.saved[1] is not None:
                torch.cuda.manual_seed(seed)

    def end(self) -> None:
        if self.saved is not None:
            cpu, cuda = self.saved
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)
            self.saved = None


_scopes: list[_Scope] = []
"""Of the regions that run now; process-wide, since on CUDA autograd recomputes in another thread."""


@contextmanager
def region_of_draws(*, active: bool) -> Iterator[None]:
    """Inside, `draw_own` and `draw_alike` switch; outside of it they do nothing."""
    if not active:
        yield
        return
    _scopes.append(_Scope())
    try:
        yield
    finally:
        _scopes.pop().end()


@contextmanager
def own_draws(group: Group) -> Iterator[None]:
    """This process draws on its own in all of it, where gradients are wanted: around blocks of a divided sequence."""
    if not torch.is_grad_enabled():
        yield
        return
    scope = _Scope()
    scope.begin(group)
    try:
        yield
    finally:
        scope.end()


def draw_own(group: Group) -> None:
    """In a region: from here on this process draws on its own."""
    if _scopes:
        _scopes[-1].begin(group)


def draw_alike() -> None:
    """In a region: from here on the processes draw the same again."""
    if _scopes:
        _scopes[-1].end()
