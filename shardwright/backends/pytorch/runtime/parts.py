"""Which stretch of which stored tensor belongs where in a tensor of the model.

[Note: stored names]
A folder of weights may hold a model under other names, and cut up otherwise, than the model itself does: an expert a
tensor where the model has all of a layer's experts in one, for example. A `Naming` says so, for a model and the shapes
of what is stored: for each name in the model, the `Part`s that make it up. What it cannot place it gives under the
stored name. `own_names` is the naming of a folder that holds the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .pieces import Box, whole

Shape = tuple[int, ...]


class Part(NamedTuple):
    """A box of a stored tensor, and the box of the model's tensor that it fills."""

    stored: str
    """Name of the stored tensor."""
    box: Box
    """In the model's tensor."""
    origin: tuple[int, ...]
    """Where the box begins in the stored tensor."""
    stacked: bool = False
    """Whether the stored tensor is one of several that the model stacks, and so lacks its first dim."""

    def to_stored(self, box: Box) -> Box:
        """The same elements in coordinates of the stored tensor; `box` lies within the part's own."""
        start = tuple(at - begin + origin for at, begin, origin in self._dims(box.start))
        stop = tuple(at - begin + origin for at, begin, origin in self._dims(box.stop))
        return Box(start, stop)

    def to_model(self, box: Box) -> Box:
        """The inverse of `to_stored`."""
        begin = self.box.start[self.stacked :]
        first = ((self.box.start[0],), (self.box.stop[0],)) if self.stacked else ((), ())
        start = tuple(at - origin + first for at, origin, first in zip(box.start, self.origin, begin, strict=True))
        stop = tuple(at - origin + first for at, origin, first in zip(box.stop, self.origin, begin, strict=True))
        return Box(first[0] + start, first[1] + stop)

    def _dims(self, position: tuple[int, ...]) -> zip[tuple[int, int, int]]:
        return zip(position[self.stacked :], self.box.start[self.stacked :], self.origin, strict=True)


Naming = Callable[[nn.Module, Mapping[str, Shape]], dict[str, list[Part]]]
"""See [Note: stored names]."""


def original_class(model: nn.Module) -> type:
    """The class that a model had before `fully_shard` gave it another."""
    return next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))


def as_it_is(name: str, shape: Shape) -> Part:
    """The part of a tensor that is stored as the model has it."""
    return Part(name, whole(shape), (0,) * len(shape))


def own_names(model: nn.Module, stored: Mapping[str, Shape]) -> dict[str, list[Part]]:
    """Every tensor goes by the name that it has in the model's `state_dict`."""
    return {name: [as_it_is(name, shape)] for name, shape in stored.items()}
