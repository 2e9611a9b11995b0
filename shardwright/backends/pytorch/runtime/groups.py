"""Learning rates and weight decays of parameters by their names.

[Note: kinds of parameters]
Parameters of one kind are trained alike. Kind 0 has weight decay and kind 1 has none, both with the optimizer's own
numbers; the group at place g of the list has kind 2 g + 2 for its parameters with weight decay and 2 g + 3 for those
without. A parameter belongs to the first group of which a pattern matches one of its names (a tied parameter has
several). It goes without weight decay if it has fewer than two dimensions, or if a pattern of `no_decay` matches one of
its names. Patterns are those of `fnmatch`: `*` also crosses dots, and case matters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Required, TypedDict

from torch import nn


class ParameterGroup(TypedDict, total=False):
    """Parameters with numbers of their own; what is left out is as for all others."""

    match: Required[str | Sequence[str]]
    """Patterns over names, or a single one."""
    lr_scale: float
    """Their learning rate, as a multiple of the scheduled one."""
    weight_decay: float
    """Of those that have weight decay."""


def parameter_groups(
    model: nn.Module, weight_decay: float, *, no_decay: str | Sequence[str] = (), groups: Sequence[ParameterGroup] = ()
) -> list[dict[str, Any]]:
    """The model's trainable parameters as `torch.optim` takes them, one group a kind that occurs.

    Each group has its `weight_decay`, and `lr_scale` for the loop to multiply the scheduled learning rate by.
    """
    kind = kind_of(model, no_decay=no_decay, groups=groups)
    members: dict[int, list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            members[kind(parameter)].append(parameter)
    options = kind_options(weight_decay, groups)
    return [{"params": members[number], **options[number]} for number in sorted(members)]


def kind_options(weight_decay: float, groups: Sequence[ParameterGroup] = ()) -> list[dict[str, float]]:
    """What the optimizer's group of each kind holds ([Note: kinds of parameters])."""
    numbers = [(1.0, weight_decay)]
    numbers += [(group.get("lr_scale", 1.0), group.get("weight_decay", weight_decay)) for group in groups]
    return [{"lr_scale": scale, "weight_decay": decay} for scale, own in numbers for decay in (own, 0.0)]


def kind_of(
    model: nn.Module, *, no_decay: str | Sequence[str] = (), groups: Sequence[ParameterGroup] = ()
) -> Callable[[nn.Parameter], int]:
    """A function that gives the kind of each of the model's parameters ([Note: kinds of parameters]).

    It may be called while the model is still being initialised, which replaces parameters.
    """
    names: dict[nn.Parameter, list[str]] = {}

    def kind(parameter: nn.Parameter) -> int:
        if parameter not in names:
            names.clear()
            for name, each in model.named_parameters(remove_duplicate=False):
                names.setdefault(each, []).append(name)
        own = names[parameter]
        group = next((index for index, each in enumerate(groups, 1) if _matches(each["match"], own)), 0)
        return 2 * group + (parameter.ndim < 2 or _matches(no_decay, own))

    return kind


def _matches(patterns: str | Iterable[str], names: Iterable[str]) -> bool:
    several = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in several for name in names)
