"""The emitting halves of the planner's `OPTIMIZERS`, `LR_SCHEDULES` and `PRECISIONS`; code is in `templates/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from shardwright.backends.pytorch.text import assignment
from shardwright.schemas.job import OptimizerSpec


def _adamw(spec: OptimizerSpec) -> str:
    return "\n".join(
        [
            assignment("BETAS", spec.betas),
            assignment("EPSILON", spec.eps),
            assignment("WEIGHT_DECAY", spec.weight_decay, "of matrices"),
        ]
    )


def _sgd(spec: OptimizerSpec) -> str:
    return "\n".join(
        [assignment("MOMENTUM", spec.momentum), assignment("WEIGHT_DECAY", spec.weight_decay, "of matrices")]
    )


OPTIMIZER_CONSTANTS: Mapping[str, Callable[[OptimizerSpec], str]] = MappingProxyType({"adamw": _adamw, "sgd": _sgd})
"""Constants of each optimizer; `templates/optimizers/NAME.py.j2` makes it."""

LR_SCHEDULES = ("constant", "linear", "cosine")
"""Each is a function `learning_rate` in `templates/lr_schedules/NAME.py.j2`."""

PRECISION_POLICIES: Mapping[str, str | None] = MappingProxyType(
    {
        "fp32": None,
        "bf16_mixed": "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)",
    }
)
"""The policy that `fully_shard` gets; None for its own, which leaves every dtype as it is."""
