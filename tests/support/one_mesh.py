"""A device mesh for one process alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any


class Mesh:
    """Stands for a device mesh, in its first process; the group of an axis is its number, from the fastest on."""

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self.sizes = sizes
        self.mesh_dim_names = tuple(f"dp_{index}" for index in range(len(sizes), 0, -1))

    def get_group(self, name: str) -> int:
        """The number of the axis."""
        return int(name.removeprefix("dp_")) - 1

    def get_local_rank(self, name: str) -> int:
        """Always the first."""
        return 0

    def __getitem__(self, name: str) -> Any:
        return SimpleNamespace(size=lambda: self.sizes[self.get_group(name)])
