"""Random numbers that forward draws in Python.

[Note: draws]
A forward that skips a layer now and then by Python's `random` (stochastic depth, LayerDrop) does other work every time.
It is measured with every draw the same, next to one or zero, whichever makes the whole forward run more operators: for
layers that are skipped with some probability that is all of them, so the profile is what a step costs at most.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

LARGEST, SMALLEST = 1 - 2**-53, 0.0
"""The ends of what `random.random()` returns."""


@dataclass(slots=True)
class Draws:
    """What Python's `random` draws while a forward runs."""

    value: float
    first: tuple[str, int, str] | None = None
    """File, line and function that drew first, if any did."""

    def draw(self) -> float:
        """Stands for `random.random`."""
        if self.first is None:
            frame = sys._getframe(1)
            while frame.f_code.co_filename == random.__file__ and frame.f_back is not None:
                frame = frame.f_back
            self.first = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        return self.value


@contextmanager
def drawing(value: float, user_modules: Iterable[ModuleType]) -> Iterator[Draws]:
    """While open, `random.random` and what is made of it (`uniform`, `gauss`, ...) draws this value."""
    draws = Draws(value)
    owner: Any = random.random.__self__  # type: ignore[attr-defined]
    original: Callable[[], float] = random.random
    places: list[tuple[ModuleType, str]] = [
        (module, name)
        for module in (random, *user_modules)
        for name, found in list(vars(module).items())
        if found is original
    ]
    try:
        owner.random = draws.draw
        for module, name in places:
            setattr(module, name, draws.draw)
        yield draws
    finally:
        del owner.random
        for module, name in places:
            setattr(module, name, original)
