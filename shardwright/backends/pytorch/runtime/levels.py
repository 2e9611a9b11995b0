"""The levels of a mesh, and the ways between them.

[Note: levels of a bucket]
The parameters of a unit (a block, or all that lies outside the blocks) lie side by side in one flat buffer, padded so
that every level divides it. The mesh has one axis for each level, `axes[0]` the fastest. A buffer at level j is divided
over the first j axes, the fastest one first, so it holds 1 / (sizes[0] * ... * sizes[j-1]) of the whole. An all-gather
over axis j leads from level j+1 to j, a reduce-scatter back. Parameters rest at level p, gradients accumulate at level
g, and the optimizer works on fp32 values at level o, with p <= o and g <= o; p and g do not depend on each other.
(AMSP, arXiv 2311.00257, section 3, with gradients free between whole and the optimizer's degree.)

[Note: chains]
The way between two levels is a chain of collectives, one an axis. `step` waits for the one in flight and issues the
next, so that several chains under way keep all axes busy. There are no streams here: `wait()` of an asynchronous
collective orders streams on a GPU, and blocks on the CPU.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from math import prod

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .quantize import BLOCK

_ALIGNMENT = 8
"""Elements: every slice starts at a multiple of 16 bytes."""
Sends = Generator[dist.Work, None, None]
"""Issues collectives one after another; each is done when the next is asked for."""


class Levels:
    """The levels of a mesh and the places of the model states on them; see [Note: levels of a bucket].

    `mesh` has its slowest axis first; None: one process, no axes. `parameters`, `gradients`, `optimizer_states` and
    `secondary` are shard degrees: each a product of the sizes of the fastest axes. Raises ValueError for any other,
    where p or g exceed o, and for a name that no axis has.

    Parameters travel as int8 over the axes named in `int8_gathers` when they are gathered for forward and backward (not
    when the optimizer's new values are published, so those at rest stay exact); gradients travel as int4 over those of
    `int4_reductions` and are added up in fp32, axis by axis (qwZ and qgZ of ZeRO++, arXiv 2306.10209, sections 3.1 and
    3.3). Buckets are then aligned to whole blocks.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None,
        *,
        parameters: int,
        gradients: int,
        optimizer_states: int,
        secondary: int | None = None,
        int8_gathers: Collection[str] = (),
        int4_reductions: Collection[str] = (),
    ) -> None:
        names = () if mesh is None else tuple(reversed(mesh.mesh_dim_names or ()))
        self.sizes = () if mesh is None else tuple(mesh[name].size() for name in names)
        self.groups = () if mesh is None else tuple(mesh.get_group(name) for name in names)
        self.ranks = () if mesh is None else tuple(mesh.get_local_rank(name) for name in names)
        self.parameters, self.gradients = self.level(parameters), self.level(gradients)
        self.optimizer_states = self.level(optimizer_states)
        self.secondary = self.parameters if secondary is None else self.level(secondary)
        unknown = {*int8_gathers, *int4_reductions} - set(names)
        if unknown:
            raise ValueError(f"the mesh has the axes {names}, and none of the name {min(unknown)}")
        self.int8_gathers = frozenset(map(names.index, int8_gathers))
        self.int4_reductions = frozenset(map(names.index, int4_reductions))
        self.alignment = BLOCK if self.int8_gathers or self.int4_reductions else _ALIGNMENT
        if max(self.parameters, self.gradients) > self.optimizer_states or self.secondary > self.parameters:
            raise ValueError(
                f"parameters ({parameters}) and gradients ({gradients}) must not be sharded wider than the optimizer "
                f"states ({optimizer_states}), nor the second copy wider than the parameters"
            )

    def level(self, degree: int) -> int:
        """The level whose buffers are divided over so many devices."""
        for level in range(len(self.sizes) + 1):
            if self.degree(level) == degree:
                return level
        raise ValueError(f"a shard degree of {degree} is no product of the first of the levels {self.sizes}")

    def degree(self, level: int) -> int:
        """Devices that a buffer at a level is divided over."""
        return prod(self.sizes[:level])

    @property
    def copies(self) -> int:
        """Processes that have the same part of the optimizer states."""
        return prod(self.sizes[self.optimizer_states :])

    def start(self, numel: int, level: int) -> int:
        """Where this process's part at a level begins in a whole flat buffer of so many elements."""
        begin = 0
        for parts, rank in zip(self.sizes[:level], self.ranks, strict=False):
            numel //= parts
            begin += rank * numel
        return begin

    def slice(self, whole: Tensor, level: int) -> Tensor:
        """This process's part at a level of a whole flat buffer."""
        begin = self.start(whole.numel(), level)
        return whole[begin : begin + whole.numel() // self.degree(level)]


class Chain:
    """Collectives under way between two levels; the first is issued at once."""

    def __init__(self, sends: Sends, hops: int) -> None:
        self._sends, self._left = sends, hops
        self._work: dist.Work | None = None
        self.step()

    @property
    def on_last(self) -> bool:
        """Whether nothing is left to issue."""
        return self._left == 0

    def step(self) -> bool:
        """Waits for the collective in flight and issues the next; false at the end of the chain."""
        if self._work is not None:
            self._work.wait()
        self._work = next(self._sends, None)
        self._left -= 1
        return self._work is not None

    def finish(self) -> None:
        """Goes on to the end."""
        while self.step():
            pass
