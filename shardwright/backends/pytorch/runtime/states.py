"""Parameters, gradients and optimizer states of one process, each sharded over a number of devices of its own.

The engine moves the buckets of its units between levels (see the notes in `levels.py`). Module hooks drive it in the
order of execution (`shard`, `backward`; see `hooks.py`), or a timetable does, with `take`, `gather`, `wait`, `release`,
`reduce` and `finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .buckets import Bucket, Run
from .gradients import square_over_groups, weighted_square
from .hooks import Hooks
from .levels import Chain, Levels

__all__ = ["Levels", "ShardedStates", "kind_by_shape"]


def kind_by_shape(parameter: nn.Parameter) -> int:
    """0 for matrices, 1 for vectors and scalars, which optimizers usually do not decay."""
    return 0 if parameter.ndim >= 2 else 1


class ShardedStates:
    """The model states of one process.

    `dtype` is that of the parameters in forward and backward; the optimizer works on fp32. `kind_of` numbers the kinds
    of parameters that the optimizer treats alike, see `parameter_groups`. Every process must make the same calls.

    Where processes share one copy of the model: `experts` are the levels of the parameters that `is_expert` finds, over
    the processes that have the same ones; no degree may exceed that of `levels`, and its axes are the slowest of those
    of `levels`. `share_of`: see [Note: shares of the norm] in `shares.py`, without what levels say.
    """

    def __init__(
        self,
        levels: Levels,
        dtype: torch.dtype,
        *,
        reshard_after_forward: bool = True,
        kind_of: Callable[[nn.Parameter], int] = kind_by_shape,
        experts: Levels | None = None,
        is_expert: Callable[[nn.Parameter], bool] | None = None,
        share_of: Callable[[nn.Parameter], float] | None = None,
    ) -> None:
        self.levels, self.dtype, self.kind_of = levels, dtype, kind_of
        self.experts, self.is_expert, self.share_of = experts, is_expert, share_of
        if experts is not None:
            _check_within(experts, levels)
            if is_expert is None or share_of is None:
                raise ValueError("with levels of experts, `is_expert` and `share_of` must be given")
        self.units: list[list[Bucket]] = []
        self.buffers: dict[Tensor, bool] = {}
        """Buffers that only one stage of a pipeline changes, and whether it is one of this process."""
        self._taken: set[nn.Parameter] = set()
        self._reducing: list[Chain] = []
        self._publishing: list[int] = []
        self._hooks = Hooks(self, reshard_after_forward=reshard_after_forward)

    def shard(self, unit: nn.Module, *, root: bool = False) -> None:
        """Takes over the parameters of a unit that no other unit has, to be moved by hooks of the module.

        To be called in order of execution, for the model itself last, with `root`.
        """
        self._hooks.attach(unit, self.take(unit.parameters()), root=root)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward of one micro-batch; after the last one of a step the optimizer's parameters have their gradients."""
        self._hooks.backward(loss, last=last)

    def take(self, parameters: Iterable[nn.Parameter], *, copy: bool = False) -> int:
        """Takes parameters over as one unit and returns its number: they keep their names and become views.

        `copy`: another rank of a pipeline has them, too; it counts them in the norm and writes them into checkpoints.
        """
        own = [parameter for parameter in parameters if parameter not in self._taken]
        self._taken.update(own)
        experts = {each for each in own if self.is_expert is not None and self.is_expert(each)}
        buckets = [
            Bucket(side, levels, self.dtype, self.kind_of, copy=copy)
            for levels, members in ((self.levels, set(own) - experts), (self.experts or self.levels, experts))
            for trains in (True, False)
            if (side := [each for each in own if each in members and each.requires_grad is trains])
        ]
        self.units.append(buckets)
        for bucket in buckets:
            for place in bucket.places if bucket.trainable else ():
                hook = place.parameter.register_post_accumulate_grad_hook
                hook(lambda _, bucket=bucket, place=place: bucket.add(place))  # type: ignore[no-untyped-call]
        return len(self.units) - 1

    def gather(self, unit: int, *, again: bool = False) -> None:
        """Issues the first, or the next, collective of the gather of a unit; `again` in backward."""
        if self.levels.parameters:
            self._arrive(unit)
        for bucket in self.units[unit]:
            bucket.gather(again=again)

    def wait(self, unit: int, *, again: bool = False) -> None:
        """The parameters of a unit are whole when this returns."""
        self._arrive(unit)
        for bucket in self.units[unit]:
            bucket.wait(again=again)

    def release(self, unit: int, *, secondary: bool = False) -> None:
        """Frees the whole parameters of a unit, where they are sharded; `secondary`: keeps the second copy of them."""
        for bucket in self.units[unit]:
            bucket.release(secondary=secondary)

    def reduce(self, unit: int, *, last: bool) -> None:
        """Starts the reduction of the gradients of a unit; exactly one in a step must be the last.

        Those under way go one collective on, so that no more than two of a chain's buffers wait on one axis.
        """
        for bucket in self.units[unit]:
            if bucket.trainable:
                self.advance()
                chain = bucket.reduce(last=last)
                if chain is not None:
                    self._reducing.append(chain)

    def advance(self) -> None:
        """Every reduction under way goes one collective on."""
        self._reducing = [chain for chain in self._reducing if chain.step()]

    def finish(self) -> None:
        """After the last reductions of a step: the optimizer's parameters have their gradients."""
        while self._reducing:
            self.advance()
        for bucket in self._trainable():
            bucket.hand_to_optimizer()

    def publish(self) -> None:
        """After the optimizer's step: sends the new values to where the parameters rest; their next use waits."""
        # The last unit is the model itself, whose own parameters every forward needs first.
        self._publishing = [len(self.units) - 1, *range(len(self.units) - 1)]
        for unit in self._publishing:
            for bucket in self.units[unit]:
                if bucket.trainable:
                    bucket.publish()

    def _arrive(self, unit: int) -> None:
        """Waits for what was published of a unit, while as many units behind it are under way as there are axes."""
        if unit not in self._publishing:
            return
        self._publishing.remove(unit)
        hops = self.levels.optimizer_states - self.levels.parameters
        for due in (unit, *self._publishing[: max(hops - 1, 0)]):
            for bucket in self.units[due]:
                bucket.publish_on()
        for bucket in self.units[unit]:
            bucket.arrive()

    def parameter_groups(self, options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Groups for torch.optim: the options of each kind, and its "params", this process's parts of the fp32 values.

        Processes may differ in the kinds they have parts of; one that has none at all gets an empty group.
        """
        groups: dict[int, list[nn.Parameter]] = {}
        for run in self._runs():
            groups.setdefault(run.kind, []).append(run.parameter)
        return [{**options[kind], "params": groups[kind]} for kind in sorted(groups)] or [{**options[0], "params": []}]

    def parameters(self, unit: int | None = None) -> list[nn.Parameter]:
        """What the optimizer works on, of one unit or of all: this process's parts of the fp32 values."""
        units = self.units if unit is None else [self.units[unit]]
        return [run.parameter for of_unit in units for bucket in of_unit for run in bucket.runs]

    def gradient_norm(self, pipeline: dist.ProcessGroup | None = None) -> Tensor:
        """The L2 norm of the whole gradient, a scalar on the device. `pipeline`: the processes that have its parts.

        With `share_of` it is one sum over all processes.
        """
        if self.share_of is not None:
            square = self.share_of_square()
            dist.all_reduce(square)
            return square.sqrt()
        square = self.gradient_square()
        if pipeline is not None:
            dist.all_reduce(square, group=pipeline)
        return square.sqrt()

    def gradient_square(self) -> Tensor:
        """The square of the norm of what this process and those of the levels' axes have, without copies."""
        counted = [run.parameter for bucket in self._counted() for run in bucket.runs]
        return square_over_groups(counted, self.levels.groups[: self.levels.optimizer_states], self._device())

    def share_of_square(self) -> Tensor:
        """What this process adds to the square of the norm of the whole gradient, without copies; needs `share_of`."""
        assert self.share_of is not None
        counted = [part for bucket in self._counted() for part in bucket.shares(self.share_of)]
        return weighted_square(counted, self._device())

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All parameters are whole inside."""
        for unit in range(len(self.units)):
            self.wait(unit)
        yield
        for unit in range(len(self.units)):
            self.release(unit)

    def _device(self) -> torch.device:
        return next(bucket for unit in self.units for bucket in unit).whole.device

    def _counted(self) -> Iterator[Bucket]:
        return (bucket for bucket in self._trainable() if not bucket.copy)

    def _trainable(self) -> Iterator[Bucket]:
        return (bucket for unit in self.units for bucket in unit if bucket.trainable)

    def _runs(self) -> Iterator[Run]:
        return (run for bucket in self._trainable() for run in bucket.runs)


def _check_within(experts: Levels, levels: Levels) -> None:
    """Raises ValueError where the levels of experts are not what sharing them leaves of the others."""
    rest = len(levels.sizes) - len(experts.sizes)
    if rest < 0 or levels.sizes[rest:] != experts.sizes:
        raise ValueError(f"the axes of the experts, {experts.sizes}, are not the slowest ones of {levels.sizes}")
    for name in ("parameters", "gradients", "optimizer_states", "secondary"):
        expected = max(getattr(levels, name) - rest, 0)
        if getattr(experts, name) != expected:
            raise ValueError(f"the {name} of experts are sharded otherwise than the others' over the same axes")
