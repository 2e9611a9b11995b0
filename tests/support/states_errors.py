"""How far parameters and gradients that travelled in fewer bits are off, as a share of the bound of quantize.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from states_model import build, kind_of, loss_of
from torch import Tensor

from shardwright.backends.pytorch.runtime.buckets import Bucket
from shardwright.backends.pytorch.runtime.quantize import BLOCK
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates

ROUNDING = 1e-6
"""Of sums in fp32, relative to the largest number."""


def half_scales(values: Tensor, bits: int) -> Tensor:
    """The largest error of each element after one message."""
    largest = values.abs().view(*values.shape[:-1], -1, BLOCK).amax(dim=-1)
    return (largest / (2**bits - 2)).repeat_interleave(BLOCK, dim=-1)


def errors(levels: Levels) -> dict[str, Any]:
    """`gathered` and `reduced`: the largest error as a share of the bound; `exact`: whether parameters at rest are."""
    model: Any = build()
    states = ShardedStates(levels, torch.float32, kind_of=kind_of)
    original = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    local: Any = build()
    torch.autograd.backward(loss_of(local, 0, 0, dist.get_rank(), 1))
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in local.named_parameters()
    }
    for block in model.blocks:
        states.shard(block)
    states.shard(model, root=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    buckets = [bucket for unit in states.units for bucket in unit]
    found = {"exact": True, "gathered": 0.0, "reduced": 0.0}
    with states.gathered():
        for bucket in buckets:
            expected = torch.zeros(bucket.padded)
            for place in bucket.places:
                place.view(expected).copy_(original[place.parameter])
            bound = half_scales(expected, 8)
            found["exact"] &= bool(torch.equal(bucket.shard, levels.slice(expected, levels.parameters)))
            found["gathered"] = max(found["gathered"], share((bucket.whole - expected).abs(), bound, expected))
    for bucket in buckets:
        if bucket.trainable:
            mine = torch.zeros(bucket.padded)
            for place in bucket.places:
                place.view(mine).copy_(gradients[names[place.parameter]])
            found["reduced"] = max(found["reduced"], share_of_reduction(bucket, mine))
    return found


def share(error: Tensor, bound: Tensor, values: Tensor) -> float:
    """The largest error as a share of the bound and what fp32 rounds."""
    return float((error / (bound + ROUNDING * values.abs().max())).max())


def share_of_reduction(bucket: Bucket, mine: Tensor) -> float:
    """The error of one reduction of a gradient, against that of the same sums in full, in which all bounds add up."""
    levels = bucket.levels
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    values, bounds = torch.stack(everyone), torch.zeros(len(everyone), bucket.padded)
    for axis, size in enumerate(levels.sizes):
        # The processes of a group are neighbours on their axis: (slower, size, faster, elements).
        faster = levels.degree(axis)
        shape = (-1, size, faster, values.shape[1])
        scattered = axis < levels.optimizer_states
        if scattered and axis in levels.int4_reductions:
            bounds = bounds + half_scales(values.abs() + bounds, 4)
        values, bounds = (each.view(shape).sum(dim=1, keepdim=True).expand(shape) for each in (values, bounds))
        if scattered:
            parts = [each.unflatten(-1, (size, -1)) for each in (values, bounds)]
            # Process `place` of a group keeps part `place`.
            kept = [torch.stack([part[:, place, :, place] for place in range(size)], dim=1) for part in parts]
            values, bounds = (each.reshape(len(everyone), -1) for each in kept)
        else:
            values, bounds = values.reshape(len(everyone), -1), bounds.reshape(len(everyone), -1)
    for place in bucket.places:
        place.parameter.grad = place.view(mine).clone()
        bucket.add(place)
    chain = bucket.reduce(last=True)
    assert chain is not None
    chain.finish()
    assert bucket.reduced is not None
    rank = dist.get_rank()
    result = share((bucket.reduced - values[rank]).abs(), bounds[rank], values[rank])
    bucket.reduced = None
    return result
