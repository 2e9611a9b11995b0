"""Bytes that a pipeline's stages keep from forward to backward."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime.pipeline import Pipeline, Step


class _Saved:
    """A tensor that autograd keeps."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Meter:
    """Bytes that are kept for backward and for weight gradients, but for parameters, between two actions."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = {each.untyped_storage().data_ptr() for each in parameters}
        self.saved: weakref.WeakSet[_Saved] = weakref.WeakSet()
        self.kept: dict[int, int] = {}
        """By stage: what the forward of one micro-batch adds."""
        self.held: dict[int, int] = {}
        """And what is left of it between I and W."""
        self.now = self.peak = 0

    def measuring(self) -> AbstractContextManager[None]:
        """What forward saves inside is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self.saved.add(saved)
        return saved

    def after(self, step: Step, pipeline: Pipeline) -> None:
        """Counts what is kept once an action is done."""
        kind, stage, *_ = step
        queued = [each for entries in pipeline._pending.values() for each in entries]
        tensors = [saved.tensor for saved in self.saved]
        tensors += [tensor for each in queued for tensor in (each.input, each.output_gradient) if tensor is not None]
        sizes = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        before, self.now = self.now, sum(size for key, size in sizes.items() if key not in self.parameters)
        self.peak = max(self.peak, self.now)
        if kind == "F":
            self.kept.setdefault(stage, self.now - before)
        elif kind == "I":
            self.held.setdefault(stage, self.kept[stage] + self.now - before)
