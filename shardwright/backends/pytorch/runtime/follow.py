"""Follows one forward of a model, to know what its parts hand to each other.

[Note: what is followed]
The forward runs once on a copy of the model whose parameters are fake (shapes without memory), with real buffers and a
real batch. So what depends on the batch alone is computed, as every stage will, and what depends on parameters is fake.
A `TorchFunctionMode` sees every torch function that is called from outside another one, and numbers the fake tensors
that they return: these are the values that a stage may get from another one. So is what depends on chance, because
every stage would draw it anew. A block, and a module outside the blocks that has parameters and no submodules, is
closed: of what it makes, only what it returns is seen outside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from .hooks import tensors_of
from .record import Call, Given, Made, Record, Result, Value, is_attribute


class Route:
    """What `follow` found, for training and, once it is asked for, for evaluation."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        forward: Callable[[nn.Module, Any], Any],
        batch: Any,
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self.blocks, self.forward, self.batch, self.dtype = model, tuple(blocks), forward, batch, dtype
        self.device = next(
            (leaf.device for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), torch.device("cpu")
        )
        self._records: dict[tuple[bool, bool], Record] = {}

    @property
    def segments(self) -> int:
        """How many there are; see [Note: segments]."""
        return len(self.blocks) + 2

    def record(self) -> Record:
        """Of the model as it is now: in training or not, with gradients or without."""
        key = (self.model.training, torch.is_grad_enabled())
        if key not in self._records:
            self._records[key] = _record(self)
        return self._records[key]

    def parameters(self, record: Record, first: int, last: int) -> tuple[str, ...]:
        """Names of the parameters that segments `first` to `last` of a record use, tied ones under all their names."""
        used = set[str]().union(*(record.parameters.get(each, ()) for each in range(first, last + 1)))
        return tuple(name for name, _ in self.model.named_parameters(remove_duplicate=False) if name in used)


def follow(
    model: nn.Module,
    blocks: Sequence[str],
    forward: Callable[[nn.Module, Any], Any],
    batch: Any,
    dtype: torch.dtype | None = None,
) -> Route:
    """Runs a copy of the model once without computing anything; see [Note: what is followed].

    `blocks`: paths of the blocks, in the order in which they run. `batch`: a micro-batch as in training, on the device.
    `dtype`: of the parameters in forward, without which they have their own. Raises RuntimeError for a model whose
    forward cannot be divided.
    """
    route = Route(model, blocks, forward, batch, dtype)
    route.record()
    return route


def _record(route: Route) -> Record:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    cuda = [route.device] if route.device.type == "cuda" else []
    draws: set[Any] = set()
    while True:
        record = Record(len(route.blocks), draws=set(draws))
        with torch.random.fork_rng(cuda):
            _Recorder(*_copy(route, mode), route, record).run()
        if record.draws == draws:  # else it learns of them only after the first
            return record
        draws = record.draws


def _copy(route: Route, mode: FakeTensorMode) -> tuple[nn.Module, dict[int, set[str]]]:
    """A copy of the model with fake parameters, and their names by id."""
    memo: dict[int, Any] = {}
    names: dict[int, set[str]] = {}
    for name, parameter in route.model.named_parameters(remove_duplicate=False):
        if id(parameter) not in memo:
            dtype = route.dtype if route.dtype is not None and parameter.is_floating_point() else parameter.dtype
            with mode:
                fake = torch.empty(parameter.shape, dtype=dtype, device=route.device)
            memo[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
        names.setdefault(id(memo[id(parameter)]), set()).add(name)
    for buffer in route.model.buffers():
        if buffer.is_meta:
            with mode:
                memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=route.device)
        else:
            memo[id(buffer)] = buffer.detach().to(route.device, copy=True)
    return copy.deepcopy(route.model, memo), names


def closed_modules(model: nn.Module, blocks: Sequence[str]) -> dict[str, nn.Module]:
    """The modules outside the blocks that have parameters and no submodules, by path."""
    inside = {module for path in blocks for module in model.get_submodule(path).modules()}
    return {
        path: module
        for path, module in model.named_modules()
        if path and module not in inside and module._parameters and not module._modules
    }


