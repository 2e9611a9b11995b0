"""An optimizer's step that does not wait for the norm of the gradient.

[Note: late steps]
Clipping needs the norm over all ranks of a pipeline: the first rank, done early, would wait for the last one, which
began later, and the time that a schedule without bubbles has saved would be lost between the steps. So every rank
starts the sum of the squares, keeps its values, states and gradients, and steps as if nothing were to be clipped. Where
the sum turns out to ask for it, all ranks put the kept values back, step again with clipped gradients, and begin the
pass that they are in anew (Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 4; there the sum
travels from rank to rank, and the update is inverted, which is not exact). The outcome is that of waiting, to the bit.
A step done twice costs more than waiting, and gradients that are clipped come in rows: after one, a step does wait.

[Note: head of a pass]
The sum is asked for before the first backward of the next pass. A backward needs the forward of the last stage, so all
ranks are done with the step before, or the backward would have to wait just as long. But a rank may have begun to
receive what the other side has not sent when that asks, and would then receive the wrong message after a new begin: the
head of a rank's program ends before its first backward, and before the first receive of what is not sent in a head.
What is sent in a head and received behind one is received and dropped before a new begin. All this depends on the
programs alone, so the ranks need not agree on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .messages import Message
from .pipeline import Step
from .states import ShardedStates


class Head(NamedTuple):
    """See [Note: head of a pass]."""

    steps: int
    """Of a rank's program."""
    under_way: tuple[Step, ...]
    """Its receives behind the head of what others send in theirs."""


def heads(programs: Sequence[Sequence[Step]]) -> list[Head]:
    """Of all ranks' programs, each the longest there is."""
    found = [program[: _first(program, lambda step: step[0] in ("I", "B"))] for program in programs]
    while True:
        sent = {_message(step) for steps in found for step in steps if step[0].startswith("SEND")}
        shorter = [steps[: _first(steps, partial(_lacks, sent))] for steps in found]
        if shorter == found:
            break
        found = shorter
    return [
        Head(len(head), tuple(each for each in program[len(head) :] if _message(each) in sent))
        for program, head in zip(programs, found, strict=True)
    ]


def _first(steps: Sequence[Step], condition: Callable[[Step], bool]) -> int:
    return next((at for at, step in enumerate(steps) if condition(step)), len(steps))


def _lacks(sent: Collection[Message | None], step: Step) -> bool:
    """Whether a step receives what is not sent."""
    return step[0].startswith("RECV") and _message(step) not in sent


def _message(step: Step) -> Message | None:
    """What a step sends or receives; None for others."""
    kind, stage, micro_batch, peer = step
    if kind.startswith("SEND"):
        return kind[-1], stage, peer, micro_batch
    return (kind[-1], peer, stage, micro_batch) if kind.startswith("RECV") else None


