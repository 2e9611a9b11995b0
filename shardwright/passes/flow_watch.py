"""One forward on fake tensors, followed: which segment makes and reads each storage, and what uses each parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwright.passes.blocks import Block
from shardwright.passes.boundary import results_of
from shardwright.passes.operators import operation, tensor_bytes, tensors_in, written_into
from shardwright.passes.unit_run import Nest
from shardwright.passes.untyped import DispatchMode
from shardwright.schemas.profile import Role

_STACKS = frozenset({"bmm", "baddbmm", "_grouped_mm", "grouped_mm_fallback", "grouped_mm"})
_INSIDE = -1
"""The segment, while a block runs for the first time."""
_RANK: tuple[Role, ...] = ("unused", "vector", "matrix", "experts", "convolution", "embedding")
"""A parameter used in several ways has the last of their roles."""


@dataclass(slots=True)
class Value:
    """What one storage holds from one write to the next."""

    made: int
    """Segment that wrote it."""
    carried: bool
    """Whether it depends on parameters."""
    uses: dict[int, int] = field(default_factory=dict)
    """Segments that read it to the bytes of the largest view that they read."""
    before: Value | None = None
    """What the storage held before, where an operator wrote into it."""

    @property
    def born(self) -> int:
        """Segment that made the storage."""
        first = self
        while first.before is not None:
            first = first.before
        return first.made

    def use(self, segment: int, size: int) -> None:
        """Reads so many bytes of it."""
        self.uses[segment] = max(size, self.uses.get(segment, 0))

    def bytes_after(self, segment: int) -> int:
        """Bytes that later segments read."""
        return max((size for at, size in self.uses.items() if at > segment), default=0)


class ParametersOfBlock(NamedTuple):
    """The parameters that a block uses."""

    own: tuple[str, ...]
    """By their names below the block."""
    given: frozenset[int]
    """Those among its inputs."""
    others: tuple[str, ...]
    """Those that it reaches otherwise, such as a layer's that all blocks share."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a block did when it was run, for those that are equal to it. Storages are told by their index among those
    of the inputs or outputs."""

    path: str
    reads: dict[int, int]
    """Inputs that it reads to the bytes of the largest view."""
    writes: frozenset[int]
    """Inputs that it writes into."""
    output: Nest
    places: tuple[int | None, ...]
    """For each tensor of the output, the index of the input storage that it lies in, if it does."""
    carried: frozenset[int]
    """Storages of the output that depend on parameters."""
    captured: dict[int, int]
    """Storages that it reads and was not given, by key, to the bytes of the largest view."""
    parameters: ParametersOfBlock
    leaks: tuple[Value, ...]
    """What was made inside and is not returned."""


class Watch(DispatchMode):
    """Follows storages and parameters through one forward."""

    def __init__(self, prepare: Callable[[nn.Module], None], tokens: Iterable[Any]) -> None:
        super().__init__()
        self.prepare = prepare
        self.values: list[Value] = []
        self.like: dict[str, str] = {}
        self.roles: dict[str, Role] = {}
        self.segments: dict[str, set[int]] = defaultdict(set)
        """Of parameters by all their names, the segments that use them."""
        self.kinds: dict[tuple[Any, ...], Kind] = {}
        self._current: dict[int, Value] = {}
        self._held: list[Any] = []
        self._names: dict[int, tuple[str, ...]] = {}
        """Of parameters, and of what was made of parameters alone."""
        self._dims: dict[str, int] = {}
        self._parameters: dict[int, tuple[str, ...]] = {}
        self._tokens = {tensor.untyped_storage()._cdata for tensor in tokens}
        self.segment = 0
        """What runs now belongs to the segment of this number."""

    def name_parameters(self, module: nn.Module, path: str) -> None:
        """These parameters have their tensors now."""
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if isinstance(parameter, FakeTensor):
                key = self._hold(parameter)
                full = f"{path}.{name}" if path else name
                self._dims[full] = parameter.dim()
                self._names[key] = tuple(dict.fromkeys((*self._names.get(key, ()), full)))
                self._parameters[key] = self._names[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        result = func(*args, **kwargs)
        if func.namespace == "prim":
            return result
        inputs = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        keys = [tensor.untyped_storage()._cdata for tensor in inputs]
        self._use_parameters(keys)
        if func.is_view:
            return result
        names = [self._names.get(key, ()) for key in keys]
        carried = any(names)
        for tensor, key in zip(inputs, keys, strict=True):
            value = self._current.get(key)
            if value is not None:
                value.use(self.segment, tensor_bytes(tensor))
                carried |= value.carried
        self._note_roles(func, inputs, names)
        written = {tensor.untyped_storage()._cdata for tensor in written_into(func, args, kwargs)}
        kept = set(keys) - written
        outputs = {key for tensor in tensors_in(result) if (key := self._hold(tensor)) not in kept}
        for key in outputs | written:
            self._make(key, carried)
        if names and all(names):  # rows that are looked up are activations: their indices have no names
            made_of = tuple(dict.fromkeys(name for each in names for name in each))
            self._names.update(dict.fromkeys(outputs, made_of))
        return result

    def _hold(self, tensor: torch.Tensor) -> int:
        """The key of a tensor's storage, which stays its own: the storage is kept."""
        storage = tensor.untyped_storage()
        self._held.append(storage)
        return int(storage._cdata)

    def _make(self, key: int, carried: bool) -> None:
        before = self._current.get(key)
        value = Value(self.segment, carried or (before is not None and before.carried), before=before)
        self.values.append(value)
        self._current[key] = value

    def _use_parameters(self, keys: Iterable[int]) -> None:
        for key in keys:
            for name in self._parameters.get(key, ()):
                self.segments[name].add(self.segment)

    def _note_roles(self, func: Any, inputs: Sequence[torch.Tensor], names: Sequence[tuple[str, ...]]) -> None:
        if not any(names):
            return
        call = operation(func)
        looks_up = call.name == "embedding" or (call.name == "index" and self._by_tokens(inputs[1:]))
        for at, each in enumerate(names):
            for name in each:
                role: Role = "vector"
                if looks_up and at == 0:
                    role = "embedding"
                elif call.kind == "matmul" and self._dims[name] > 1:
                    stack = call.name in _STACKS and self._dims[name] > 2
                    role = "convolution" if call.name == "convolution" else "experts" if stack else "matrix"
                self.roles[name] = max(role, self.roles.get(name, "unused"), key=_RANK.index)

    def _by_tokens(self, indices: Sequence[torch.Tensor]) -> bool:
        return any(index.untyped_storage()._cdata in self._tokens for index in indices)

    def stand_in(self, block: Block) -> Callable[..., Any]:
        """Takes the place of a block's forward."""
        forward = block.module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            inputs, tensors = Nest.of((args, kwargs))
            self._held.append(inputs)
            self.segment = max(self.segment, 1)
            key = (block.fingerprint, inputs.key())
            if key in self.kinds:
                output = self._repeat(block, self.kinds[key], inputs, tensors)
            else:
                output, self.kinds[key] = self._run(block, inputs, tensors, lambda: forward(*args, **kwargs))
            self.like[block.path] = self.kinds[key].path
            self.segment += 1
            return output

        return call

    def _run(
        self, block: Block, inputs: Nest, tensors: Sequence[torch.Tensor], call: Callable[[], Any]
    ) -> tuple[Any, Kind]:
        self.prepare(block.module)
        self.name_parameters(block.module, block.path)
        keys = _keys(inputs, tensors)
        before = {index: self._current.get(key) for index, key in enumerate(keys)}
        outside, count = self.segment, len(self.values)
        self.segment = _INSIDE
        output = call()
        self.segment = outside
        nest, results = Nest.of(output)
        made = _keys(nest, results)
        reads = {index: value.uses.pop(_INSIDE, 0) for index, value in before.items() if value is not None}
        for value in self.values[count:]:
            value.made = outside
            value.uses.clear()
        left = [self._current.get(key) for key in (*keys, *made)]
        kind = Kind(
            path=block.path,
            reads={index: size for index, size in reads.items() if size},
            writes=frozenset(index for index, key in enumerate(keys) if self._current.get(key) is not before[index]),
            output=nest,
            places=tuple(keys.index(key) if (key := made[at.storage]) in keys else None for at in nest.layouts),
            carried=frozenset(
                index for index, key in enumerate(made) if key in self._current and self._current[key].carried
            ),
            captured={key: value.uses.pop(_INSIDE) for key, value in self._current.items() if _INSIDE in value.uses},
            parameters=self._parameters_of(block, keys),
            leaks=tuple(value for value in self.values[count:] if all(value is not each for each in left)),
        )
        self._use(block, kind, keys, list(before.values()))
        return output, kind

    def _parameters_of(self, block: Block, keys: Sequence[int]) -> ParametersOfBlock:
        """Of a block that has just run with inputs of these keys."""
        used = {name for name, segments in self.segments.items() if _INSIDE in segments}
        for name in used:
            self.segments[name].discard(_INSIDE)
        below = f"{block.path}."
        own = [name for name in used if name.startswith(below)]
        given = {index: names for index, key in enumerate(keys) if (names := self._parameters.get(key)) is not None}
        others = used.difference(own, *given.values())
        return ParametersOfBlock(
            own=tuple(name.removeprefix(below) for name in own),
            given=frozenset(index for index, names in given.items() if not used.isdisjoint(names)),
            others=tuple(others),
        )

    def _repeat(self, block: Block, kind: Kind, inputs: Nest, tensors: Sequence[torch.Tensor]) -> Any:
        keys = _keys(inputs, tensors)
        self._use(block, kind, keys, [self._current.get(key) for key in keys])
        new = iter(
            results_of([at for at, place in zip(kind.output.layouts, kind.places, strict=True) if place is None])
        )
        of_storage = {at.storage: tensor for tensor, at in zip(tensors, inputs.layouts, strict=True)}
        results = [
            next(new) if place is None else of_storage[place].as_strided(at.shape, at.stride, at.offset)
            for at, place in zip(kind.output.layouts, kind.places, strict=True)
        ]
        for index, key in enumerate(_keys(kind.output, results)):
            if key not in keys:
                self._make(key, index in kind.carried)
        for index in kind.writes:
            self._make(keys[index], True)
        return kind.output.filled(results)

    def _use(self, block: Block, kind: Kind, keys: Sequence[int], values: Sequence[Value | None]) -> None:
        """A block of this kind uses what its kind does. `values` are those of its inputs, `keys` their storages."""
        reads = [(values[index], size) for index, size in kind.reads.items()]
        reads += [(self._current.get(key), size) for key, size in kind.captured.items()]
        for value, size in reads:
            if value is not None:
                value.use(self.segment, size)
        self._use_parameters(keys[index] for index in kind.parameters.given)
        for name in (*kind.parameters.others, *(f"{block.path}.{name}" for name in kind.parameters.own)):
            self.segments[name].add(self.segment)


def _keys(nest: Nest, tensors: Sequence[torch.Tensor]) -> list[int]:
    """The keys of a nest's storages, in the order of its numbers."""
    keys = {at.storage: tensor.untyped_storage()._cdata for tensor, at in zip(tensors, nest.layouts, strict=True)}
    return [keys[index] for index in range(len(keys))]
