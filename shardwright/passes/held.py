"""What linear layers hold while their weight gradients wait.

[Note: held by weight]
Where the gradients of weights are computed later than those of activations, every `nn.Linear` and every `Conv1D` of
Hugging Face keeps its input and the gradient of its output from the one to the other; layers of subclasses, other
layers, and those of which no parameter is trained do not wait. Both tensors are kept as the storages that they lie in:
a storage that several layers of a unit keep counts once, one that two units keep counts in both. A parameter that a
layer takes as its input does not count, nor does the batch. What is recomputed is as large as what it replaces, so
checkpointing changes nothing. Layers of compiled blocks do not wait. What a divided layer keeps are the operands of its
own product: its input once it has entered, and the gradient of what has not left yet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardwright.passes.operators import tensors_in
from shardwright.passes.record import Recorder

_CONV1D = "transformers.pytorch_utils.Conv1D"


def may_wait(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules whose weight gradients can be computed later."""

    def name(module: nn.Module) -> str:
        return f"{type(module).__module__}.{type(module).__name__}"

    return [module for module in modules if type(module) is nn.Linear or name(module) == _CONV1D]


class Held:
    """Storages that layers hold for their weight gradients ([Note: held by weight]), by region."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._uses: dict[int, tuple[str, int | None, int | None]] = {}
        """Of each use that backward reached: region, input, and gradient of the output."""
        self._count = 0

    def forget(self) -> None:
        """Another backward begins."""
        self._uses.clear()

    def bytes(self) -> Mapping[str, int]:
        """Bytes by region."""
        held: dict[str, set[int]] = defaultdict(set)
        for region, *numbers in self._uses.values():
            held[region].update(number for number in numbers if number is not None)
        size = self._recorder.storages.size
        return defaultdict(int, {region: sum(size[at] for at in numbers) for region, numbers in held.items()})

    @contextmanager
    def watching(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Watches the layers' forward while open, and their backward from then on."""
        handles = [layer.register_forward_hook(self._used, prepend=True, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _used(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        trained = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
        if self._recorder.is_paused() or not trained or not output.requires_grad:
            return
        input = next(tensors_in((*args, *kwargs.values())))
        use, region, number = self._count, self._recorder.region(), self._recorder.storages.number(input)
        self._count += 1

        def reached(gradient: torch.Tensor | None) -> None:
            if gradient is not None:
                self._uses.setdefault(use, (region, number, self._recorder.storages.number(gradient)))

        output.register_hook(reached)  # type: ignore[no-untyped-call]
        base = output._base
        if base is not None and base.grad_fn is not None:  # which a change of the output in place leads past the output
            base.grad_fn.register_prehook(lambda gradients: reached(gradients[0]))
