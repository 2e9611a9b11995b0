"""The emitting halves of the planner's `OPTIMIZERS`, `LR_SCHEDULES` and `PRECISIONS`; code is in `templates/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from shardwright.backends.pytorch.text import assignment
from shardwright.schemas.job import OptimizerSpec, TrainSpec


def _adamw(spec: OptimizerSpec) -> str:
    return "\n".join([assignment("BETAS", spec.betas), assignment("EPSILON", spec.eps), _groups(spec)])


def _sgd(spec: OptimizerSpec) -> str:
    return "\n".join([assignment("MOMENTUM", spec.momentum), _groups(spec)])


def _groups(spec: OptimizerSpec) -> str:
    """Weight decay, and the names of parameters with other numbers, where the job has such."""
    lines = [assignment("WEIGHT_DECAY", spec.weight_decay, "of matrices")]
    if spec.no_decay != "auto":
        lines.append(assignment("NO_DECAY", spec.no_decay, "names of further parameters without weight decay"))
    if spec.groups:
        tables = [group.model_dump(exclude_defaults=True) for group in spec.groups]
        comment = "Parameters with numbers of their own; the first group that matches a name counts."
        lines.append(assignment("PARAMETER_GROUPS", tables, comment, annotation="list[ParameterGroup]"))
    return "\n".join(lines)


def recipe_context(train: TrainSpec) -> dict[str, Any]:
    """What the templates look up of the recipe.

    `own_groups`: arguments of the runtime's `parameter_groups` and `kind_of`, empty where the plain rule (matrices have
    weight decay) does; `scales_lr`: whether a group has a learning rate of its own; `averages`: whether there is a
    moving average.
    """
    spec = train.optimizer
    arguments = ["no_decay=NO_DECAY"] * (spec.no_decay != "auto") + ["groups=PARAMETER_GROUPS"] * bool(spec.groups)
    return {
        "own_groups": ", ".join(arguments),
        "scales_lr": any(group.lr_scale != 1 for group in spec.groups),
        "averages": train.ema is not None,
    }


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

COMPUTE_DTYPES: Mapping[str, str] = MappingProxyType({"fp32": "float32", "bf16_mixed": "bfloat16"})
"""What `ShardedStates` gets: torch's name of the dtype of forward and backward."""
