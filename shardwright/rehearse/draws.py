"""Whether a model draws random numbers in a step: such runs differ between layouts by design and cannot be compared.

[Note: numbers that are no draws]
Where processes share layers, the runtime takes one number of the generator for each region, to seed the process's own
(tensor_random.py), whether the model draws anything there or not. Its scopes are therefore watched: inside, a draw is
what moves the generator from its fresh seed; outside, what leads to a state that no seed and no scope has left.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


class Draws:
    """Watches the CPU's default generator of this process."""

    def __init__(self) -> None:
        self.drawn = False
        self._known = {_key(torch.get_rng_state())}
        """States that no draw has led to."""

    def check(self) -> None:
        """Notes whether the generator has moved since it was seeded, or since what is known."""
        now = torch.get_rng_state()
        seeded = torch.Generator().manual_seed(torch.initial_seed()).get_state()
        self.drawn |= not torch.equal(now, seeded) and _key(now) not in self._known

    def accept(self) -> None:
        """The state that the generator has now is nobody's draw."""
        self._known.add(_key(torch.get_rng_state()))

    def watch(self) -> None:
        """From now on the scopes of the runtime are told from draws, where the script has such."""
        loaded = sys.modules.get("shardwright_runtime.tensor_random")
        if loaded is None:
            return
        scope, draws = loaded._Scope, self
        begin, end = scope.begin, scope.end

        def begun(self: Any, group: Any) -> None:
            if self.saved is None:
                draws.check()
                begin(self, group)
                self.fresh = torch.get_rng_state()

        def ended(self: Any) -> None:
            if self.saved is not None:
                draws.drawn |= not torch.equal(torch.get_rng_state(), self.fresh)
                end(self)
                draws.accept()

        scope.begin, scope.end = begun, ended


def _key(state: Tensor) -> bytes:
    return state.numpy().tobytes()
