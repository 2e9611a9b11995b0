"""Optimizers and what they hold and move, as data.

Measured on torch 2.13 as the bytes of the storages in `optimizer.state` after a step; `tests/planner` repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from shardwright.planner.precisions import MASTER_BYTES
from shardwright.planner.recipe import decays
from shardwright.schemas.job import OptimizerSpec, TrainSpec

OptimizerName = Literal["adamw", "sgd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerTraits:
    """Memory and memory traffic of one optimizer."""

    summary: str
    states: Callable[[OptimizerSpec], int]
    """float32 values kept per parameter element."""
    step_bytes: int
    """Bytes kept per parameter tensor whatever its size: the step counter."""
    fused_on_dtensors: bool
    """Whether `fused=True` works on DTensors; otherwise the script asks for `foreach=True` there. torch 2.13 has no
    sharding strategy for `aten._fused_sgd_`."""
    foreach_copies_gradients: Callable[[OptimizerSpec], bool]
    """Whether the foreach implementation holds a second copy of the gradients while it steps (weight decay added
    out of place: torch 2.13, optim/sgd.py, `_multi_tensor_sgd`)."""

    def state_bytes(self, train: TrainSpec, elements: int, tensors: int) -> int:
        """Bytes kept for `elements` elements in `tensors` parameter tensors, their moving average included."""
        states = self.states(train.optimizer) + _averages(train)
        return MASTER_BYTES * states * elements + self.step_bytes * tensors

    def traffic_bytes(self, train: TrainSpec) -> int:
        """Bytes read and written per parameter element by a step: parameter and states both ways, gradient once; then
        the moving average both ways and the parameter once more."""
        return MASTER_BYTES * (3 + 2 * self.states(train.optimizer) + 3 * _averages(train))


def _averages(train: TrainSpec) -> int:
    """float32 averages kept per parameter element."""
    return 0 if train.ema is None else 1


OPTIMIZERS: Mapping[OptimizerName, OptimizerTraits] = MappingProxyType(
    {
        "adamw": OptimizerTraits(
            summary="AdamW: two moments",
            states=lambda spec: 2,
            step_bytes=4,
            fused_on_dtensors=True,
            foreach_copies_gradients=lambda spec: False,
        ),
        "sgd": OptimizerTraits(
            summary="SGD, with momentum where it is not zero",
            states=lambda spec: 1 if spec.momentum else 0,
            step_bytes=0,
            fused_on_dtensors=False,
            foreach_copies_gradients=decays,
        ),
    }
)
