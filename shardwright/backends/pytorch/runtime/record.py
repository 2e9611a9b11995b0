"""What one forward of a model did, as far as its division into stages asks for it.

[Note: segments]
A model with n blocks has n + 2 segments: 0 is what runs before the first block, k the k-th block with what runs between
the one before and it, and n + 1 what runs after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec

TENSOR_GETTERS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
"""Attributes of tensors that are tensors. The others are read without being followed."""


class Made(int):
    """The number of a value, in the place of a tensor."""


class Given(int):
    """The number of a block's argument, in the place of a tensor that the block passes on."""


class Result(NamedTuple):
    """What a call returned: its leaves, where tensors are replaced by `Made` or `Given`, and how they were put."""

    leaves: tuple[Any, ...]
    spec: TreeSpec

    def put(self, replace: Callable[[Any], Any]) -> Any:
        """The same with other leaves."""
        if self.spec.is_leaf():
            return replace(self.leaves[0])
        return self.spec.unflatten([replace(leaf) for leaf in self.leaves])

    @property
    def values(self) -> Iterator[int]:
        """Numbers of the values among the leaves."""
        return (int(leaf) for leaf in self.leaves if isinstance(leaf, Made))


class Call(NamedTuple):
    """A numbered call outside the blocks: the function's name or the module's path, and what it returned."""

    name: str
    result: Result


@dataclass(slots=True)
class Value:
    """A tensor that depends on parameters or on chance."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    storage: int
    maker: str
    """Where it was made, for messages."""
    hidden: bool
    """A closed module made it and has not returned it."""
    writes: list[int]
    """Segments that made it or changed it in place, in order."""
    uses: set[int] = field(default_factory=set)
    """Segments that read or change it."""


@dataclass(slots=True)
class Record:
    """What one forward did; by segment, of which there are `blocks` + 2."""

    blocks: int
    values: list[Value] = field(default_factory=list)
    calls: dict[int, list[Call]] = field(default_factory=dict)
    """Outside the blocks."""
    outputs: dict[int, Result] = field(default_factory=dict)
    """Of each block."""
    parameters: dict[int, set[str]] = field(default_factory=dict)
    """Names of those that a segment uses."""
    draws: set[Any] = field(default_factory=set)
    """Functions that draw random numbers without depending on parameters."""
    plain: set[Any] = field(default_factory=set)
    """Functions that return no tensors."""

    def needed(self, first: int, last: int) -> list[int]:
        """Numbers of the values that segments `first` to `last` need of those before."""
        span = range(first, last + 1)
        return [n for n, value in enumerate(self.values) if value.writes[0] < first and not value.uses.isdisjoint(span)]

    def refusal(self, first: int) -> str:
        """Why no stage can begin at a segment; empty if one can."""
        for value in self.values:
            if value.hidden and value.writes[0] < min(first, max(value.uses, default=0)):
                return f"{value.maker} makes a tensor that is used after it, and does not return it"
        carried = [self.values[number] for number in self.needed(first, self.blocks + 1)]
        for value in carried:
            views = sum(other.storage == value.storage for other in carried)
            if views > 1 and value.writes[-1] >= first:
                return f"a tensor of {value.maker} is changed in place after it, and others share its memory"
        return ""


def is_attribute(func: Any) -> bool:
    """Whether a call reads an attribute that is no tensor, such as a shape."""
    name = getattr(func, "__name__", "")
    return name == "__get__" and getattr(func.__self__, "__name__", "") not in TENSOR_GETTERS
