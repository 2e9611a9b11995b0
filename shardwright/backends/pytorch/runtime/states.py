"""Parameters, gradients and optimizer states, each sharded over a number of devices of its own.

The space is that of AMSP (arXiv 2311.00257, section 3), with gradients free between whole and the optimizer's degree.

[Note: levels of a bucket]
The parameters of a unit (a block, or all that lies outside the blocks) lie side by side in one flat buffer, padded so
that every level divides it. The mesh has one axis for each level, `axes[0]` the fastest. A buffer at level j is divided
over the first j axes, the fastest one first, so it holds 1 / (sizes[0] * ... * sizes[j-1]) of the whole. An all-gather
over axis j leads from level j to j-1, a reduce-scatter back. Parameters rest at level p, gradients accumulate at level
g, and the optimizer works on fp32 values at level o, with p <= o and g <= o; p and g do not depend on each other.

[Note: order of collectives]
All processes issue the same collectives in the same order, whatever parameters a batch happens to use: a unit is
gathered when the unit before it starts, and reduced when the gradient reaches the unit before it, not when its own
gradients are complete. A chain of collectives goes one step further each time another one is issued, so that no chain
waits for a transfer that has just begun. There are no streams here: `wait()` of an asynchronous collective orders
streams on a GPU, and blocks on the CPU.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves, tree_map

_Chain = Generator[None, None, None]
_ALIGNMENT = 8
"""Elements: every slice starts at a multiple of 16 bytes."""


class Levels:
    """The levels of a mesh and the places of the model states on them; see [Note: levels of a bucket].

    `mesh` has its slowest axis first. `parameters`, `gradients`, `optimizer_states` and `secondary` are shard degrees:
    each a product of the sizes of the fastest axes. Raises ValueError for any other, or where p or g exceed o.
    """

    def __init__(
        self, mesh: DeviceMesh, *, parameters: int, gradients: int, optimizer_states: int, secondary: int | None = None
    ) -> None:
        names = tuple(reversed(mesh.mesh_dim_names or ()))
        self.sizes = tuple(mesh[name].size() for name in names)
        self.groups = tuple(mesh.get_group(name) for name in names)
        self.ranks = tuple(mesh.get_local_rank(name) for name in names)
        self.parameters, self.gradients = self.level(parameters), self.level(gradients)
        self.optimizer_states = self.level(optimizer_states)
        self.secondary = self.parameters if secondary is None else self.level(secondary)
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


@dataclass(frozen=True, slots=True)
class Run:
    """A part of this process's fp32 values whose parameters the optimizer treats alike."""

    start: int
    """In the master."""
    parameter: nn.Parameter
    """A view of the master, for the optimizer."""
    decays: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter lies in the bucket's whole buffer."""

    parameter: nn.Parameter
    start: int
    shape: torch.Size

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's part of a whole buffer."""
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)


