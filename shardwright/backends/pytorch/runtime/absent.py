"""One forward of a model, of which a stage computes a part.

[Note: absent segments]
A stage calls the model's own forward. Of the segments before its own ([Note: segments] in `record.py`) it computes only
what depends on the batch alone. The other calls, which the record of the forward numbers, return the tensors that were
received, where the stage needs them, else placeholders: NaN everywhere, expanded from one element. Where its last block
ends, an exception leaves the forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, resolve_name
from torch.utils._pytree import tree_leaves

from .follow import Route, closed_modules
from .record import Call, Given, Made, Record, Result, is_attribute


class _Leave(BaseException):
    """Leaves a forward where the stage ends; no error, so that no model handles it."""


@dataclass(slots=True, kw_only=True)
class Part:
    """What a stage does in a forward that has this record."""

    route: Route
    record: Record
    first: int
    last: int
    """Its segments."""
    received: Mapping[int, Sequence[int]]
    """By the stage it comes from: numbers of the values."""
    sent: Mapping[int, Sequence[int]]
    """And by the stage it goes to."""
    changed: Container[int]
    """Of the received values, those that the stage changes in place."""
    wanted: frozenset[int] = field(init=False)
    """Values to keep until the stage ends."""
    followed: int = field(init=False)
    """The last segment in which calls are watched; -1: none."""
    blocks: Sequence[nn.Module] = field(init=False)
    modules: Sequence[tuple[str, nn.Module]] = field(init=False)
    """Outside the blocks, that run in segments whose calls are watched."""
    parameters: frozenset[int] = field(init=False)
    """Their ids."""
    placeholders: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, calls = self.route.model, self.record.calls
        self.parameters = frozenset(map(id, model.parameters()))
        self.wanted = frozenset(number for numbers in self.sent.values() for number in numbers)
        own = range(self.first, self.last + 1)
        outside = [
            at for at in own if not self.wanted.isdisjoint(n for call in calls.get(at, ()) for n in call.result.values)
        ]
        self.followed = max([self.first - 1, *outside])
        names = {call.name for at in range(self.followed + 1) for call in calls.get(at, ())}
        found = closed_modules(model, self.route.blocks)
        self.blocks = [model.get_submodule(path) for path in self.route.blocks]
        self.modules = [(path, found[path]) for path in found if path in names]

    def run(self, batch: Any, received: Sequence[Sequence[Tensor]]) -> Any:
        """One forward: the model's output, or for each stage that follows a tuple of tensors."""
        made: dict[int, Tensor] = {}
        for numbers, tensors in zip(self.received.values(), received, strict=True):
            for number, tensor in zip(numbers, tensors, strict=True):
                made[number] = tensor.clone() if number in self.changed else tensor
        try:
            return _Run(self, made).forward(batch)
        except _Leave:
            return tuple(tuple(made[number] for number in numbers) for numbers in self.sent.values())

    def placeholder(self, number: int) -> Tensor:
        """In the place of a value that the stage does not need."""
        if number not in self.placeholders:
            value = self.record.values[number]
            number_like = value.dtype.is_floating_point or value.dtype.is_complex
            scalar = torch.full((), torch.nan if number_like else 0, dtype=value.dtype, device=self.route.device)
            self.placeholders[number] = scalar.expand(value.shape).requires_grad_(value.requires_grad)
        return self.placeholders[number]


