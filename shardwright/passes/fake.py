"""A model on the meta device, given fake CPU tensors for as long as it is traced.

A fake tensor has shape, strides, dtype, device and a storage with a size, but no memory, so PyTorch's operators, views
and autograd run on it as on a real one. The device is the CPU even for a model planned for a GPU: autograd on fake
CUDA tensors needs a GPU. What a GPU does differently is stated in `kernels.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwright.passes.grouped import correct_grouped_mm

_REGISTRIES = ("_parameters", "_buffers")
_INTERNALS = frozenset((*_REGISTRIES, "_modules"))


def fake_mode() -> FakeTensorMode:
    """A mode in which tensors are fake; real ones that a model keeps in a global are taken in as they are met."""
    correct_grouped_mm()
    return FakeTensorMode(allow_non_fake_inputs=True)


class Twins:
    """Fake CPU twins for the tensors of a meta model, made module by module as they are needed. A tensor reached twice
    (tied weights) has one twin."""

    def __init__(self, model: nn.Module, mode: FakeTensorMode, parameter_dtype: torch.dtype | None) -> None:
        self._mode = mode
        self._parameter_dtype = parameter_dtype
        self._twins: dict[int, torch.Tensor] = {}
        self._done: set[int] = set()
        namespaces = [
            namespace
            for attributes in map(vars, model.modules())
            for namespace in (attributes, *(attributes[name] for name in _REGISTRIES))
        ]
        self._before = [(namespace, dict(namespace)) for namespace in namespaces]

    def put_in(self, module: nn.Module, without: Collection[nn.Module] = ()) -> None:
        """Puts twins into a module and its submodules, but for those in `without`."""
        if module in without or id(module) in self._done:
            return
        self._done.add(id(module))
        attributes = vars(module)
        for registry in (attributes[name] for name in _REGISTRIES):
            registry.update({name: self._twin(tensor) for name, tensor in registry.items()})
        plain = {name: value for name, value in attributes.items() if name not in _INTERNALS}
        attributes.update({name: self._twin(value) for name, value in plain.items()})
        for child in module.children():
            self.put_in(child, without)

    def take_out(self) -> None:
        """Puts the meta tensors, and every attribute, back as they were."""
        for namespace, saved in self._before:
            namespace.clear()
            namespace.update(saved)

    def _twin(self, value: Any) -> Any:
        """Of a tensor, also inside lists, tuples and dictionaries; other values are left alone."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._twins and value.is_meta:
                self._twins[id(value)] = self._make(value)
            return self._twins.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self._twin(item) for item in value)
        if type(value) is dict:
            return {key: self._twin(item) for key, item in value.items()}
        return value

    def _make(self, tensor: torch.Tensor) -> torch.Tensor:
        is_parameter = isinstance(tensor, nn.Parameter)
        cast = self._parameter_dtype if is_parameter and tensor.is_floating_point() else None
        with self._mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=cast or tensor.dtype, device="cpu")
            return nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake


@contextmanager
def faked(
    model: nn.Module, mode: FakeTensorMode, parameter_dtype: torch.dtype | None, without: Collection[nn.Module]
) -> Iterator[Twins]:
    """Gives the tensors of a meta model fake CPU twins for a while, floating-point parameters in `parameter_dtype` if
    it is given ([Note: compute dtype]). The modules in `without` wait until they are asked for."""
    twins = Twins(model, mode, parameter_dtype)
    try:
        twins.put_in(model, without)
        yield twins
    finally:
        twins.take_out()
