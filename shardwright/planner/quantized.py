"""Bytes of a message in fewer bits: blocks of integers with a scale each (ZeRO++, arXiv 2306.10209, section 3.1)."""

from __future__ import annotations

BLOCK = 256
"""Elements that share a scale: `BLOCK` of the runtime's quantize.py."""
SCALE_BYTES = 4


def message_bytes(elements: int, bits: int) -> int:
    """Bytes of a message of so many elements, a whole number of blocks."""
    return elements * bits // 8 + elements // BLOCK * SCALE_BYTES