class _Run(TorchFunctionMode):
    """One forward of a stage."""

    def __init__(self, part: Part, made: dict[int, Tensor]) -> None:
        super().__init__()
        self.part, self.made, self.record, self.first, self.last = part, made, part.record, part.first, part.last
        self.segment = self.at = 0
        """Where the forward is: the next call that the record numbers."""
        self.calls: Sequence[Call] = part.record.calls.get(0, ())
        self.closed = self.watches = False
        self.marked: dict[int, weakref.ref[Tensor]] = {}
        """By id, what depends on parameters."""
        for tensor in made.values():
            self._mark(tensor)

    def forward(self, batch: Any) -> Any:
        """Runs the model; raises _Leave where the stage ends before it."""
        before: list[tuple[dict[str, Any], Any]] = []
        try:
            for module, replacement in self._replaced():
                own = vars(module)
                before.append((own, own.get("forward")))
                own["forward"] = partial(replacement, module.forward)
            if self.part.followed >= 0:
                self.__enter__()  # type: ignore[no-untyped-call]
                self.watches = True
            return self.part.route.forward(self.part.route.model, batch)
        finally:
            if self.watches:
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            for own, forward in reversed(before):
                if forward is None:
                    del own["forward"]
                else:
                    own["forward"] = forward

    def _replaced(self) -> Iterable[tuple[nn.Module, Callable[..., Any]]]:
        """The modules whose forward is replaced, and by what."""

        def returns_wanted(number: int) -> bool:
            return not self.part.wanted.isdisjoint(self.record.outputs[number].values)

        for number, block in enumerate(self.part.blocks[: max(self.last, 1)], 1):
            if number < self.first:
                yield block, partial(self._absent, number)
            elif number <= max(self.part.followed, 1) or number == self.last or returns_wanted(number):
                yield block, partial(self._present, number)
        for path, module in self.part.modules:
            yield module, partial(self._module, path)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.closed or self.segment > self.part.followed:
            return func(*args, **kwargs)
        if is_attribute(func):
            return self._attribute(func, args)
        if func in self.record.plain or not (func in self.record.draws or self._depends((args, kwargs))):
            return func(*args, **kwargs)
        call = self._next(resolve_name(func) or str(func))
        if self.segment < self.first:
            return call.result.put(self._replace)
        result = func(*args, **kwargs)
        self._keep(call.result, result)
        return result

    def _attribute(self, func: Any, args: Any) -> Any:
        result = func(*args)
        if isinstance(result, torch.device) and result.type == "meta":  # of a parameter that other stages have
            return self.part.route.device
        return result

    def _depends(self, value: Any) -> bool:
        """Whether there is a parameter or a value in the arguments of a call."""
        if isinstance(value, Tensor):
            mark = self.marked.get(id(value))
            return mark() is value if mark is not None else id(value) in self.part.parameters
        if isinstance(value, (tuple, list)):
            return any(map(self._depends, value))
        return isinstance(value, dict) and any(map(self._depends, value.values()))

    def _mark(self, tensor: Tensor) -> None:
        self.marked[id(tensor)] = weakref.ref(tensor)

    def _next(self, name: str) -> Call:
        """What the record says of the call that comes now."""
        call = self.calls[self.at] if self.at < len(self.calls) else None
        if call is None or call.name != name:
            self._unlike(f"calls {name} in the place of {'nothing' if call is None else call.name}")
        self.at += 1
        return call

    def _unlike(self, how: str) -> NoReturn:
        raise RuntimeError(f"the forward {how}, unlike when it was followed: what it does depends on values")

    def _replace(self, leaf: Any) -> Any:
        """A received tensor or a placeholder for a value."""
        if not isinstance(leaf, Made):
            return leaf
        found = self.made.get(leaf)
        if found is None:
            found = self.part.placeholder(leaf)
            self._mark(found)
        return found

    def _keep(self, result: Result, output: Any) -> None:
        """Marks what a present call returned, and keeps what is to be sent."""
        for leaf, tensor in zip(result.leaves, tree_leaves(output), strict=True):
            if isinstance(leaf, Made):
                self._mark(tensor)
                if leaf in self.part.wanted:
                    self.made[leaf] = tensor

    def _module(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A module outside the blocks."""
        if self.closed or self.segment > self.part.followed:
            return forward(*args, **kwargs)
        call = self._next(path)
        if self.segment < self.first:
            return call.result.put(self._replace)
        output = self._closed(forward, args, kwargs)
        self._keep(call.result, output)
        return output

    def _closed(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.closed = True
        output = forward(*args, **kwargs)
        self.closed = False
        return output

    def _absent(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block that another stage has."""
        self._enter(number)

        def replace(leaf: Any) -> Any:
            return tree_leaves((args, kwargs))[leaf] if isinstance(leaf, Given) else self._replace(leaf)

        output = self.record.outputs[number].put(replace)
        self._end(number)
        return output

    def _present(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One of the stage's own blocks, or the first one after the embedding."""
        self._enter(number)
        if self.last < number:
            raise _Leave
        if number >= self.part.followed:
            self._stop_watching()
        output = self._closed(forward, args, kwargs)
        self._keep(self.record.outputs[number], output)
        if self.last == number:
            raise _Leave
        self._end(number)
        return output

    def _enter(self, number: int) -> None:
        if self.segment <= self.part.followed and self.at < len(self.calls):
            self._unlike(f"comes to {self.part.route.blocks[number - 1]} without {self.calls[self.at].name}")
        self.segment = number

    def _end(self, number: int) -> None:
        self.segment, self.at = number + 1, 0
        self.calls = self.record.calls.get(self.segment, ())
        if self.segment > self.part.followed:
            self._stop_watching()

    def _stop_watching(self) -> None:
        """Leaves the mode, unless the forward has entered others since: those would be left in its place."""
        if self.watches and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)
            self.watches = False
