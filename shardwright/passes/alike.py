"""Whether blocks that look alike run alike.

[Note: alike]
A fingerprint cannot see everything that a forward may decide by: its own number among the layers, a global counter, its
identity. So the forward of blocks is run on fake tensors, and the operators that it calls, with the shapes and
dtypes of their operands and what is saved for backward, are compared with those of the block that stands for it. The
middle and the last block of every kind are always compared. All blocks are if the forward reads an attribute that
numbers layers (of `NUMBERING`), or if one of those two differs. Blocks that run differently are measured by themselves.
What this cannot find out, `model.profile.share: false` does: it measures every block by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from shardwright.passes.blocks import NUMBERING, Block
from shardwright.passes.operators import tensors_in
from shardwright.passes.untyped import DispatchMode

Signature = tuple[Any, ...]


class _Calls(DispatchMode):
    """The operators that run, with the layouts of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Signature] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "prim":  # what asks a tensor for its device is no work, and its answer may be remembered
            operands = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
            self.seen.append((func.name(), *map(_layout, operands)))
        return func(*args, **kwargs)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sees what is saved for backward."""
        self.seen.append(("saved", _layout(tensor)))
        return tensor


def _layout(tensor: torch.Tensor) -> Signature:
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype), tensor.requires_grad


def run_signed(call: Callable[[], Any]) -> tuple[Any, Signature]:
    """What `call` returns, and what it ran ([Note: alike])."""
    calls = _Calls()
    with calls, saved_tensors_hooks(calls.pack, lambda tensor: tensor):
        result = call()
    return result, tuple(calls.seen)


def samples(blocks: Sequence[Block]) -> frozenset[str]:
    """Paths of the middle and the last block of each fingerprint."""
    alike: dict[str, list[str]] = defaultdict(list)
    for block in blocks:
        alike[block.fingerprint].append(block.path)
    return frozenset(path for paths in alike.values() for path in (paths[len(paths) // 2], paths[-1]))


class _Watched:
    """Stands in a class for an attribute of its instances, and notes when it is read."""

    def __init__(self, name: str, reads: set[str]) -> None:
        self.name = name
        self.reads = reads

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None or self.name not in vars(instance):
            raise AttributeError(self.name)
        self.reads.add(self.name)
        return vars(instance)[self.name]

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self.name] = value


@contextmanager
def numbers_read(module: nn.Module) -> Iterator[set[str]]:
    """Fills in, while open, the attributes of a module and its submodules that number layers and are read."""
    reads: set[str] = set()
    places = {(type(each), name) for each in module.modules() for name in NUMBERING & vars(each).keys()}
    places = {(owner, name) for owner, name in places if not hasattr(owner, name)}
    try:
        for owner, name in places:
            setattr(owner, name, _Watched(name, reads))
        yield reads
    finally:
        for owner, name in places:
            delattr(owner, name)
