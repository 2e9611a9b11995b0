"""Learning-rate schedules: their factor as a function of the step. They cost nothing that a plan decides on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import cos, pi
from types import MappingProxyType
from typing import Literal

LrScheduleName = Literal["constant", "linear", "cosine"]

LR_SCHEDULES: Mapping[LrScheduleName, Callable[[float, float], float]] = MappingProxyType(
    {
        "constant": lambda progress, final: 1.0,
        "linear": lambda progress, final: 1.0 + (final - 1.0) * progress,
        "cosine": lambda progress, final: final + (1.0 - final) * (1.0 + cos(pi * progress)) / 2.0,
    }
)
"""Factor of the base learning rate after the warm-up, from `progress` (0 at its end, 1 at the last step) and
`final_ratio`."""
