"""Forwards of modules with something done around them.

[Note: wrapped forwards]
A wrapper takes the place of a module's `forward` on the instance, so that what it does is inside whatever runs the
forward: recomputation, or following it without values. Wrappers may be put around others. They name their module, so a
copy of a model has wrappers of the copy's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Wrapper:
    """Calls a module's forward as it was before, `inner`; subclasses do something around it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner: Callable[..., Any] = module.forward
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        return self.inner(*args, **kwargs)


def replace_innermost(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replaces a module's own forward, inside of all wrappers."""
    wrapper = vars(module).get("forward")
    if not isinstance(wrapper, Wrapper):
        module.forward = forward
        return
    while isinstance(wrapper.inner, Wrapper):
        wrapper = wrapper.inner
    wrapper.inner = forward


def innermost(module: nn.Module) -> Callable[..., Any]:
    """A module's own forward, inside of all wrappers."""
    forward: Callable[..., Any] = module.forward
    while isinstance(forward, Wrapper):
        forward = forward.inner
    return forward


@contextmanager
def in_place_of(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    """The module's parameters of these names read as other tensors inside."""
    # What an instance has itself comes before what `nn.Module` looks up among its parameters.
    vars(module).update(tensors)
    try:
        yield
    finally:
        for name in tensors:
            del vars(module)[name]
