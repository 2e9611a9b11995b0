"""Where activations come from and where they go, and what parameters do, from one forward and its loss on fake tensors.

[Note: segments]
The blocks, in the order in which they are called, divide a forward into segments: `embedding` before the first one,
then one for each block, then `head`, the loss included. What runs between two blocks belongs to the later one's
segment, so a cut after a block comes before it.

[Note: carried activations]
A later segment needs of an earlier one the storages that were made there and are used later, as far as they depend on
parameters. What follows from the batch alone (masks, positions, rotary tables) is computed wherever it is needed, and
the batch is given to every stage. Of a storage that is used through views, as many bytes count as the largest view has.

As everywhere, a block that is equal to an earlier one is not run again: it takes and returns what that one did. Bytes
are those of micro-batches 2 and 3, taken back to 1 along the line ([Note: affine in the micro-batch]).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwright.passes.blocks import Block
from shardwright.passes.boundary import fresh
from shardwright.passes.operators import operation, tensor_bytes, tensors_in
from shardwright.passes.step_run import EMBEDDING, HEAD, Step, replaced_forwards
from shardwright.passes.unit_run import Nest
from shardwright.passes.untyped import DispatchMode
from shardwright.schemas.profile import Cut, Edge, Role

MICRO_BATCHES = (2, 3)
_K = TypeVar("_K", int, tuple[int, int])
_STACKS = frozenset({"bmm", "baddbmm", "_grouped_mm", "grouped_mm_fallback", "grouped_mm"})
_RANK: tuple[Role, ...] = ("unused", "vector", "matrix", "experts", "convolution", "embedding")
"""A parameter used in several ways has the last of their roles."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What one forward showed."""

    cuts: tuple[Cut, ...]
    """After the embedding and after each block; none for a model without blocks."""
    edges: tuple[Edge, ...]
    like: dict[str, str]
    """Every block's path to that of the first block which is equal to it."""
    roles: dict[str, Role]
    """Of the parameters that are used, under all their names."""


@dataclass(slots=True)
class _Value:
    """What one storage holds from one write to the next."""

    made: int
    """Segment that wrote it."""
    carried: bool
    """Whether it depends on parameters."""
    uses: dict[int, int] = field(default_factory=dict)
    """Segments that read it to the bytes of the largest view that they read."""

    def use(self, segment: int, size: int) -> None:
        """Reads so many bytes of it."""
        self.uses[segment] = max(size, self.uses.get(segment, 0))

    def bytes_after(self, segment: int) -> int:
        """Bytes that later segments read."""
        return max((size for at, size in self.uses.items() if at > segment), default=0)


@dataclass(frozen=True, slots=True)
class _Kind:
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


class _Watch(DispatchMode):
    """Follows storages and parameters through one forward."""

    def __init__(self, prepare: Callable[[nn.Module], None], tokens: Iterable[Any]) -> None:
        super().__init__()
        self.prepare = prepare
        self.values: list[_Value] = []
        self.like: dict[str, str] = {}
        self.roles: dict[str, Role] = {}
        self._current: dict[int, _Value] = {}
        self._held: list[Any] = []
        self._names: dict[int, tuple[str, ...]] = {}
        self._dims: dict[str, int] = {}
        self._kinds: dict[tuple[Any, ...], _Kind] = {}
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        result = func(*args, **kwargs)
        if func.namespace == "prim" or func.is_view:
            return result
        inputs = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        names = [self._names.get(tensor.untyped_storage()._cdata, ()) for tensor in inputs]
        carried = any(names)
        for tensor in inputs:
            value = self._current.get(tensor.untyped_storage()._cdata)
            if value is not None:
                value.use(self.segment, tensor_bytes(tensor))
                carried |= value.carried
        self._note_roles(func, inputs, names)
        before = {tensor.untyped_storage()._cdata for tensor in inputs}
        written = {args[at].untyped_storage()._cdata for at in _written(func) if isinstance(args[at], torch.Tensor)}
        outputs = {key for tensor in tensors_in(result) if (key := self._hold(tensor)) not in before - written}
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
        value = _Value(self.segment, carried or (before is not None and before.carried))
        self.values.append(value)
        self._current[key] = value

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
            if key in self._kinds:
                output = self._repeat(self._kinds[key], inputs, tensors)
            else:
                output, self._kinds[key] = self._run(block, inputs, tensors, lambda: forward(*args, **kwargs))
            self.like[block.path] = self._kinds[key].path
            self.segment += 1
            return output

        return call

    def _run(
        self, block: Block, inputs: Nest, tensors: Sequence[torch.Tensor], call: Callable[[], Any]
    ) -> tuple[Any, _Kind]:
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
        kind = _Kind(
            path=block.path,
            reads={index: size for index, size in reads.items() if size},
            writes=frozenset(index for index, key in enumerate(keys) if self._current.get(key) is not before[index]),
            output=nest,
            places=tuple(keys.index(key) if (key := made[at.storage]) in keys else None for at in nest.layouts),
            carried=frozenset(
                index for index, key in enumerate(made) if key in self._current and self._current[key].carried
            ),
        )
        self._use(kind, list(before.values()))
        return output, kind

    def _repeat(self, kind: _Kind, inputs: Nest, tensors: Sequence[torch.Tensor]) -> Any:
        keys = _keys(inputs, tensors)
        self._use(kind, [self._current.get(key) for key in keys])
        new = iter(fresh([at for at, place in zip(kind.output.layouts, kind.places, strict=True) if place is None]))
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

    def _use(self, kind: _Kind, values: Sequence[_Value | None]) -> None:
        for index, size in kind.reads.items():
            value = values[index]
            if value is not None:
                value.use(self.segment, size)


