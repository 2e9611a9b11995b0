"""Flat buckets of parameters: what is stored of a unit, and the collectives between the levels of `levels.py`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .levels import Chain, Levels, Sends
from .quantize import dequantize, quantize


@dataclass(frozen=True, slots=True)
class Run:
    """A part of this process's fp32 values whose parameters the optimizer treats alike."""

    start: int
    """In the master."""
    parameter: nn.Parameter
    """A view of the master, for the optimizer."""
    kind: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter lies in the bucket's whole buffer."""

    parameter: nn.Parameter
    start: int
    shape: torch.Size
    kind: int

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's part of a whole buffer."""
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)


class Bucket:
    """The trainable (or the frozen) parameters of one unit; see the notes in `levels.py`."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        levels: Levels,
        dtype: torch.dtype,
        kind_of: Callable[[nn.Parameter], int],
        *,
        copy: bool = False,
    ) -> None:
        self.levels, self.dtype, self.copy = levels, dtype, copy
        self.trainable = parameters[0].requires_grad
        # Parameters that the optimizer treats alike lie side by side, so that each kind is one run of any slice.
        self.places, end = [], 0
        for parameter in sorted(parameters, key=kind_of):
            self.places.append(Place(parameter, end, parameter.shape, kind_of(parameter)))
            end += parameter.numel()
        self.numel, quantum = end, levels.degree(levels.optimizer_states) * levels.alignment
        self.padded = -(-end // quantum) * quantum
        start = torch.zeros(self.padded, dtype=torch.float32, device=parameters[0].device)
        for place in self.places:
            place.view(start).copy_(place.parameter.detach())
        self.whole = start.to(dtype)
        for place in self.places:
            place.parameter.data = place.view(self.whole)
        here = levels.slice(self.whole, levels.parameters)
        self.shard = here if levels.parameters == 0 else here.clone()
        self.secondary: Tensor | None = None
        # Frozen parameters have a master too: a checkpoint holds them as they were before they were rounded.
        self.master = self._master(start)
        self.runs = tuple(self._runs()) if self.trainable else ()
        self.is_whole = True
        self.gradient: Tensor | None = None
        self._filled: set[int] = set()
        """Starts of the places that have a gradient."""
        self.reduced: Tensor | None = None
        self._gathering: Chain | None = None
        self._publishing: Chain | None = None
        self.release()

    def _master(self, start: Tensor) -> Tensor:
        """In fp32 the parameters themselves, else a copy made of the values before they were rounded."""
        levels = self.levels
        if self.dtype != torch.float32:
            return levels.slice(start, levels.optimizer_states).clone()
        begin = levels.start(self.padded, levels.optimizer_states) - levels.start(self.padded, levels.parameters)
        return self.shard[begin : begin + self.padded // levels.degree(levels.optimizer_states)]

    def _runs(self) -> Iterator[Run]:
        """The master's part with parameters of each kind, where it has any."""
        begin = self.levels.start(self.padded, self.levels.optimizer_states)
        for kind in sorted({place.kind for place in self.places}):
            of_kind = [place for place in self.places if place.kind == kind]
            first, last = of_kind[0].start, of_kind[-1].start + of_kind[-1].shape.numel()
            low, high = max(first - begin, 0), min(last - begin, self.master.numel())
            if low < high:
                yield Run(low, nn.Parameter(self.master[low:high]), kind)

    def gather(self, *, again: bool = False) -> None:
        """Issues the next collective towards whole parameters; never waits for the last one.

        `again`: for backward, from the second copy where there is one.
        """
        if self.is_whole:
            return
        if self._gathering is None:
            self.arrive()
            source, level = self.shard, self.levels.parameters
            if again and self.secondary is not None:
                source, level = self.secondary, self.levels.secondary
            self._gathering = Chain(self._all_gather(source, level, 0, self._room, self.levels.int8_gathers), level)
        elif not self._gathering.on_last:
            self._gathering.step()

    def wait(self, *, again: bool = False) -> None:
        """The parameters are whole when this returns."""
        self.arrive()
        self.gather(again=again)
        if self._gathering is not None:
            self._gathering.finish()
            self._gathering, self.is_whole = None, True
        if again:
            self.secondary = None

    def release(self, *, secondary: bool = False) -> None:
        """Frees the whole parameters, where they are sharded.

        `secondary`: keeps a second, wider slice of them until backward (hpZ of ZeRO++, arXiv 2306.10209, section 3.2);
        where that is the whole, frees nothing.
        """
        if self.levels.parameters == 0 or not self.is_whole or (secondary and self.levels.secondary == 0):
            return
        if secondary and self.levels.secondary < self.levels.parameters:
            self.secondary = self.levels.slice(self.whole, self.levels.secondary).clone()
        self.whole.untyped_storage().resize_(0)
        self.is_whole = False

    def _room(self) -> Tensor:
        self.whole.untyped_storage().resize_(self.padded * self.dtype.itemsize)
        return self.whole

    def _all_gather(
        self, part: Tensor, level: int, to: int, out: Callable[[], Tensor], int8: Collection[int] = ()
    ) -> Sends:
        """`out` makes room for the result, when it is needed; values travel as int8 over the axes of that name."""
        for axis in range(level - 1, to - 1, -1):
            size, group = self.levels.sizes[axis], self.levels.groups[axis]
            if axis in int8:
                message = quantize(part, 8)
                messages = message.new_empty(size, message.numel())
                yield dist.all_gather_single(messages.view(-1), message.view(-1), group=group, async_op=True)
            target = out() if axis == to else part.new_empty(part.numel() * size)
            if axis in int8:
                target.view(size, -1).copy_(dequantize(messages, 8))
            else:
                yield dist.all_gather_single(target, part, group=group, async_op=True)
            part = target

    def add(self, place: Place) -> None:
        """Adds a parameter's gradient to the bucket's, in fp32."""
        if place.parameter.grad is None:  # autograd runs its hook even where its gradient is deferred
            return
        if self.gradient is None:
            self.gradient = torch.empty(self.padded, dtype=torch.float32, device=self.whole.device)
        mine = place.view(self.gradient)
        if place.start in self._filled:
            mine.add_(place.parameter.grad)
        else:
            mine.copy_(place.parameter.grad)
            self._filled.add(place.start)
        place.parameter.grad = None

    def _take_gradient(self) -> Tensor:
        """The gradient so far, zero where no batch used a parameter; the next one starts anew."""
        if self.gradient is None:
            return torch.zeros(self.padded, dtype=torch.float32, device=self.whole.device)
        gradient, self.gradient = self.gradient, None
        for place in self.places:
            if place.start not in self._filled:
                place.view(gradient).zero_()
        gradient[self.numel :].zero_()
        self._filled.clear()
        return gradient

    def reduce(self, *, last: bool) -> Chain | None:
        """Starts to sum a micro-batch's gradient up to level g; the last time on to level o and over all copies."""
        levels = self.levels
        hops = len(levels.sizes) if last else levels.gradients
        return Chain(self._reduce(last=last), hops) if hops or last else None

    def _reduce(self, *, last: bool) -> Sends:
        levels = self.levels
        part = self._take_gradient()
        for axis in range(levels.gradients):
            part = yield from self._reduce_scatter(part, axis)
        if self.reduced is not None:
            part.add_(self.reduced)
        self.reduced = part
        if not last:
            return
        for axis in range(levels.gradients, levels.optimizer_states):
            part = yield from self._reduce_scatter(part, axis)
            self.reduced = part
        for group in levels.groups[levels.optimizer_states :]:
            yield dist.all_reduce(part, group=group, async_op=True)

    def _reduce_scatter(self, part: Tensor, axis: int) -> Generator[dist.Work, None, Tensor]:
        size, group = self.levels.sizes[axis], self.levels.groups[axis]
        if axis in self.levels.int4_reductions:
            message = quantize(part, 4, size)
            messages = torch.empty_like(message)
            yield dist.all_to_all_single(messages, message, group=group, async_op=True)
            return dequantize(messages, 4).sum(0)
        out = part.new_empty(part.numel() // size)
        yield dist.reduce_scatter_single(out, part, group=group, async_op=True)
        return out

    def hand_to_optimizer(self) -> None:
        """The reduced gradient becomes that of the optimizer's parameters."""
        assert self.reduced is not None
        for run in self.runs:
            run.parameter.grad = self.reduced[run.start : run.start + run.parameter.numel()]
        self.reduced = None

    def shares(self, share_of: Callable[[nn.Parameter], float]) -> Iterator[tuple[float, Tensor]]:
        """What the optimizer has of the gradient, each piece with its share of the norm.

        `share_of` says it of a parameter, without the copies that the levels make.
        """
        begin = self.levels.start(self.padded, self.levels.optimizer_states)
        for share, alike in groupby(self.places, lambda place: share_of(place.parameter)):
            places = list(alike)
            first, end = places[0].start - begin, places[-1].start + places[-1].shape.numel() - begin
            for run in self.runs:
                low, high = max(first - run.start, 0), min(end - run.start, run.parameter.numel())
                if low < high and run.parameter.grad is not None:
                    yield share / self.levels.copies, run.parameter.grad[low:high]

    def publish(self) -> None:
        """Issues the gather of the optimizer's values from level o to level p, and drops the gradients."""
        for run in self.runs:
            run.parameter.grad = None
        levels, source = self.levels, self.master.detach().to(self.dtype)
        if levels.optimizer_states == levels.parameters:
            if self.dtype != torch.float32:  # then it is the same memory
                self.shard.copy_(source)
            return
        sends = self._all_gather(source, levels.optimizer_states, levels.parameters, lambda: self.shard)
        self._publishing = Chain(sends, levels.optimizer_states - levels.parameters)

    def publish_on(self) -> None:
        """Issues the next collective of the gather that `publish` began, if one is left."""
        if self._publishing is not None and not self._publishing.on_last:
            self._publishing.step()

    def arrive(self) -> None:
        """Waits for what `publish` sent."""
        if self._publishing is not None:
            self._publishing.finish()
            self._publishing = None
