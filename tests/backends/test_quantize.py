"""Blocks of integers with a scale: what comes back, and how many bytes travel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.backends.pytorch.runtime.quantize import BLOCK, dequantize, quantize
from shardwright.planner.quantized import message_bytes

LARGEST = {8: 127, 4: 7}


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    messages=st.integers(1, 3),
    blocks=st.integers(1, 3),
    magnitudes=st.lists(st.floats(-30, 30), min_size=9, max_size=9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_off_by_half_a_scale_at_most(
    bits: int, messages: int, blocks: int, magnitudes: list[float], dtype: torch.dtype, seed: int
) -> None:
    noise = torch.randn(messages * blocks, BLOCK, generator=torch.Generator().manual_seed(seed))
    values = (noise * torch.tensor(magnitudes[: messages * blocks]).exp().unsqueeze(1)).to(dtype)
    sent = quantize(values.flatten(), bits, messages)
    assert sent.dtype == torch.uint8
    assert sent.shape == (messages, message_bytes(blocks * BLOCK, bits))
    back = dequantize(sent, bits).view(-1, BLOCK)
    scale = values.float().abs().amax(dim=1, keepdim=True) / LARGEST[bits]
    assert ((back - values.float()).abs() <= scale / 2 * (1 + 1e-5)).all()
    assert torch.equal(back.abs().amax(dim=1) > 0, scale.squeeze(1) > 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_multiples_of_the_scale_come_back_exactly(bits: int) -> None:
    largest = LARGEST[bits]
    values = torch.arange(BLOCK).remainder(2 * largest + 1).sub(largest) * 0.25
    assert torch.equal(dequantize(quantize(values, bits), bits)[0], values)
    assert torch.equal(dequantize(quantize(values * 0, bits), bits)[0], values * 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows(bits: int, odd: float) -> None:
    """A gradient that overflowed must not look like a small one; other blocks keep their values."""
    values = torch.ones(2 * BLOCK)
    values[3] = odd
    first, second = dequantize(quantize(values, bits), bits).view(2, BLOCK)
    assert not first.isfinite().any()
    assert torch.equal(second, torch.ones(BLOCK))