class _Recorder(TorchFunctionMode):
    """Fills a record during one forward."""

    def __init__(self, model: nn.Module, names: Mapping[int, set[str]], route: Route, record: Record) -> None:
        super().__init__()
        self.model, self.names, self.route, self.record = model, names, route, record
        self.segment, self.closed = 0, ""
        self.buffers = {id(buffer) for buffer in model.buffers()}
        self.numbers: dict[int, int] = {}
        self.kept: list[Tensor] = []
        """So that no id is used again."""

    def run(self) -> None:
        """One forward."""
        blocks = self.route.blocks
        for number, path in enumerate(blocks, 1):
            block = self.model.get_submodule(path)
            vars(block)["forward"] = partial(self._block, number, path, block.forward)
        for path, module in closed_modules(self.model, blocks).items():
            vars(module)["forward"] = partial(self._module, path, module.forward)
        batch = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.route.batch)
        try:
            with self:
                output = self.route.forward(self.model, batch)
        except Exception as error:
            error.add_note(f"in {self._here}, whose forward is followed without the values of parameters")
            raise
        if self.segment <= len(blocks):
            raise RuntimeError(f"the forward does not run the block {blocks[max(self.segment, 1) - 1]}")
        for tensor in tensors_of(output):
            if id(tensor) in self.numbers:
                self.record.values[self.numbers[id(tensor)]].uses.add(self.segment)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_attribute(func):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        state = None if any(isinstance(tensor, FakeTensor) for tensor in tensors) else self._chance()
        result = _call_fake(func, args, kwargs)
        drawn = state is not None and self._differs(state)
        changed = [each for each, version in zip(tensors, versions, strict=True) if each._version != version]
        leaves, spec = tree_flatten(result)
        made = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not made and not changed:
            self.record.plain.add(func)
            return result
        self._use(tensors)
        if drawn and not self.closed:
            self.record.draws.add(func)
        for tensor in changed:
            self._change(tensor, tensors)
        depends = any(isinstance(each, FakeTensor) or id(each) in self.numbers for each in (*tensors, *made))
        if self.closed:
            for tensor in made:
                self._number(tensor)
        elif depends or func in self.record.draws:
            self._call(resolve_name(func) or str(func), leaves, spec)
        return result

    def _block(self, number: int, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.closed:
            raise RuntimeError(f"the block {path} runs inside {self.closed}")
        if self.segment != (number if number > 1 else 0):
            raise RuntimeError(f"the block {path} runs twice, or not in the order in which the blocks are listed")
        self.segment = number
        output, leaves, spec = self._run_closed(path, forward, args, kwargs)
        given = {id(leaf): Given(at) for at, leaf in enumerate(tree_leaves((args, kwargs))) if isinstance(leaf, Tensor)}
        put = [
            given[id(leaf)] if id(leaf) in given and id(leaf) not in self.numbers else self._replaced(leaf)
            for leaf in leaves
        ]
        self.record.outputs[number] = Result(tuple(put), spec)
        self.segment = number + 1
        return output

    def _module(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.closed:
            return forward(*args, **kwargs)
        output, leaves, spec = self._run_closed(path, forward, args, kwargs)
        self._call(path, leaves, spec)
        return output

    def _run_closed(
        self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, list[Any], TreeSpec]:
        self.closed = path
        output = forward(*args, **kwargs)
        self.closed = ""
        leaves, spec = tree_flatten(output)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) in self.numbers:
                value = self.record.values[self.numbers[id(leaf)]]
                value.hidden &= value.maker != path
            elif not isinstance(leaf, Tensor) and any(True for _ in tensors_of(leaf)):
                raise RuntimeError(f"{path} returns a {type(leaf).__name__}, whose tensors cannot be sent to a stage")
        return output, leaves, spec

    def _call(self, name: str, leaves: Sequence[Any], spec: TreeSpec) -> None:
        result = Result(tuple(map(self._replaced, leaves)), spec)
        self.record.calls.setdefault(self.segment, []).append(Call(name, result))

    def _replaced(self, leaf: Any) -> Any:
        return Made(self._number(leaf)) if isinstance(leaf, Tensor) else leaf

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.kept)
            self.kept.append(tensor)
            value = Value(
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                requires_grad=tensor.requires_grad,
                storage=tensor.untyped_storage()._cdata,
                maker=self._here,
                hidden=bool(self.closed),
                writes=[self.segment],
            )
            self.record.values.append(value)
        return self.numbers[id(tensor)]

    @property
    def _here(self) -> str:
        """For messages."""
        if self.closed:
            return self.closed
        blocks = self.route.blocks
        if self.segment > len(blocks):
            return "the model after its last block"
        return f"the model before {blocks[max(self.segment, 1) - 1]}"

    def _use(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in self.names:
                self.record.parameters.setdefault(self.segment, set()).update(self.names[id(tensor)])
            elif id(tensor) in self.numbers:
                self.record.values[self.numbers[id(tensor)]].uses.add(self.segment)

    def _change(self, tensor: Tensor, among: Sequence[Tensor]) -> None:
        """A call changed a tensor in place, and with it all that lie in the same storage."""
        if id(tensor) in self.buffers or id(tensor) in self.names:
            return
        if id(tensor) not in self.numbers:
            if self.closed or any(isinstance(other, FakeTensor) for other in among):
                raise RuntimeError(f"{self._here} changes in place a tensor that until then depends on the batch alone")
            return
        storage = tensor.untyped_storage()._cdata
        for value in self.record.values:
            if value.storage == storage:
                value.uses.add(self.segment)
                if value.writes[-1] != self.segment:
                    value.writes.append(self.segment)

    def _chance(self) -> tuple[Tensor, Tensor | None]:
        cuda = torch.cuda.get_rng_state(self.route.device) if self.route.device.type == "cuda" else None
        return torch.random.get_rng_state(), cuda

    def _differs(self, state: tuple[Tensor, Tensor | None]) -> bool:
        pairs = zip(state, self._chance(), strict=True)
        return any(old is not None and new is not None and not torch.equal(old, new) for old, new in pairs)


def _call_fake(func: Any, args: Any, kwargs: Any) -> Any:
    if getattr(func, "__name__", "") not in ("grouped_mm", "_grouped_mm"):
        return func(*args, **kwargs)
    # Without values it is known for bf16 alone.
    dtype, half = args[0].dtype, torch.bfloat16
    args, kwargs = tree_map(lambda v: v.to(half) if isinstance(v, Tensor) and v.dtype == dtype else v, (args, kwargs))
    return func(*args, **kwargs).to(dtype)
