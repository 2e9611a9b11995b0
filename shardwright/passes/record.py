"""What happens inside a forward or a backward: operators in order, and the bytes alive after each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwright.passes import operators
from shardwright.passes.operators import Operation
from shardwright.passes.storages import Storages
from shardwright.passes.unpriced import met_unpriced
from shardwright.passes.untyped import DispatchMode
from shardwright.schemas.profile import Kind


@dataclass(frozen=True, slots=True)
class Event:
    """One operator call that does work."""

    name: str
    kind: Kind
    module: str
    region: str
    flops: int
    bytes: int
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: str
    node: int
    """Sequence number of the autograd node that runs it; -1 in forward."""
    made: tuple[int, ...] = ()
    """The new storages that it returns, by number."""
    moments: int = 0
    """Moments recorded until right after it."""
    exchanged: int = 0
    """Of a collective, the bytes of the whole tensor."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes alive right after an allocation."""

    region: str
    time: int
    own: int
    """Made in the region."""
    inputs: int
    """Made to enter a unit."""
    in_loss: bool = False
    """Whether what runs belongs to the loss, outside the model."""
    gradients: int = 0
    """In backward: elements of the region's parameters whose gradients exist by then."""

    def without(self, size: int) -> Moment:
        """The moment with so many bytes of its own less."""
        return replace(self, own=self.own - size)

    def with_gradient(self, elements: int) -> Moment:
        """The moment with so many elements of parameter gradients more."""
        return replace(self, gradients=self.gradients + elements)


@dataclass(frozen=True, slots=True)
class Recording:
    """A forward or a backward."""

    events: list[Event]
    moments: list[Moment]
    entered: dict[str, Moment]
    """Each region as it was entered."""

    def rises(self, region: str) -> list[int]:
        """Bytes alive beyond what was alive before the region, after each of its allocations. What other regions made
        is taken not to change meanwhile."""
        moments = [moment for moment in self.moments if moment.region == region]
        if not moments:
            return []
        entered = self.entered.get(region, moments[-1])
        return [moment.own + moment.inputs - entered.own - entered.inputs for moment in moments]

    def of(self, region: str) -> list[Moment]:
        """The moments behind `rises`."""
        return [moment for moment in self.moments if moment.region == region]