_INSIDE = -1
"""The segment, while a block runs for the first time."""


@cache
def _written(func: Any) -> tuple[int, ...]:
    """Places of the arguments that an operator writes into."""
    arguments = enumerate(func._schema.arguments)
    return tuple(at for at, argument in arguments if argument.alias_info is not None and argument.alias_info.is_write)


def _keys(nest: Nest, tensors: Sequence[torch.Tensor]) -> list[int]:
    """The keys of a nest's storages, in the order of its numbers."""
    keys = {at.storage: tensor.untyped_storage()._cdata for tensor, at in zip(tensors, nest.layouts, strict=True)}
    return [keys[index] for index in range(len(keys))]


def watch(
    model: nn.Module,
    blocks: Sequence[Block],
    prepare: Callable[[nn.Module], None],
    steps: Sequence[tuple[Step, Sequence[torch.Tensor]]],
) -> Flow:
    """Runs a step at each of `MICRO_BATCHES`, given with the tensors of its batch, on a model of fake tensors without
    those of its blocks. A block is given to `prepare` before it is run."""
    watched = []
    for step, batch in steps:
        seen = _Watch(prepare, batch)
        seen.name_parameters(model, "")
        with replaced_forwards(blocks, seen.stand_in), seen:
            step.loss(step.forward())
        watched.append(seen)
    names = [EMBEDDING, *watched[0].like, HEAD] if blocks else [HEAD]
    return Flow(
        cuts=tuple(Cut(after=names[at], tensors=n, bytes=size) for at, (n, size) in _sizes(watched, _crossing).items()),
        edges=tuple(
            Edge(
                source=names[made],
                target=names[used],
                kind="chain" if used == made + 1 else "skip",
                tensors=tensors,
                bytes=size,
            )
            for (made, used), (tensors, size) in _sizes(watched, _between).items()
        ),
        like=watched[0].like,
        roles=watched[0].roles,
    )


def _sizes(watched: Sequence[_Watch], measure: Callable[[_Watch], dict[_K, list[int]]]) -> dict[_K, tuple[int, int]]:
    """Tensors and bytes at micro-batch 1 of what two runs measured."""
    two, three = map(measure, watched)
    return {key: (two[key][0], max(0, 2 * two[key][1] - three.get(key, two[key])[1])) for key in sorted(two)}


def _crossing(seen: _Watch) -> dict[int, list[int]]:
    """Tensors and bytes alive after every segment but the last."""
    result = {segment: [0, 0] for segment in range(seen.segment)}
    for value in seen.values:
        for segment in range(value.made, max(value.uses, default=0) if value.carried else 0):
            size = value.bytes_after(segment)
            result[segment][0] += 1
            result[segment][1] += size
    return result


def _between(seen: _Watch) -> dict[tuple[int, int], list[int]]:
    """Tensors and bytes from one segment to another."""
    result: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    for value in seen.values:
        for segment, size in value.uses.items():
            if value.carried and segment > value.made:
                result[value.made, segment][0] += 1
                result[value.made, segment][1] += size
    return result
