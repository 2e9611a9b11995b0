"""Which part of a tensor a process holds, as a box in the coordinates of the whole tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


class Box(NamedTuple):
    """A part of a tensor: for each dim, from `start` up to `stop`. A scalar's box has no dims."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the part."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements of the part."""
        return prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """What both boxes cover, or None."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Slices that pick this box from a tensor that holds `outer`."""
        return tuple(
            slice(start - origin, stop - origin)
            for start, stop, origin in zip(self.start, self.stop, outer.start, strict=True)
        )


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """The elements [start, stop) of a tensor in row-major order as boxes, in that order: 2 * dims - 1 at most.

    Each box is a stretch of memory, since only its first dim of more than one index may be cut.
    """
    if start >= stop:
        return ()
    if not shape:
        return (Box((), ()),)
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # of the whole rows
    if first > last:
        return _in_row(shape, last, start, stop)
    rows = (Box((first, *(0 for _ in shape[1:])), (last, *shape[1:])),) if first < last else ()
    return (*_in_row(shape, first - 1, start, first * row), *rows, *_in_row(shape, last, last * row, stop))


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> tuple[Box, ...]:
    origin = index * prod(shape[1:])
    inner = flat_boxes(shape[1:], start - origin, stop - origin)
    return tuple(Box((index, *box.start), (index + 1, *box.stop)) for box in inner)


def local_tensor(tensor: Tensor) -> Tensor:
    """The memory of this process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: Tensor) -> Box:
    """This process's part of a tensor that is sharded along one mesh axis at most per dim, else whole.

    `Shard(dim)` over n processes cuts as `torch.chunk` does: parts of ceil(size / n), the last ones shorter or empty.
    """
    box = whole(tensor.shape)
    if not isinstance(tensor, DTensor):
        return box
    start, stop = list(box.start), list(box.stop)
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            size, parts = tensor.shape[placement.dim], tensor.device_mesh.size(axis)
            chunk = -(-size // parts)
            start[placement.dim] = min(size, tensor.device_mesh.get_local_rank(axis) * chunk)
            stop[placement.dim] = min(size, start[placement.dim] + chunk)
        elif not isinstance(placement, Replicate):
            raise TypeError(f"a tensor placed as {placement} has no part of its own")
    return Box(tuple(start), tuple(stop))


def replica(tensor: Tensor) -> tuple[int, int]:
    """(which, of how many): the processes that hold the same part as this one, counted from 0."""
    if not isinstance(tensor, DTensor):
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    axes = [axis for axis, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
    mesh = tensor.device_mesh
    return turn((mesh.size(axis), mesh.get_local_rank(axis)) for axis in axes)


def turn(axes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(which, of how many) among the processes of some axes of a mesh, each given as (size, rank)."""
    which, count = 0, 1
    for size, rank in axes:
        which, count = which * size + rank, count * size
    return which, count
