"""Repeated blocks: where they are, and which of them are equal.

[Note: fingerprint]
Two modules are taken to cost the same when their classes, the shapes, dtypes and trainability of their parameters and
buffers, their plain attributes and their children are equal. Attributes that only number a layer are left out. A
module whose forward asks for its own number would therefore be mistaken for its neighbour; models state such
differences by attributes or children of their own (sliding windows, expert layers), which are seen.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_NUMBERING = frozenset(
    {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "block_id", "block_index", "idx", "index"}
)
_INTERNALS = frozenset(vars(nn.Module()))
_CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of the model."""

    path: str
    container: str
    """Path of the list that holds it."""
    module: nn.Module
    fingerprint: str


def find_blocks(model: nn.Module, excluded: frozenset[str] = frozenset()) -> tuple[Block, ...]:
    """The blocks of a model in order of registration: entries of the outermost `ModuleList`s and `Sequential`s that
    hold at least two of one class, each with parameters and children of its own. Containers whose path is in
    `excluded` are passed over, and searched inside."""
    known: dict[int, Any] = {}
    return tuple(
        Block(path, container, module, fingerprint(module, known))
        for container, path, module in _entries(model, "", excluded)
    )


def _entries(module: nn.Module, path: str, excluded: frozenset[str]) -> Iterator[tuple[str, str, nn.Module]]:
    named = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    if isinstance(module, _CONTAINERS) and path not in excluded:
        large = [(name, child) for name, child in named if _is_large(child)]
        classes = [type(child) for _, child in large]
        if len(set(classes)) < len(classes):
            yield from ((path, name, child) for name, child in large)
            return
    for name, child in named:
        yield from _entries(child, name, excluded)


def _is_large(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def fingerprint(module: nn.Module, known: dict[int, Any]) -> str:
    """Equal for modules that cost the same ([Note: fingerprint]). `known` remembers the objects described before."""
    return _digest(_describe_module(module, known))


def _digest(description: Any) -> str:
    return hashlib.sha256(repr(description).encode()).hexdigest()[:16]


def _describe_module(module: nn.Module, known: dict[int, Any]) -> Any:
    def tensors(named: dict[str, Any]) -> list[Any]:
        return [
            (name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
            for name, tensor in named.items()
            if tensor is not None
        ]

    plain = sorted(name for name in vars(module) if name not in _INTERNALS and name not in _NUMBERING)
    return (
        f"{type(module).__module__}.{type(module).__qualname__}",
        module.training,
        tensors(module._parameters),
        tensors(module._buffers),
        [(name, _describe(getattr(module, name), known)) for name in plain],
        [(name, _describe_module(child, known)) for name, child in module._modules.items() if child is not None],
    )


def _describe(value: Any, known: dict[int, Any]) -> Any:
    """Plain values by their text, tensors by their shape, everything else by its content, described once."""
    if isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | type(None)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype)
    if id(value) not in known:
        known[id(value)] = ("cycle", value)
        known[id(value)] = (_digest(_describe_content(value, known)), value)
    return known[id(value)][0]


def _describe_content(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, list | tuple):
        return type(value).__qualname__, [_describe(item, known) for item in value]
    if isinstance(value, set | frozenset):
        return type(value).__qualname__, sorted(repr(item) for item in value)
    if isinstance(value, dict):
        return [(repr(key), _describe(item, known)) for key, item in value.items()]
    if isinstance(value, nn.Module):
        return _describe_module(value, known)
    if isinstance(value, functools.partial):
        return _describe((value.func, value.args, value.keywords), known)
    if isinstance(value, types.FunctionType):
        captured = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, value.__code__.co_code, _describe(captured, known)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    slots = {name: getattr(value, name, None) for name in getattr(type(value), "__slots__", ())}
    attributes = slots | getattr(value, "__dict__", {})
    return type(value).__qualname__, [(name, _describe(item, known)) for name, item in sorted(attributes.items())]
