"""Which positions of a sequence each process has, and how processes hand them to each other.

[Note: zigzag]
Under causal attention a later position attends to more keys. So the sequence is cut into two chunks a process, and of
c processes number i has chunks i and 2c - 1 - i: all have equal work (arXiv 2407.21783, section 3.3.2). Otherwise each
process has one chunk. Put one after another, the own chunks are still in the order of their positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """How a dimension is divided over processes; see [Note: zigzag]."""

    size: int
    """Processes."""
    rank: int
    """This one."""
    zigzag: bool = False

    @property
    def chunks(self) -> int:
        """Into how many the whole dimension is cut."""
        return self.size * (2 if self.zigzag else 1)

    def holder(self, chunk: int) -> tuple[int, int]:
        """The process that has a chunk, and its place among the chunks of that process."""
        return (chunk, 0) if chunk < self.size else (2 * self.size - 1 - chunk, 1)

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor, a copy: it keeps no memory of the whole one."""
        length = whole.shape[dim] // self.chunks
        chunks = [self.rank, 2 * self.size - 1 - self.rank] if self.zigzag else [self.rank]
        return torch.cat([whole.narrow(dim, chunk * length, length) for chunk in chunks], dim)

    def whole(self, parts: Tensor, dim: int) -> Tensor:
        """The whole of parts (processes, ...); `dim`: of one part."""
        length = parts.shape[dim + 1] * self.size // self.chunks
        places = (self.holder(chunk) for chunk in range(self.chunks))
        return torch.cat([parts[rank].narrow(dim, place * length, length) for rank, place in places], dim)

    def put(self, parts: Tensor, dim: int, values: Tensor, first: int = 0) -> None:
        """Writes the chunks from `first` on into parts (processes, ...), which `whole` would put together."""
        length = parts.shape[dim + 1] * self.size // self.chunks
        for number, value in enumerate(torch.split(values, length, dim), first):
            rank, place = self.holder(number)
            parts[rank].narrow(dim, place * length, length).copy_(value)

    def by_rank(self, whole: Tensor, dim: int) -> Tensor:
        """The parts (processes, ...) of a tensor."""
        shape = list(whole.shape)
        shape[dim] //= self.size
        parts = whole.new_empty((self.size, *shape))
        self.put(parts, dim, whole)
        return parts


class Peers:
    """The processes along an axis of a mesh that share sequences.

    The collectives take and return parts, one of each process, stacked in the order of the processes. Of fake and meta
    tensors they return the right shapes, and tell nobody.
    """

    def __init__(self, mesh: DeviceMesh, *, zigzag: bool = False) -> None:
        self.group = mesh.get_group()
        self.positions = Positions(size=mesh.size(), rank=mesh.get_local_rank(), zigzag=zigzag)
        self.size, self.rank = self.positions.size, self.positions.rank

    def __deepcopy__(self, memo: Any) -> Peers:
        return self

    def gather(self, part: Tensor) -> Tensor:
        """All parts (processes, ...)."""
        parts = part.new_empty((self.size, *part.shape))
        if not is_fake(part):
            dist.all_gather_single(parts.view(-1), part.flatten(), group=self.group)
        return parts

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """Of all processes' parts for this one, the sum."""
        part = parts.new_empty(parts.shape[1:])
        if not is_fake(parts):
            dist.reduce_scatter_single(part.view(-1), parts.flatten(), group=self.group)
        return part

    def exchange(self, parts: Tensor) -> Tensor:
        """Of all processes their parts for this one."""
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        if not is_fake(parts):
            dist.all_to_all_single(received, parts.contiguous(), group=self.group)
        return received

    def pass_on(self, flat: Tensor) -> Arriving:
        """Begins to send a one-dimensional tensor to the next process, and to receive that of the one before."""
        buffer = torch.empty_like(flat)
        if is_fake(flat):
            return Arriving(buffer, flat, None)
        received, sent = [0] * self.size, [0] * self.size
        received[self.rank - 1] = sent[(self.rank + 1) % self.size] = flat.numel()
        work = dist.all_to_all_single(buffer, flat, received, sent, group=self.group, async_op=True)
        return Arriving(buffer, flat, work)


@dataclass(frozen=True, slots=True)
class Arriving:
    """A tensor that is being received."""

    buffer: Tensor
    sent: Tensor
    """Kept until the other process has it."""
    work: dist.Work | None

    def wait(self) -> Tensor:
        """What arrived."""
        if self.work is not None:
            self.work.wait()
        return self.buffer


def is_fake(tensor: Tensor) -> bool:
    """Whether there are only shapes."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


class TakeOwn(torch.autograd.Function):
    """Own positions of a tensor, of whose gradient each process has those of its own positions."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, peers: Peers, dim: int) -> Tensor:
        """Returns this process's part."""
        ctx.peers, ctx.dim, ctx.shape = peers, dim, whole.shape
        return peers.positions.own(whole, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Zero elsewhere: the sum over the processes is the gradient."""
        positions: Positions = ctx.peers.positions
        whole = gradient.new_zeros(ctx.shape)
        length = ctx.shape[ctx.dim] // positions.chunks
        for chunk in range(positions.chunks):
            rank, place = positions.holder(chunk)
            if rank == positions.rank:
                values = gradient.narrow(ctx.dim, place * length, length)
                whole.narrow(ctx.dim, chunk * length, length).copy_(values)
        return whole, None, None


class ScatterEqual(torch.autograd.Function):
    """Own positions of a tensor that is equal on all processes, as its gradient is to be."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, peers: Peers, dim: int) -> Tensor:
        """Returns this process's part."""
        ctx.peers, ctx.dim = peers, dim
        return peers.positions.own(whole, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """All-gathers."""
        return ctx.peers.positions.whole(ctx.peers.gather(gradient), ctx.dim), None, None


class _Gather(torch.autograd.Function):
    """The whole of all processes' parts."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, peers: Peers, dim: int) -> Tensor:
        """All-gathers."""
        ctx.peers, ctx.dim = peers, dim
        return peers.positions.whole(peers.gather(part), dim)


class GatherEqual(_Gather):
    """The whole of all processes' parts, of which all processes compute the same and have the same gradient."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Takes the own part."""
        return ctx.peers.positions.own(gradient, ctx.dim), None, None


class GatherSummed(_Gather):
    """The whole of all processes' parts, of whose gradient each process has a summand."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Reduce-scatters."""
        return ctx.peers.reduce_scatter(ctx.peers.positions.by_rank(gradient, ctx.dim)), None, None
