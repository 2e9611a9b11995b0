"""Repeated blocks: where they are, and which of them are equal.

[Note: blocks]
A block is an entry of a list of modules (`ModuleList`, `Sequential`, `ModuleDict`) that holds at least two of one
class, each with parameters and children of its own: the outermost such list counts. Two things look inside:

- lists of stages. Entries that are plain lists themselves, or that all differ in their parameters' shapes and each hold
  a list of blocks, are stages (a ResNet's, a U-Net's, a Swin transformer's); the blocks are what they hold.
- blocks that are not called exactly once in a forward, which only a run can tell: they are passed over.

Modules elsewhere in the model are blocks, too, if they are of the class of one (the middle of a U-Net). A model without
any such list may keep its blocks in attributes: those of its children that share a class with another one.

[Note: fingerprint]
Two modules are taken to cost the same when their classes, the shapes, dtypes and trainability of their parameters and
buffers, their plain attributes and their children are equal. Attributes that only number a layer are left out: whether
a forward decides by them is found out by running it ([Note: alike]).
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NUMBERING = frozenset(
    {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "block_id", "block_index", "idx", "index"}
)
"""Names of attributes that number a layer."""
_INTERNALS = frozenset(vars(nn.Module()))
LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of the model."""

    path: str
    module: nn.Module
    fingerprint: str
    """Equal for blocks that are measured once."""
    kind: str
    """Different for blocks that their makers tell apart, also if they cost the same (`kind_of`)."""


Named = tuple[str, nn.Module]


def find_blocks(model: nn.Module, excluded: frozenset[str] = frozenset(), *, share: bool = True) -> tuple[Block, ...]:
    """The blocks of a model in order of registration ([Note: blocks]). Modules whose path is in `excluded` are passed
    over, and searched inside. Without `share` no two blocks have one fingerprint."""
    found = list(_in_lists("", model, excluded))
    if found:
        classes = {type(module) for _, module in found if not isinstance(module, LISTS)}
        found = list(_of_classes("", model, dict(found), classes, excluded))
    elif not excluded:
        found = _attributes(model)
    known: dict[int, Any] = {}
    prints = [fingerprint(module, known) for _, module in found]
    return tuple(
        Block(path, module, print if share else f"{print} {path}", kind_of(module))
        for (path, module), print in zip(found, prints, strict=True)
    )


def _children(path: str, module: nn.Module) -> list[Named]:
    return [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]


def _in_lists(path: str, module: nn.Module, excluded: frozenset[str]) -> Iterator[Named]:
    """The blocks that lie in lists."""
    children = _children(path, module)
    large = [(name, child) for name, child in children if _is_large(child)]
    if not isinstance(module, LISTS) or not _repeats(large) or _are_stages(large):
        for name, child in children:
            yield from _in_lists(name, child, excluded)
        return
    for name, child in large:
        if name in excluded:
            yield from _in_lists(name, child, excluded)
        else:
            yield name, child


def _repeats(entries: list[Named]) -> bool:
    return any(count > 1 for count in Counter(type(module) for _, module in entries).values())


def _are_stages(entries: list[Named]) -> bool:
    inside = [any(_in_lists("", module, frozenset())) for _, module in entries]
    if all(isinstance(module, LISTS) for _, module in entries):
        return any(inside)
    shapes = {str([tuple(p.shape) for p in module.parameters()]) for _, module in entries}
    return all(inside) and len(shapes) == len(entries)


def _of_classes(
    path: str, module: nn.Module, blocks: Mapping[str, nn.Module], classes: set[type], excluded: frozenset[str]
) -> Iterator[Named]:
    """The given blocks, and the modules outside them that are of their classes and hold none of them."""
    inside = f"{path}." if path else ""
    holds = path not in blocks and any(block.startswith(inside) for block in blocks)
    if path in blocks or (type(module) in classes and path not in excluded and not holds):
        yield path, module
        return
    for name, child in _children(path, module):
        yield from _of_classes(name, child, blocks, classes, excluded)


def _attributes(model: nn.Module) -> list[Named]:
    """The blocks of a model without lists."""
    path, module = "", model
    while len(large := [named for named in _children(path, module) if _is_large(named[1])]) == 1:
        ((path, module),) = large
    number = Counter(type(child) for _, child in large if not isinstance(child, LISTS))
    return [(name, child) for name, child in large if number[type(child)] > 1]


def _is_large(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def fingerprint(module: nn.Module, known: dict[int, Any]) -> str:
    """Equal for modules that cost the same ([Note: fingerprint]). `known` remembers the objects described before."""
    return _digest(_describe_module(module, known))


def kind_of(module: nn.Module) -> str:
    """Equal for modules of one make: of the same classes, with the same texts and truth values as attributes, and with
    values of the same types (a sliding window, or None). Numbers alone (a dropout probability, a layer's own number)
    make no kind."""

    def own(part: nn.Module) -> Any:
        return type(part).__qualname__, [
            (name, value if isinstance(value, str | bool) else type(value).__qualname__)
            for name, value in _attributes_of(part)
        ]

    return _digest([own(part) for part in module.modules()])


def _attributes_of(module: nn.Module) -> list[tuple[str, Any]]:
    """What was put on a module besides parameters, buffers and children, without numbers of layers; by name."""
    plain = sorted(name for name in vars(module) if name not in _INTERNALS and name not in NUMBERING)
    return [(name, getattr(module, name)) for name in plain]


def _digest(description: Any) -> str:
    return hashlib.sha256(repr(description).encode()).hexdigest()[:16]


def _describe_module(module: nn.Module, known: dict[int, Any]) -> Any:
    def tensors(named: dict[str, Any]) -> list[Any]:
        return [
            (name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
            for name, tensor in named.items()
            if tensor is not None
        ]

    return (
        f"{type(module).__module__}.{type(module).__qualname__}",
        module.training,
        tensors(module._parameters),
        tensors(module._buffers),
        [(name, _describe(value, known)) for name, value in _attributes_of(module)],
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
