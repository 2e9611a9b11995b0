"""What a pending W holds of what F keeps, counted in bytes on blocks of a transformer: the default of `schedule`."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime.deferred import WeightQueue, defer_weight_gradients
from shardwright.cli.schedule import HELD_BY_WEIGHT

HIDDEN, HEADS = 96, 3


class Block(nn.Module):
    """Attention and MLP, each after a normalisation: as GPT has them, or gated as Llama does."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        wide = 8 * HIDDEN // 3 if gated else 4 * HIDDEN
        self.first, self.second = (nn.RMSNorm(HIDDEN) if gated else nn.LayerNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, wide), nn.Linear(wide, HIDDEN)
        self.gate = nn.Linear(HIDDEN, wide) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = self.qkv(self.first(x)).chunk(3, -1)
        heads = (each.view(batch, length, HEADS, -1).transpose(1, 2) for each in split)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, HIDDEN))
        y = self.second(x)
        wide = F.gelu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.down(wide)


def distinct_bytes(tensors: Iterable[Tensor], besides: set[int]) -> int:
    """Of all storages, each once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(size for place, size in storages.items() if place not in besides)


@pytest.mark.parametrize(
    ("gated", "dtype", "share"),
    [
        (False, torch.float32, HELD_BY_WEIGHT),
        (False, torch.bfloat16, HELD_BY_WEIGHT),
        (True, torch.float32, 0.77),
        (True, torch.bfloat16, 0.65),
    ],
)
def test_a_pending_w_holds_inputs_and_output_gradients(gated: bool, dtype: torch.dtype, share: float) -> None:
    blocks = nn.Sequential(*(Block(gated) for _ in range(3))).to(dtype)
    queue = WeightQueue()
    defer_weight_gradients(blocks, queue)
    weights = {each.untyped_storage().data_ptr() for each in blocks.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    x = torch.randn(2, 64, HIDDEN, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = blocks(x)
    kept = distinct_bytes(saved, weights)
    with queue.deferring() as deferred:
        torch.autograd.backward(y, torch.randn_like(y))
    queued = [each for use in deferred for each in (use.input, use.output_gradient) if each is not None]
    assert distinct_bytes(queued, weights) / kept == pytest.approx(share, abs=0.015)
