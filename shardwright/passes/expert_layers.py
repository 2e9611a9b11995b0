"""Modules that hold the experts of a layer, as they are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shardwright.passes.flow import Flow
from shardwright.schemas.profile import ExpertLayer, Parameter


@contextmanager
def expert_calls(model: nn.Module, flow: Flow) -> Iterator[dict[str, ExpertLayer]]:
    """Fills in, while open, the modules that forward calls with (tokens, indices, weights) and whose parameters are
    stacks of experts."""
    found: dict[str, ExpertLayer] = {}
    handles = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        stacked = [name for name in own if flow.roles.get(f"{path}.{name}") == "experts"]
        if stacked and len(own) == len(list(module.parameters())):
            hook = _watch(path, module, own[stacked[0]].shape[0], found)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _watch(path: str, module: nn.Module, experts: int, found: dict[str, ExpertLayer]) -> Any:
    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alike = all(parameter.shape[0] == experts for parameter in module.parameters())
        if kwargs or len(args) != 3 or not alike or not all(isinstance(each, torch.Tensor) for each in args):
            return
        tokens, indices, weights = args
        counted = tokens.dim() == indices.dim() == 2 and indices.shape == weights.shape
        if counted and len(tokens) == len(indices) and not indices.is_floating_point():
            names = [name for name, value in vars(module).items() if type(value) is int and value == experts]
            found[path] = ExpertLayer(
                path=path,
                experts=experts,
                chosen=indices.shape[1],
                features=tokens.shape[1],
                attributes=tuple(name for name in names if "expert" in name),
            )

    return called


def of_all_blocks(found: dict[str, ExpertLayer], flow: Flow, model: nn.Module) -> tuple[ExpertLayer, ...]:
    """The layers of all blocks, in order of registration: a block has those of the first one that is equal to it."""
    result: dict[str, ExpertLayer] = {}
    for block, first in flow.like.items():
        for path, layer in found.items():
            if path == first or path.startswith(f"{first}."):
                own = block + path.removeprefix(first)
                result[own] = replace(layer, path=own)
    return tuple(result[path] for path, _ in model.named_modules() if path in result)


def with_experts(parameters: Sequence[Parameter], layers: Sequence[ExpertLayer]) -> tuple[Parameter, ...]:
    """The parameters, with how many experts those of expert layers count."""
    experts = {layer.path: layer.experts for layer in layers}
    return tuple(replace(each, experts=experts.get(each.name.rpartition(".")[0], 0)) for each in parameters)
