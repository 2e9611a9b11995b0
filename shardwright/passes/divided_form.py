"""A model as one of several processes sees it that share every layer: its local form, for as long as it is traced.

The parameters are the local ones, integers that count what is divided are divided, and modules run with phantoms of
the collectives ([Note: phantoms]) around or in place of their forward, where the runtime has the real ones.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwright.passes.blocks import Block
from shardwright.passes.divided_calls import gather, scatter
from shardwright.passes.divided_layers import WRAPPERS, Wrapped
from shardwright.passes.divided_loss import DividedLogits
from shardwright.schemas.profile import ModuleStyle, Parameter

SEQUENCE = 1
"""The dimension of hidden states (batch, sequence, features) that is divided between blocks."""


class NotLocal(Exception):
    """The model has no local form for a degree; the message names the module."""


@dataclass(frozen=True, slots=True)
class LocalForm:
    """Everything that makes a model's local form."""

    degree: int
    """Processes that share every layer; with 1 the model is left as it is."""
    parameters: Sequence[Parameter] = ()
    styles: Sequence[ModuleStyle] = ()
    chain: tuple[str, ...] = ()
    """Paths of the blocks, in order of execution, between which the sequence is divided; empty if it is not."""
    divided: Mapping[str, Parameter] = field(init=False)
    """By every name that a divided parameter has."""

    def __post_init__(self) -> None:
        named = {
            name: parameter
            for parameter in self.parameters
            if parameter.local_shape(self.degree) != parameter.shape
            for name in (parameter.name, *parameter.also)
        }
        object.__setattr__(self, "divided", named)

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """The model in its local form, while open. Raises NotLocal."""
        if self.degree == 1:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(_as_it_was(model))
            self._divide_parameters(model)
            done = set()
            for style in self.styles:
                module = _module(model, style.path)
                if (module, kind := replace(style, path="")) not in done:
                    done.add((module, kind))
                    _divide_attributes(module, style, self.degree)
                    self._wrap(style, module, stack)
            for handle in self._around_chain(model):
                stack.callback(handle.remove)
            with self._divided_logits():
                yield

    @contextmanager
    def _divided_logits(self) -> Iterator[None]:
        """The logits of a head that is divided stay so."""
        for style in self.styles:
            weight = self.divided.get(f"{style.path}.weight".lstrip("."))
            if style.style == "column" and weight and weight.tensor_parallel == "vocabulary":
                dim = weight.tensor_parallel_dim
                with DividedLogits(weight.local_shape(self.degree)[dim], weight.shape[dim]) as logits:
                    yield
                if not logits.losses:
                    raise NotLocal(f"no torch.nn.functional.cross_entropy takes the logits of module {style.path}")
                return
        yield

    def told_apart(self, blocks: Sequence[Block]) -> tuple[Block, ...]:
        """The blocks, of which only those are still equal to each other that have equal styles."""
        inside: dict[str, list[str]] = defaultdict(list)
        paths = {block.path for block in blocks}
        for style in self.styles:
            block = next((prefix for prefix in _prefixes(style.path) if prefix in paths), None)
            if block is not None:
                inside[block].append(repr(replace(style, path=style.path.removeprefix(block))))
        return tuple(replace(b, fingerprint=f"{b.fingerprint} {_digest(inside[b.path])}") for b in blocks)

    def _divide_parameters(self, model: nn.Module) -> None:
        made: dict[str, nn.Parameter] = {}
        for name, parameter in self.divided.items():
            _check(parameter, self.degree)
            path, _, own = name.rpartition(".")
            before = _module(model, path)._parameters[own]
            assert before is not None
            if parameter.name not in made:
                local = torch.empty(parameter.local_shape(self.degree), dtype=before.dtype, device=before.device)
                made[parameter.name] = nn.Parameter(local, before.requires_grad)
            _module(model, path)._parameters[own] = made[parameter.name]

    def _wrap(self, style: ModuleStyle, module: nn.Module, stack: ExitStack) -> None:
        prefix = f"{style.path}." if style.path else ""
        own = {name: self.divided.get(prefix + name) for name in module._parameters}
        for handle in WRAPPERS[style.style](Wrapped(module, style, self.degree, own)):
            stack.callback(handle.remove)

    def _around_chain(self, model: nn.Module) -> Iterator[Any]:
        """Hidden states are whole outside of the chain."""
        if not self.chain:
            return
        first, last = _module(model, self.chain[0]), _module(model, self.chain[-1])
        yield first.register_forward_pre_hook(lambda _, *given: _states(given, scatter, self.degree), with_kwargs=True)
        yield last.register_forward_hook(lambda _, __, output: _states(output, gather, self.degree))


def _states(values: Any, function: Callable[[torch.Tensor, int, int], torch.Tensor], degree: int) -> Any:
    """What goes into or comes out of a block, with a function applied to its hidden states: the first floating-point
    tensor of three dimensions."""
    leaves, structure = tree_flatten(values)
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() == 3:
            leaves[at] = function(leaf, SEQUENCE, degree)
            return tree_unflatten(leaves, structure)
    raise NotLocal("no hidden states (batch, sequence, features) go into or come out of the chain of blocks")


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise NotLocal(f"the model has no module {path}") from error


def _check(parameter: Parameter, degree: int) -> None:
    """Rows that several processes had would be added up more than once; columns may be on several."""
    units, role = parameter.tensor_parallel_units, parameter.tensor_parallel
    if role != "vocabulary" and units % degree and (role == "row" or degree % units):
        raise NotLocal(f"{units} heads or features of {parameter.name} cannot be divided among {degree} processes")


def _divide_attributes(module: nn.Module, style: ModuleStyle, degree: int) -> None:
    for name in style.attributes:
        whole = getattr(module, name)
        if not isinstance(whole, int) or (whole > degree and whole % degree):
            raise NotLocal(f"{name} of module {style.path} is {whole!r}, no multiple of {degree}")
        setattr(module, name, max(1, whole // degree))


def _prefixes(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _digest(styles: Sequence[str]) -> str:
    return hashlib.sha256("".join(styles).encode()).hexdigest()[:16]


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts parameters and attributes of all modules back afterwards."""
    namespaces = [space for module in model.modules() for space in (vars(module), module._parameters)]
    before = [(space, dict(space)) for space in namespaces]
    try:
        yield
    finally:
        for space, content in before:
            space.clear()
            space.update(content)


WHOLE = LocalForm(1)
"""The model as it is."""