class Bucket:
    """The trainable (or the frozen) parameters of one unit."""

    def __init__(self, parameters: Sequence[nn.Parameter], levels: Levels, dtype: torch.dtype) -> None:
        self.levels, self.dtype = levels, dtype
        self.trainable = parameters[0].requires_grad
        # Parameters that the optimizer treats alike lie side by side, so that each kind is one run of any slice.
        self.places, end = [], 0
        for parameter in sorted(parameters, key=lambda each: each.ndim < 2):
            self.places.append(Place(parameter, end, parameter.shape))
            end += parameter.numel()
        rest = self.levels.optimizer_states if self.trainable else self.levels.parameters
        self.numel, quantum = end, levels.degree(rest) * _ALIGNMENT
        self.padded = -(-end // quantum) * quantum
        start = torch.zeros(self.padded, dtype=torch.float32, device=parameters[0].device)
        for place in self.places:
            place.view(start).copy_(place.parameter.detach())
        self.whole = start.to(dtype)
        for place in self.places:
            place.parameter.data = place.view(self.whole)
        here = levels.slice(self.whole, levels.parameters)
        self.shard = here if levels.parameters == 0 else here.clone()
        self.secondary: Tensor | None = None
        if self.trainable:
            self.master = self._master(start)
            self.runs = tuple(self._runs())
        self.is_whole = True
        self.gradient: Tensor | None = None
        self.reduced: Tensor | None = None
        self._gathering: _Chain | None = None
        self._publishing: _Chain | None = None
        self.release()

    def _master(self, start: Tensor) -> Tensor:
        """In fp32 the parameters themselves, else a copy made of the values before they were rounded."""
        levels = self.levels
        if self.dtype != torch.float32:
            return levels.slice(start, levels.optimizer_states).clone()
        begin = levels.start(self.padded, levels.optimizer_states) - levels.start(self.padded, levels.parameters)
        return self.shard[begin : begin + self.padded // levels.degree(levels.optimizer_states)]

    def _runs(self) -> Iterator[Run]:
        """The master's part with weight decay and that without, where it has them."""
        begin = self.levels.start(self.padded, self.levels.optimizer_states)
        boundary = next((place.start for place in self.places if len(place.shape) < 2), self.numel)
        for first, last, decays in ((0, boundary, True), (boundary, self.numel, False)):
            low, high = max(first - begin, 0), min(last - begin, self.master.numel())
            if low < high:
                yield Run(low, nn.Parameter(self.master[low:high]), decays)

    def gather(self, *, again: bool = False) -> None:
        """Issue the gather of the whole parameters, unless they are here or on their way.

        `again`: for backward, from the second copy where there is one.
        """
        self._finish_publishing()
        if self.is_whole or self._gathering is not None:
            return
        self.whole.untyped_storage().resize_(self.padded * self.dtype.itemsize)
        source, level = self.shard, self.levels.parameters
        if again and self.secondary is not None:
            source, level = self.secondary, self.levels.secondary
        self._gathering = self._all_gather(source, level, 0, self.whole)
        next(self._gathering, None)

    def wait(self, *, again: bool = False) -> None:
        """The parameters are whole when this returns."""
        self.gather(again=again)
        if self._gathering is not None:
            for _ in self._gathering:
                pass
            self._gathering, self.is_whole = None, True
        if again:
            self.secondary = None

    def release(self) -> None:
        """Frees the whole parameters, where they are sharded."""
        if self.levels.parameters and self.is_whole:
            self.whole.untyped_storage().resize_(0)
            self.is_whole = False

    def keep_secondary(self) -> None:
        """Keeps a second, wider slice of the parameters from forward to backward (hpZ of ZeRO++, arXiv 2306.10209)."""
        if self.levels.secondary < self.levels.parameters:
            self.secondary = self.levels.slice(self.whole, self.levels.secondary).clone()

    def _all_gather(self, part: Tensor, level: int, to: int, out: Tensor) -> _Chain:
        for axis in range(level - 1, to - 1, -1):
            target = out if axis == to else part.new_empty(part.numel() * self.levels.sizes[axis])
            work = dist.all_gather_single(target, part, group=self.levels.groups[axis], async_op=True)
            yield
            work.wait()
            part = target

    def add(self, place: Place) -> None:
        """Adds a parameter's gradient to the bucket's, in fp32."""
        if self.gradient is None:
            self.gradient = torch.zeros(self.padded, dtype=torch.float32, device=self.whole.device)
        assert place.parameter.grad is not None
        place.view(self.gradient).add_(place.parameter.grad)
        place.parameter.grad = None

    def reduce(self, *, last: bool) -> _Chain:
        """Sums the gradient of a micro-batch up to level g; the last time on to level o and over all copies."""
        levels = self.levels
        if levels.gradients == 0 and not last:
            return
        part, self.gradient = self.gradient, None
        if part is None:
            part = torch.zeros(self.padded, dtype=torch.float32, device=self.whole.device)
        for axis in range(levels.gradients):
            part = yield from self._reduce_scatter(part, axis)
        if self.reduced is not None:
            part.add_(self.reduced)
        self.reduced = part
        if not last:
            return
        for axis in range(levels.gradients, levels.optimizer_states):
            part = yield from self._reduce_scatter(part, axis)
            self.reduced = part
        for group in levels.groups[levels.optimizer_states :]:
            work = dist.all_reduce(part, group=group, async_op=True)
            yield
            work.wait()

    def _reduce_scatter(self, part: Tensor, axis: int) -> Generator[None, None, Tensor]:
        out = part.new_empty(part.numel() // self.levels.sizes[axis])
        work = dist.reduce_scatter_single(out, part, group=self.levels.groups[axis], async_op=True)
        yield
        work.wait()
        return out

    def hand_to_optimizer(self) -> None:
        """The reduced gradient becomes that of the optimizer's parameters."""
        assert self.reduced is not None
        for run in self.runs:
            run.parameter.grad = self.reduced[run.start : run.start + run.parameter.numel()]
        self.reduced = None

    def publish(self) -> None:
        """Issues the gather of the updated values from level o to level p; the next use waits for it."""
        levels, source = self.levels, self.master.detach().to(self.dtype)
        if levels.optimizer_states == levels.parameters:
            self.shard.copy_(source)  # in fp32 the same memory
            return
        self._publishing = self._all_gather(source, levels.optimizer_states, levels.parameters, self.shard)
        next(self._publishing, None)

    def _finish_publishing(self) -> None:
        if self._publishing is not None:
            for _ in self._publishing:
                pass
            self._publishing = None


class ShardedStates:
    """The model states of one process. Units are handed over with `shard`, in order of execution, the model last."""

    def __init__(self, levels: Levels, dtype: torch.dtype, *, reshard_after_forward: bool = True) -> None:
        self.levels, self.dtype, self.reshard = levels, dtype, reshard_after_forward
        self.units: list[list[Bucket]] = []
        self._taken: set[nn.Parameter] = set()
        self._in_flight: list[_Chain] = []
        self._running: int | None = None
        self._last = True

    def shard(self, unit: nn.Module, *, root: bool = False) -> None:
        """Takes the parameters of a unit over that no other unit has: they keep their names and become views."""
        own = [parameter for parameter in unit.parameters() if parameter not in self._taken]
        self._taken.update(own)
        kinds = [[parameter for parameter in own if parameter.requires_grad is trains] for trains in (True, False)]
        buckets = [Bucket(kind, self.levels, self.dtype) for kind in kinds if kind]
        index = len(self.units)
        self.units.append(buckets)
        for bucket in buckets:
            if bucket.trainable:
                for place in bucket.places:
                    hook = place.parameter.register_post_accumulate_grad_hook
                    hook(lambda _, bucket=bucket, place=place: bucket.add(place))  # type: ignore[no-untyped-call]
        if root:
            unit.register_forward_pre_hook(lambda _, a, k: self._before_model(a, k), with_kwargs=True)
            unit.register_forward_hook(lambda *_: self._after_model())
        else:
            unit.register_forward_pre_hook(lambda _, a, k: self._before_forward(index, a, k), with_kwargs=True)
            unit.register_forward_hook(lambda _, __, output: self._after_forward(index, output))

    def _cast(self, values: Any) -> Any:
        if self.dtype == torch.float32:
            return values
        return tree_map(lambda v: v.to(self.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)

    def _before_model(self, args: Any, kwargs: Any) -> Any:
        self._wait(len(self.units) - 1)
        self._gather(0)
        return self._cast((args, kwargs))

    def _after_model(self) -> None:
        if not torch.is_grad_enabled():
            self._release(len(self.units) - 1)

    def _before_forward(self, index: int, args: Any, kwargs: Any) -> Any:
        self._wait(index)
        if index + 1 < len(self.units) - 1:
            self._gather(index + 1)
        return self._cast((args, kwargs))

    def _after_forward(self, index: int, output: Any) -> None:
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda _: self._before_backward(index))  # type: ignore[no-untyped-call]
        if self.reshard or not torch.is_grad_enabled():
            if torch.is_grad_enabled():
                for bucket in self.units[index]:
                    bucket.keep_secondary()
            self._release(index)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward of one micro-batch; after the last one of a step the optimizer's parameters have their gradients."""
        self._last, self._running = last, None
        torch.autograd.backward(loss)
        if self._running is not None:
            self._after_backward(self._running)
        self._after_backward(len(self.units) - 1)
        if last:
            while self._in_flight:
                self._advance()
            for bucket in self._trainable():
                bucket.hand_to_optimizer()

    def _before_backward(self, index: int) -> None:
        if self._running == index:
            return
        before, self._running = self._running, index
        if before is not None:
            self._release_after_backward(before)
        self._wait(index, again=True)
        if index:
            self._gather(index - 1, again=True)
        if before is not None:
            self._reduce(before)

    def _after_backward(self, index: int) -> None:
        self._release_after_backward(index)
        self._reduce(index)

    def _release_after_backward(self, index: int) -> None:
        if self.reshard or self._last:
            self._release(index)

    def _reduce(self, index: int) -> None:
        for bucket in self.units[index]:
            if bucket.trainable:
                self._advance()
                chain = bucket.reduce(last=self._last)
                if next(chain, self) is not self:
                    self._in_flight.append(chain)

    def _advance(self) -> None:
        self._in_flight = [chain for chain in self._in_flight if next(chain, self) is not self]

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for torch.optim: with weight decay, and without (parameters of fewer than two dimensions)."""
        runs = [run for bucket in self._trainable() for run in bucket.runs]
        with_decay = [run.parameter for run in runs if run.decays]
        without = [run.parameter for run in runs if not run.decays]
        groups = [{"params": with_decay, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer works on: this process's parts of the fp32 values."""
        return [run.parameter for bucket in self._trainable() for run in bucket.runs]

    def gradient_norm(self) -> Tensor:
        """The L2 norm of the whole gradient, a scalar on the device."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        device = self.units[0][0].whole.device
        total = torch.nn.utils.get_total_norm(gradients).to(device).square()
        for group in self.levels.groups[: self.levels.optimizer_states]:
            dist.all_reduce(total, group=group)
        return total.sqrt()

    def publish(self) -> None:
        """After the optimizer's step: sends the new values to where the parameters rest."""
        for bucket in self._trainable():
            for run in bucket.runs:
                run.parameter.grad = None
            bucket.publish()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All parameters are whole inside."""
        for index in range(len(self.units)):
            self._wait(index)
        yield
        for index in range(len(self.units)):
            self._release(index)

    def _trainable(self) -> Iterator[Bucket]:
        return (bucket for unit in self.units for bucket in unit if bucket.trainable)

    def _gather(self, index: int, *, again: bool = False) -> None:
        for bucket in self.units[index]:
            bucket.gather(again=again)

    def _wait(self, index: int, *, again: bool = False) -> None:
        for bucket in self.units[index]:
            bucket.wait(again=again)

    def _release(self, index: int) -> None:
        for bucket in self.units[index]:
            bucket.release()