class LateSum:
    """The sum of a number over the processes of a group (without one, the number), to be read later."""

    def __init__(self, number: Tensor, group: dist.ProcessGroup | None) -> None:
        self._sum, self._arrived = number.detach().clone(), None
        self._work = None if group is None else dist.all_reduce(self._sum, group=group, async_op=True)
        if number.is_cuda:
            # Through a stream of its own it is on the host when it is there, whatever has been launched since.
            stream = torch.cuda.Stream(number.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(number.device))
            with torch.cuda.stream(stream):
                if self._work is not None:
                    self._work.wait()
                self._device_sum = self._sum  # which the copy still reads
                self._sum = torch.empty_like(self._sum, device="cpu", pin_memory=True)
                self._sum.copy_(self._device_sum, non_blocking=True)
                self._arrived = stream.record_event()

    def read(self) -> Tensor:
        """The sum, on the host; waits until it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        elif self._work is not None:
            self._work.wait()
            self._work = None
        return self._sum


@dataclass(frozen=True)
class Kept:
    """What the optimizer starts from, to start from it again."""

    values: list[Tensor]
    """Copies of the parameters."""
    gradients: list[Tensor | None]
    """Not copied: the next step has others."""
    state: dict[Any, Any]
    """A copy of the optimizer's."""
    options: list[dict[str, Any]]
    """Of its groups: the learning rate above all, which the next step changes before the verdict."""

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> Kept:
        """Of an optimizer whose gradients are there."""
        parameters = _parameters(optimizer)
        return cls(
            [parameter.detach().clone() for parameter in parameters],
            [parameter.grad for parameter in parameters],
            {key: _copied(value) for key, value in optimizer.state.items()},
            _options(optimizer),
        )

    @torch.no_grad()
    def put_back(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has everything as it was; to be called once, for it takes the copies of the states."""
        for parameter, value, gradient in zip(_parameters(optimizer), self.values, self.gradients, strict=True):
            parameter.copy_(value)
            parameter.grad = gradient
        optimizer.state.clear()
        optimizer.state.update(self.state)
        _set_options(optimizer, self.options)


def kept_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the copies of an optimizer's parameters and states take; the first step has no states yet.

    The gradients, as large as the parameters, take no more memory, but are not free before the next pass' backward.
    """
    tensors = [*_parameters(optimizer), *_tensors(list(optimizer.state.values()))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class LateStep:
    """The steps of an optimizer of `ShardedStates`; see [Note: late steps].

    `head`: of this rank's program, with which its `Pipeline` takes part. `group`: all processes, so that they find the
    same, in a group of its own (`dist.new_group()`): on another one NCCL may make all that comes behind wait. None for
    one process. `max_norm`: gradients are clipped to it; None: they are not, nothing is kept, and the norm is only
    there to be read. `update`: what a step does, unless it is `optimizer.step` alone; it must leave the gradients as
    they are. Every process must make the same calls.
    """

    def __init__(
        self,
        states: ShardedStates,
        optimizer: torch.optim.Optimizer,
        *,
        head: Head,
        group: dist.ProcessGroup | None,
        max_norm: float | None,
        update: Callable[[], Any] | None = None,
    ) -> None:
        self.states, self.optimizer, self.head, self.group, self.max_norm = states, optimizer, head, group, max_norm
        self.update = optimizer.step if update is None else update
        self.redone = 0
        """Steps that were done twice."""
        self._clips = False
        """Whether the last gradient that is known was clipped."""
        self._square: LateSum | None = None
        self._kept: Kept | None = None

    @property
    def norm(self) -> Tensor:
        """Of the whole gradient of the last step, before it was clipped, on the host; waits for it.

        Raises RuntimeError before the first step.
        """
        if self._square is None:
            raise RuntimeError("there has been no step yet, so there is no norm")
        return self._square.read().sqrt()

    def step(self) -> None:
        """After all passes of a step: updates the parameters and publishes them, before it is known whether to clip.

        Raises RuntimeError if the step before is not settled, by a pass or by `settle`; and where `update` writes into
        the gradients, which would then be wrong the second time.
        """
        if self._kept is not None:
            raise RuntimeError("the step before this one may still have to be done again: no pass has settled it")
        self._square = LateSum(self._own_square(), self.group)
        if self._clips:
            self._clips = self._coefficient() != 1.0
            self._clip_and_update()
            return
        if self.max_norm is not None:
            self._kept = Kept.of(self.optimizer)
        gradients = [each.grad for each in _parameters(self.optimizer) if each.grad is not None]
        versions = [gradient._version for gradient in gradients]
        self.update()
        if versions != [gradient._version for gradient in gradients]:
            raise RuntimeError("this optimizer writes into the gradients, so its steps cannot be done again")
        self.states.publish()

    def failed(self) -> bool:
        """Whether the last step must be done again; waits until it is known, and if not, lets go of what was kept."""
        if self._kept is None:
            return False
        self._clips = self._coefficient() != 1.0
        if not self._clips:
            self._kept = None
        return self._clips

    def redo(self) -> None:
        """Does a step that failed again, with clipped gradients. Nobody may be using parameters."""
        kept, self._kept = self._kept, None
        assert kept is not None
        for unit in self.states.units:
            for bucket in unit:
                bucket.arrive()  # what was published may still be read from where the kept values go
        options = _options(self.optimizer)
        kept.put_back(self.optimizer)
        self._clip_and_update()
        _set_options(self.optimizer, options)
        self.redone += 1

    def settle(self) -> None:
        """Does the last step again if it must be: before anything but a pass uses what it made."""
        if self.failed():
            self.redo()

    def _coefficient(self) -> float:
        """The very number that gradients are multiplied with: at 1 clipping changes nothing, at NaN it does."""
        assert self.max_norm is not None
        return float(torch.clamp(self.max_norm / (self.norm + 1e-6), max=1.0))

    def _clip_and_update(self) -> None:
        assert self.max_norm is not None
        nn.utils.clip_grads_with_norm_(_parameters(self.optimizer), self.max_norm, self.norm)
        self.update()
        self.states.publish()

    def _own_square(self) -> Tensor:
        """The square of the norm of this rank's stages; 0 but for one of the processes that have the same ones.

        Where processes share one copy of the model, what this one adds to it.
        """
        if self.states.share_of is not None:
            return self.states.share_of_square()
        # These processes are done at the same time, so this keeps nobody waiting. It is the order of sums of
        # `gradient_norm`, and other than a share of each, zeros do not round.
        square = self.states.gradient_square()
        return torch.zeros_like(square) if any(self.states.levels.ranks) else square


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: _copied(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def _set_options(optimizer: torch.optim.Optimizer, options: Sequence[dict[str, Any]]) -> None:
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def _copied(value: Any) -> Any:
    """A state with tensors of its own; whatever is neither a tensor nor holds any is immutable in an optimizer."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value


def _tensors(value: Any) -> list[Tensor]:
    """All within a state."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inside for tensor in _tensors(each)]