class Recorder(DispatchMode):
    """Records while it is entered and not paused: one unit, one micro-batch.

    A region is a named stretch of the model. Forward says which one runs; in backward it follows from the autograd
    node that runs, by the node's number."""

    def __init__(self, parameters: Iterable[torch.Tensor], region: str) -> None:
        super().__init__()
        self.storages = Storages()
        self._of_parameters = {tensor.untyped_storage()._cdata for tensor in parameters}
        self._modules = [""]
        self._marks = [(0, "", region)]
        self._paused = self._in_backward = self._entering = False
        self._loss_begins: int | None = None
        self._forced_region: str | None = None
        self._recording = Recording([], [], {})
        self._sums: dict[int, list[int]] = {}
        self.overwritten: set[int] = set()
        """Storages that an operator wrote into after they were made, by number."""

    def take(self, *, in_backward: bool) -> Recording:
        """What was recorded since the last call. What comes next runs forward or backward."""
        done, self._recording = self._recording, Recording([], [], {})
        self._in_backward = in_backward
        return done

    def enter_module(self, path: str) -> None:
        """From here on, operators belong to this module."""
        self._modules.append(path)
        self._marks.append((_next_node(), path, self._marks[-1][2]))

    def leave_module(self) -> None:
        """Back to the module around."""
        self._modules.pop()
        self._marks.append((_next_node(), self._modules[-1], self._marks[-1][2]))

    def enter_loss(self) -> None:
        """The model has returned; from here on, operators of forward, and their autograd nodes, are the loss's."""
        self._loss_begins = _next_node()

    def enter_region(self, region: str) -> None:
        """From here on, operators of forward belong to this region, and their autograd nodes with them."""
        self._marks.append((_next_node(), self._modules[-1], region))
        self.rebase(region)

    def region(self) -> str:
        """What runs now belongs to this region."""
        return self._place()[1]

    def rebase(self, region: str) -> None:
        """Peaks of the region count from the bytes alive when it next does something."""
        self._recording.entered.pop(region, None)

    def is_paused(self) -> bool:
        """Whether nothing is recorded now."""
        return self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is recorded, and storages made inside never count."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def in_region(self, region: str) -> Iterator[None]:
        """What runs inside belongs to this region, whatever else says otherwise."""
        before, self._forced_region = self._forced_region, region
        try:
            yield
        finally:
            self._forced_region = before

    @contextmanager
    def entering(self) -> Iterator[None]:
        """Storages made inside are the unit's inputs."""
        self._entering = True
        try:
            yield
        finally:
            self._entering = False

    def position(self) -> tuple[int, int]:
        """Events and moments so far."""
        return len(self._recording.events), len(self._recording.moments)

    def mark(self, region: str) -> None:
        """Records the bytes alive now as a moment of their own."""
        moment = self._moment(region)
        self._recording.entered.setdefault(region, moment)
        self._recording.moments.append(moment)
        self.storages.time += 1

    def discount(self, recording: Recording, gradients: Iterable[torch.Tensor]) -> None:
        """Takes parameter gradients out of a recorded backward. Where a parameter is used twice, PyTorch adds the
        second gradient into the first (`InputBuffer::accumulate`), but makes a third of fake tensors: the first counts
        as the parameter's gradient from its beginning, the second is a temporary."""
        width = {number: t.element_size() for t in gradients if (number := self.storages.number(t)) is not None}
        todo = set(width)
        while todo:
            number = todo.pop()
            size, born = self.storages.size[number], self.storages.born[number]
            made_in = self.storages.region[number]
            died = self.storages.died.get(number, self.storages.time + 1)
            for index, moment in enumerate(recording.moments):
                if moment.region == made_in and born <= moment.time < died:
                    recording.moments[index] = moment.without(size)
            for region, moment in recording.entered.items():
                if region == made_in and born < moment.time < died:
                    recording.entered[region] = moment.without(size)
            if number in self._sums:
                first = min(self._sums[number], key=lambda part: self.storages.born[part])
                todo.add(first)
                width[first] = width[number]
                continue
            for index, moment in enumerate(recording.moments):
                if moment.region == made_in and born <= moment.time:
                    recording.moments[index] = moment.with_gradient(size // width[number])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if self._paused or func.namespace == "prim":
            return func(*args, **kwargs)
        module, region, node = self._place()
        before = self._moment(region, node)
        result = func(*args, **kwargs)
        call = operators.operation(func)
        if call.works or call.allocates:
            self._recording.entered.setdefault(region, before)
            outputs = list(operators.tensors_in(result))
            made = self._add(outputs, region, node) if call.allocates else ()
            self._note_writing(operators.written_into(func, args, kwargs))
            if call.works:
                inputs = [*operators.tensors_in(args), *operators.tensors_in(tuple(kwargs.values()))]
                if call.name == "add" and self._in_backward and len(inputs) == 2:
                    self._note_sum(outputs[0], inputs)
                self._check_priced(call, inputs, outputs, module)
                event = Event(
                    name=call.name,
                    kind=call.kind,
                    module=module,
                    region=region,
                    flops=operators.flops(call, args, kwargs, result),
                    bytes=operators.bytes_moved(call, inputs, outputs),
                    shapes=operators.shapes_of(inputs),
                    strides=tuple(tensor.stride() for tensor in inputs),
                    dtype=operators.operand_dtype(inputs, outputs),
                    node=node,
                    made=made,
                    moments=len(self._recording.moments),
                    exchanged=operators.bytes_exchanged(call, inputs, outputs),
                )
                self._recording.events.append(event)
        return result

    def _place(self) -> tuple[str, str, int]:
        """Module, region and autograd node (-1 in forward) of what runs now."""
        if not self._in_backward:
            return self._modules[-1], self._forced_region or self._marks[-1][2], -1
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else -1
        _, module, region = self._marks[bisect_right(self._marks, number, key=lambda mark: mark[0]) - 1]
        return module, self._forced_region or region, number

    def _moment(self, region: str, node: int = -1) -> Moment:
        begins = self._loss_begins
        in_loss = begins is not None and (node >= begins or not self._in_backward)
        return Moment(region, self.storages.time, self.storages.live[region], self.storages.inputs_live, in_loss)

    def _add(self, tensors: Sequence[torch.Tensor], region: str, node: int) -> tuple[int, ...]:
        """Counts the storages that are new and returns their numbers."""
        forget = self._of_parameters.discard
        numbers = [self.storages.add(tensor, region, self._entering, forget) for tensor in tensors]
        new = tuple(number for number in numbers if number is not None)
        if new:
            self._recording.moments.append(self._moment(region, node))
            self.storages.time += 1
        return new

    def _note_writing(self, tensors: Iterable[torch.Tensor]) -> None:
        numbers = map(self.storages.number, tensors)
        self.overwritten.update(number for number in numbers if number is not None)

    def _note_sum(self, result: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        number, *numbers = (self.storages.number(tensor) for tensor in (result, *parts))
        if number is not None and None not in numbers:
            self._sums[number] = [part for part in numbers if part is not None]

    def _check_priced(
        self, call: Operation, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], module: str
    ) -> None:
        """Refuses unknown work on parameters, or on what is made of parameters alone (a cast, a concatenation); tells
        of unknown work on activations."""
        floating = [tensor for tensor in inputs if tensor.is_floating_point()]
        from_parameter = [tensor.untyped_storage()._cdata in self._of_parameters for tensor in floating]
        if floating and not call.priced:
            met_unpriced(call.qualified_name, module, takes_parameters=any(from_parameter))
        if from_parameter and all(from_parameter) and not self._in_backward:
            self._of_parameters.update(tensor.untyped_storage()._cdata for tensor in outputs)


def _next_node() -> int:
    """The number that the next autograd node will get; nodes run in falling order in backward."""
    return int(torch._C._autograd._get_sequence_nr())


@contextmanager
def module_paths(recorder: Recorder, root: nn.Module, skip: Callable[[str], bool]) -> Iterator[None]:
    """Tells the recorder which submodule runs, by hooks that are removed afterwards. Paths start at `root`."""
    handles = []
    for path, module in root.named_modules():
        if path and not skip(path):
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: recorder.enter_module(path)))
            handles.append(module.register_forward_hook(lambda *_: recorder.leave_module()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
