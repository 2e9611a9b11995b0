"""Which parameters train with which learning rate and weight decay.

[Note: kinds of parameters]
Parameters of one kind are trained alike. Kind 0 has weight decay and kind 1 has none, both with the optimizer's own
numbers; the group at place g of `train.optimizer.groups` has kind 2 g + 2 for its parameters with weight decay and
2 g + 3 for those without. A parameter belongs to the first group of which a pattern matches one of its names (a tied
parameter has several). It goes without weight decay if it has fewer than two dimensions, or if a pattern of `no_decay`
matches one of its names. Scripts apply the same rule (runtime/groups.py); the tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import OptimizerSpec
from shardwright.schemas.profile import Parameter


class Kind(NamedTuple):
    """The numbers that parameters of one kind are trained with."""

    lr_scale: float
    """Of the scheduled learning rate."""
    weight_decay: float


def kinds(optimizer: OptimizerSpec) -> tuple[Kind, ...]:
    """Every kind that parameters may be of ([Note: kinds of parameters])."""
    numbers = [(1.0, optimizer.weight_decay)]
    for group in optimizer.groups:
        numbers.append((group.lr_scale, optimizer.weight_decay if group.weight_decay is None else group.weight_decay))
    return tuple(Kind(lr_scale, decay) for lr_scale, own in numbers for decay in (own, 0.0))


def kind_of(optimizer: OptimizerSpec, parameter: Parameter) -> int:
    """The kind of a parameter, as an index into `kinds` ([Note: kinds of parameters])."""
    names = (parameter.name, *parameter.also)
    group = next((index for index, each in enumerate(optimizer.groups, 1) if _matches(each.match, names)), 0)
    exempt = len(parameter.shape) < 2 or _matches(_exempting(optimizer), names)
    return 2 * group + exempt


def decays(optimizer: OptimizerSpec) -> bool:
    """Whether any kind has weight decay."""
    return any(kind.weight_decay > 0 for kind in kinds(optimizer))


def check_recipe(optimizer: OptimizerSpec, parameters: Sequence[Parameter]) -> None:
    """Raises InputError for a pattern that matches no parameter, and for what a group says in vain."""
    problems = [*_unmatched(optimizer, parameters), *_in_vain(optimizer, parameters)]
    if problems:
        raise InputError(problems)


def fitting(optimizer: OptimizerSpec, parameters: Sequence[Parameter]) -> OptimizerSpec:
    """The same for a smaller model: without the patterns and groups that have no parameters there."""

    def found(patterns: Iterable[str]) -> tuple[str, ...]:
        return tuple(pattern for pattern in patterns if _used(pattern, parameters))

    present = {kind_of(optimizer, parameter) // 2 for parameter in parameters}
    groups = tuple(
        group.model_copy(update={"match": found(group.match)})
        for index, group in enumerate(optimizer.groups, 1)
        if index in present
    )
    return optimizer.model_copy(update={"no_decay": found(_exempting(optimizer)) or "auto", "groups": groups})


def _exempting(optimizer: OptimizerSpec) -> tuple[str, ...]:
    return () if optimizer.no_decay == "auto" else optimizer.no_decay


def _matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _used(pattern: str, parameters: Iterable[Parameter]) -> bool:
    return any(_matches((pattern,), (parameter.name, *parameter.also)) for parameter in parameters)


def _unmatched(optimizer: OptimizerSpec, parameters: Sequence[Parameter]) -> Iterator[Diagnostic]:
    lists = [("no_decay", _exempting(optimizer))]
    lists += [(f"groups.{place}.match", group.match) for place, group in enumerate(optimizer.groups)]
    names = [name for parameter in parameters for name in (parameter.name, *parameter.also)]
    for key, patterns in lists:
        for place, pattern in enumerate(patterns):
            if not _used(pattern, parameters):
                near = get_close_matches(pattern.strip("*"), names, n=1, cutoff=0.0)
                yield Diagnostic(
                    key=f"train.optimizer.{key}.{place}",
                    message=f"the pattern `{pattern}` matches no parameter of the model",
                    suggestion=f"the nearest name is `{near[0]}`" if near else "",
                )


def _in_vain(optimizer: OptimizerSpec, parameters: Sequence[Parameter]) -> Iterator[Diagnostic]:
    """Groups that earlier ones leave nothing to, and weight decay for parameters that go without."""
    present = {kind_of(optimizer, parameter) for parameter in parameters}
    for place, group in enumerate(optimizer.groups):
        key, kind = f"train.optimizer.groups.{place}", 2 * place + 2
        if not present & {kind, kind + 1}:
            if any(_used(pattern, parameters) for pattern in group.match):
                yield Diagnostic(
                    key=f"{key}.match",
                    message="earlier groups have all parameters that this one matches",
                    suggestion="write it before them: the first group that matches a parameter counts",
                )
        elif group.weight_decay and kind not in present:
            yield Diagnostic(
                key=f"{key}.weight_decay",
                message="no parameter of this group has weight decay",
                suggestion="leave it out: fewer than two dimensions, or a pattern of `no_decay`, exempt all of them",
            )
