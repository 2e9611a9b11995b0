"""What the stages of a pipeline hand each other, in one process or from one to another."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Message = tuple[str, int, int, int]
"""Activations (F) or their gradients (I), from a stage, to a stage, of a micro-batch; see `Wire`."""
IN_FLIGHT = 4
"""Sent messages that are not waited for. Waiting for older ones bounds what they hold, also where the host runs ahead
of a GPU; it cannot deadlock, for their receives come before whatever follows here."""


class Wire(NamedTuple):
    """A tensor that one stage sends to another for each micro-batch; the gradient that comes back is alike.

    All that goes from one stage to another is one message, whose tensors are sent one after another in one step. Those
    of whole numbers or truth values have no gradient; where no tensor has one, the message that comes back is empty.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient comes back."""
        return self.dtype.is_floating_point or self.dtype.is_complex


class _Arriving(NamedTuple):
    """A message that is being received."""

    buffers: tuple[Tensor, ...]
    works: tuple[dist.Work, ...]


class Messages:
    """Those that were made or received, and not used or sent."""

    def __init__(
        self,
        wires: Mapping[tuple[int, int], Sequence[Wire]],
        ranks: Sequence[int],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.wires, self.ranks, self.group, self.device = wires, ranks, group, device
        self._waiting: dict[Message, tuple[Tensor, ...] | _Arriving] = {}
        self._sends: deque[tuple[list[dist.Work], tuple[Tensor, ...]]] = deque()
        """Tensors are kept until they have been sent."""

    @property
    def left(self) -> list[Message]:
        """What nobody has used."""
        return list(self._waiting)

    def put(self, message: Message, tensors: Iterable[Tensor]) -> None:
        """What a stage made for another."""
        self._waiting[message] = tuple(tensor.contiguous() for tensor in tensors)

    def take(self, message: Message) -> tuple[Tensor, ...]:
        """What another stage made, here or elsewhere."""
        found = self._waiting.pop(message)
        if isinstance(found, _Arriving):
            for work in found.works:
                work.wait()
            return found.buffers
        return found

    def send(self, message: Message) -> None:
        """Sends what was made. Raises ValueError where that is not as planned: it would be read as something else."""
        tensors, wires = self.take(message), self._wires(message)
        made = [Wire(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        if made != wires:
            raise ValueError(f"made {_listed(made)}, and the other side expects {_listed(wires)}")
        target = self.ranks[message[2]]
        works = [dist.isend(tensor, group=self.group, group_dst=target) for tensor in tensors]
        self._sends.append(([work for work in works if work is not None], tensors))
        self.finish(IN_FLIGHT)

    def receive(self, message: Message) -> None:
        """Begins to receive."""
        source, works = self.ranks[message[1]], list[dist.Work]()
        buffers = tuple(torch.empty(each.shape, dtype=each.dtype, device=self.device) for each in self._wires(message))
        for buffer in buffers:
            work = dist.irecv(buffer, group=self.group, group_src=source)
            assert work is not None
            works.append(work)
        self._waiting[message] = _Arriving(buffers, tuple(works))

    def finish(self, but: int = 0) -> None:
        """Waits for the messages that are being sent, but for so many."""
        while len(self._sends) > but:
            works, _ = self._sends.popleft()
            for work in works:
                work.wait()

    def _wires(self, message: Message) -> list[Wire]:
        kind, source, target, _ = message
        wires = self.wires[min(source, target), max(source, target)]
        return [wire for wire in wires if kind == "F" or wire.has_gradient]


def _listed(wires: Sequence[Wire]) -> str:
    return ", ".join(f"{wire.dtype} of {wire.shape}" for wire in wires) or "nothing"
