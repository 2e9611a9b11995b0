"""Fewer bits for what travels: blocks of integers with a scale each (ZeRO++, arXiv 2306.10209, sections 3.1 and 3.3).

A block of `BLOCK` elements is divided by its scale, the largest magnitude over 127 (int8) or 7 (int4), and rounded to
the nearest integer, so that each element is off by half a scale at most: |x - q scale| <= scale / 2. Zeros stand for a
block whose scale would be below fp32's normal numbers (1.2e-38). A block with an element that is not finite comes back
without any that is. A message is the integers of its elements, two int4 a byte, and then the fp32 scales, as bytes:
elements * bits / 8 + elements / BLOCK * 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share a scale."""
_LARGEST = {8: 127, 4: 7}


def quantize(values: Tensor, bits: int, messages: int = 1) -> Tensor:
    """Flat values, a multiple of `messages` blocks, as uint8 of shape (messages, bytes); `bits` are 8 or 4."""
    blocks = values.float().view(messages, -1, BLOCK)
    scales = blocks.abs().amax(dim=2, keepdim=True) / _LARGEST[bits]
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)
    integers = (blocks / scales.masked_fill(scales == 0, torch.inf)).round_().to(torch.int8).view(messages, -1)
    if bits == 4:
        integers = (integers[:, ::2] & 15) | (integers[:, 1::2] << 4)
    return torch.cat((integers.view(torch.uint8), scales.view(messages, -1).view(torch.uint8)), dim=1)


def dequantize(messages: Tensor, bits: int) -> Tensor:
    """The fp32 values of uint8 messages of shape (messages, bytes), as (messages, elements)."""
    count, size = messages.shape
    blocks = size // (BLOCK * bits // 8 + 4)
    start = blocks * BLOCK * bits // 8
    numbers = messages[:, :start].contiguous().view(torch.int8)
    if bits == 4:
        # Shifting a signed byte to the left and back extends the sign of its low half.
        numbers = torch.stack((numbers << 4 >> 4, numbers >> 4), dim=2)
    scales = messages[:, start:].contiguous().view(torch.float32)
    return torch.mul(numbers.view(count, blocks, BLOCK), scales.unsqueeze(2)).view(count, -1)
