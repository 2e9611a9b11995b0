"""What the processes of `states_worker.py` must find: by training in one process, and by the planner's formulas."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.planner.flat import ALIGNMENT, Bucket, Chain, at_rest, buckets, step_sends
from shardwright.planner.quantized import BLOCK
from shardwright.schemas.profile import Parameter
from support.states_model import (
    ACCUMULATION,
    CLIP,
    KINDS,
    OPTIMIZERS,
    STEPS,
    Block,
    Model,
    build,
    kind_of,
    loss_of,
)

BOUNDS = {"sgd": 2e-6, "adamw": 1e-4}
"""Largest difference of a parameter in fp32, by the order of sums. AdamW divides small gradients by their own size."""


def layouts(*meshes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, int, int], int | None]]:
    """All legal (sizes, degrees of parameters, gradients and optimizer states, degree of the second copy)."""
    for sizes in meshes:
        degrees = [prod(sizes[:level]) for level in range(len(sizes) + 1)]
        for p, g, o in itertools.product(degrees, repeat=3):
            if max(p, g) <= o:
                yield sizes, (p, g, o), None
                yield from ((sizes, (p, g, o), second) for second in degrees[1:] if second < p)


def run(
    sizes: tuple[int, ...], degrees: tuple[int, int, int], second: int | None = None, **changes: Any
) -> dict[str, Any]:
    """A run as `states_worker.py` takes it."""
    base = {"optimizer": "sgd", "dtype": "float32", "reshard": True, "recomputed": False, "clips": True} | changes
    name = " ".join(map(str, (sizes, degrees, second, *base.values())))
    return {"name": name, "sizes": sizes, "degrees": [*degrees, second], **base}


@functools.cache
def train_plainly(
    optimizer_name: str, world: int, features: tuple[str, ...] | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters and gradient norms of one process that trains on every batch."""
    model = build(features=features)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, norms = OPTIMIZERS[optimizer_name](groups_of({each: each for each in trained})), []
    for step in range(STEPS):
        for micro, rank in itertools.product(range(ACCUMULATION), range(world)):
            torch.autograd.backward(loss_of(model, step, micro, rank, world))
        for parameter in trained:  # what no batch uses has a gradient of zero, so that it decays as the others do
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(nn.utils.clip_grad_norm_(trained, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}, norms


def groups_of(values: dict[nn.Parameter, nn.Parameter]) -> list[dict[str, Any]]:
    """The groups of `KINDS` of what the optimizer works on, by the parameters that they stand for."""
    return [
        {**options, "params": [value for parameter, value in values.items() if kind_of(parameter) == kind]}
        for kind, options in enumerate(KINDS)
    ]


def difference(found: dict[str, list[float]], expected: dict[str, Tensor]) -> float:
    """Largest difference of a parameter."""
    pairs = [(torch.tensor(found[name]), value.double().flatten()) for name, value in expected.items()]
    return max(float((one - other).abs().max()) for one, other in pairs)


class CastBlock(nn.Module):
    """A block that casts its inputs, as the engine does."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, scale: Tensor, uses: bool) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.block(x.bfloat16(), scale.bfloat16(), uses)
        return result


def train_in_bf16(sizes: tuple[int, ...], gradients: int) -> dict[str, Tensor]:
    """One process that computes with bf16 parameters, keeps fp32 ones, and adds gradients up in the engine's order.

    `gradients` is their shard degree. `sizes` must be pairs, whose sum does not depend on its order.
    """
    model = build()
    names = dict(model.named_parameters())
    master = {name: nn.Parameter(value.detach().clone()) for name, value in names.items()}
    model.bfloat16()
    model.blocks = nn.ModuleList(CastBlock(block) for block in model.blocks)  # type: ignore[union-attr, arg-type]
    trained = [name for name, value in names.items() if value.requires_grad]
    optimizer = OPTIMIZERS["sgd"](groups_of({names[name]: master[name] for name in trained}))
    inner = next(level for level in range(len(sizes) + 1) if prod(sizes[:level]) == gradients)
    for step in range(STEPS):
        sums: list[dict[str, Tensor]] = []
        for micro in range(ACCUMULATION):
            each = [_gradients(model, names, trained, (step, micro, rank, prod(sizes))) for rank in range(prod(sizes))]
            each = _add_up(each, sizes[:inner])
            sums = each if not sums else [_add(one, other) for one, other in zip(each, sums, strict=True)]
        (total,) = _add_up(sums, sizes[inner:])
        for name in trained:
            master[name].grad = total[name]
        optimizer.step()
        with torch.no_grad():
            for name in trained:
                names[name].copy_(master[name])
    return {name: value.detach() for name, value in names.items()}


def _gradients(
    model: nn.Module, names: dict[str, nn.Parameter], trained: list[str], where: tuple[int, int, int, int]
) -> dict[str, Tensor]:
    torch.autograd.backward(loss_of(model, *where))
    found = {}
    for name in trained:
        gradient = names[name].grad
        found[name] = torch.zeros_like(names[name]).float() if gradient is None else gradient.float()
        names[name].grad = None
    return found


def _add(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one[name] + other[name] for name in one}


def _add_up(each: list[dict[str, Tensor]], sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    for size in sizes:
        assert size == 2
        each = [_add(each[index], each[index + 1]) for index in range(0, len(each), 2)]
    return each


def planned_groups(layout: Chain, alignment: int = ALIGNMENT) -> list[tuple[Bucket, ...]]:
    """The planner's buckets of `Model`: each block's, and the root's."""
    model, groups = Model(), []
    blocks = [set(block.parameters()) for block in model.blocks]
    outside = set(model.parameters()) - set().union(*blocks)
    for members in (*blocks, outside):
        of_group = [
            Parameter(name=name, shape=tuple(value.shape), trainable=value.requires_grad, unit=-1)
            for name, value in model.named_parameters()
            if value in members
        ]
        groups.append(buckets(of_group, replace(layout, alignment=alignment)))
    return groups


def layout_of(case: dict[str, Any]) -> Chain:
    """The planner's chain with the axes of the case's mesh."""
    p, g, o, second = case["degrees"]
    ends = [prod(case["sizes"][:level]) for level in range(len(case["sizes"]) + 1)]
    return Chain(tuple(case["sizes"]), ends.index(p), ends.index(g), ends.index(o), ends.index(second or p))


def planned_bytes(case: dict[str, Any], rank: int) -> dict[str, int]:
    """Bytes of each state at rest in a process."""
    layout, element = layout_of(case), 4 if case["dtype"] == "float32" else 2
    found = at_rest(layout, planned_groups(layout), element, rank)
    return {
        "parameters": found.parameters,
        "gathered": 0,
        "master": found.master,
        "gradients": found.gradients,
        "optimizer_states": {"sgd": 4, "adamw": 8}[case["optimizer"]] * found.own,
    }


def planned_calls(case: dict[str, Any]) -> dict[str, int]:
    """Collectives of a step by kind, size of the group and bytes of the whole tensor."""
    layout = layout_of(case)
    narrow = {
        key: tuple(int(name[3:]) - 1 for name in case.get(key, ())) for key in ("int8_gathers", "int4_reductions")
    }
    sends = step_sends(
        layout,
        planned_groups(layout, BLOCK if any(narrow.values()) else ALIGNMENT),
        element=4 if case["dtype"] == "float32" else 2,
        accumulation=ACCUMULATION,
        kept=not case["reshard"],
        **narrow,
    )
    expected: dict[str, int] = {}
    for send, count in sends.items():
        key = f"{send.kind} {layout.sizes[send.axis]} {send.bytes}"
        expected[key] = expected.get(key, 0) + count
    return expected
