"""Runs this process's part of a pipeline: a program of steps, each of which is one method.

[Note: programs]
A program is a list of (kind, stage, micro-batch, peer). F, I, W and B are forward, gradient of the inputs, gradient of
the weights ([Note: deferred weight gradients] in `deferred.py`), and both in one. SEND and RECV move activations (_F)
or their gradients (_I) between a stage and its peer. GATHER, RELEASE and REDUCE move the parameters and gradients of a
stage between data-parallel processes. All ranks' programs come out of one order of all steps, so that every pair of
ranks issues its messages in the same order, and nobody waits for what comes later; this module keeps that order.

[Note: what a pending micro-batch holds]
From F to I, what autograd saved, and the inputs; of the outputs only their place in the graph. From I to W the queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .deferred import Deferred, WeightQueue, compute
from .messages import Messages, Wire

Step = tuple[str, int, int, int]
"""Kind, stage, micro-batch, and the peer's stage; see [Note: programs]."""
EVALUATES = frozenset({"F", "SEND_F", "RECV_F", "RELEASE"})
"""Steps of an evaluation. What is not gathered ahead is gathered when it is needed."""


class Tie(NamedTuple):
    """Copies of parameters on several ranks: their gradients are summed at the end of a step."""

    parameters: Sequence[nn.Parameter]
    """Whose `.grad` the optimizer reads, in the same order on every rank of the group."""
    group: dist.ProcessGroup


class States(Protocol):
    """The states of the model: `ShardedStates` or `Replicas`, of which a unit is what `take` returned."""

    def gather(self, unit: int) -> None:
        """Issues the gather of a unit's parameters."""

    def wait(self, unit: int) -> None:
        """The parameters are whole when this returns."""

    def release(self, unit: int) -> None:
        """Frees what was gathered."""

    def reduce(self, unit: int, *, last: bool) -> None:
        """Starts the reduction of a unit's gradients; exactly one in a step is the last."""

    def finish(self) -> None:
        """Waits for the reductions."""


class Late(Protocol):
    """The steps of an optimizer that may have to be done again: `LateStep`, see the notes in `late.py`."""

    @property
    def head(self) -> tuple[int, Sequence[Step]]:
        """How many steps of the program run before that is known; the later receives of what others sent by then."""

    def failed(self) -> bool:
        """Whether the last step must be done again."""

    def redo(self) -> None:
        """Does it again."""

    def settle(self) -> None:
        """Does it again if it must be."""


_Saved = tuple[list[tuple[Tensor, ...]], list[GradientEdge | None]]
"""What a stage received, and the places in the graph of what it sent."""


class Pipeline:
    """The stages of one process.

    `stages`: those of this rank by number. Each is called with a micro-batch and, for each stage that it receives from,
    in their order, a tuple of tensors; it returns a tuple of such tuples, one for each stage that it sends to, in their
    order. What the last one returns goes through `loss(output, micro_batch)`, a scalar already divided as the sum over
    micro-batches (and data-parallel processes) asks for. `ranks`: of every stage, its rank in `group` (without one, of
    all processes). `wires`: of any two stages between which tensors go, which ones. `units`: the units of `states` that
    each stage uses; several may use one. `seed(stage, micro_batch)`: of the random numbers of one forward, which
    then do not depend on the order of steps. `observe` is called after each step.
    `late`: the optimizer steps before it is known whether it may, and a pass begins anew if it had to step again.
    """

    def __init__(
        self,
        program: Sequence[Step],
        stages: Mapping[int, Callable[..., Any]],
        *,
        ranks: Sequence[int],
        wires: Mapping[tuple[int, int], Sequence[Wire]],
        loss: Callable[[Any, Any], Tensor],
        queue: WeightQueue,
        states: States,
        units: Mapping[int, Sequence[int]],
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        ties: Sequence[Tie] = (),
        seed: Callable[[int, int], int] | None = None,
        observe: Callable[[Step], None] | None = None,
        late: Late | None = None,
    ) -> None:
        self.program, self.stages, self.wires, self.loss = program, stages, wires, loss
        self.queue, self.states, self.units, self.ties = queue, states, units, ties
        self.seed, self.observe, self.late = seed, observe, late
        self.messages = Messages(wires, ranks, group, device)
        self.last = len(ranks) - 1
        self.micro_batches = 1 + max((micro_batch for _, _, micro_batch, _ in program), default=-1)
        self.before = {stage: sorted(source for source, target in wires if target == stage) for stage in stages}
        self.after = {stage: sorted(target for source, target in wires if source == stage) for stage in stages}
        self.actions: dict[str, Callable[[int, int, int], None]] = {
            "F": self._forward,
            "I": self._input_gradient,
            "W": self._weight_gradient,
            "B": self._backward,
            "SEND_F": lambda stage, micro_batch, peer: self.messages.send(("F", stage, peer, micro_batch)),
            "SEND_I": lambda stage, micro_batch, peer: self.messages.send(("I", stage, peer, micro_batch)),
            "RECV_F": lambda stage, micro_batch, peer: self.messages.receive(("F", peer, stage, micro_batch)),
            "RECV_I": lambda stage, micro_batch, peer: self.messages.receive(("I", peer, stage, micro_batch)),
            "GATHER": lambda stage, *_: self._each_unit(self.states.gather, stage),
            "RELEASE": lambda stage, *_: self._each_unit(self.states.release, stage),
            "REDUCE": lambda stage, *_: self._reduce(stage),
        }
        self._reductions = Counter(unit for kind, stage, *_ in program if kind == "REDUCE" for unit in units[stage])
        """Of each unit in a pass, by all stages that use it."""
        self._reduced: Counter[int] = Counter()
        """And so far in this one."""
        self._batches: Sequence[Any] = ()
        self._last_pass = True
        self._saved: dict[tuple[int, int], _Saved] = {}
        """Inputs and outputs of a stage and micro-batch from F to I."""
        self._pending: dict[tuple[int, int], list[Deferred]] = {}
        """From I to W."""
        self._losses: dict[int, Tensor] = {}

    def step(self, batches: Sequence[Any], *, last: bool = True) -> Tensor | None:
        """Forward and backward of all micro-batches; afterwards what the optimizer works on has its gradients.

        Returns the sum of the losses on the last stage's rank. `last=False`: more passes follow before the optimizer's
        step, and their gradients are added. Raises ValueError for another number of micro-batches than the program's,
        RuntimeError if that leaves anything undone.
        """
        self._last_pass = last
        self._reduced.clear()
        self._run(self.program, batches)
        if last:
            self.states.finish()
            self._tie()
        return self._total()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any]) -> Tensor | None:
        """Forward of some micro-batches, no more than the program has; returns what `step` does."""
        if self.late is not None:
            self.late.settle()
        steps = [step for step in self.program if step[0] in EVALUATES and step[2] < len(batches)]
        self._run(steps, batches)
        return self._total()

    def _run(self, program: Sequence[Step], batches: Sequence[Any]) -> None:
        if len(batches) > self.micro_batches or (torch.is_grad_enabled() and len(batches) < self.micro_batches):
            raise ValueError(f"the program is for {self.micro_batches} micro-batches, and {len(batches)} were given")
        self._batches = batches
        done = self._begin(self.late) if self.late is not None and torch.is_grad_enabled() else 0
        self._do(program[done:])
        self.messages.finish()
        left = [*self.messages.left, *(("F", *key) for key in self._saved), *(("I", *key) for key in self._pending)]
        if left:
            raise RuntimeError(f"the program never uses what these made: {left[:4]}")

    def _begin(self, late: Late) -> int:
        """Runs the head of the program, again if its parameters were wrong; returns how many steps that are."""
        end, under_way = late.head
        head = self.program[:end]
        self._do(head)
        if late.failed():
            self._forget(head, under_way)
            late.redo()
            self._do(head)
        return end

    def _forget(self, head: Sequence[Step], under_way: Sequence[Step]) -> None:
        """Drops all that a head has made, here and where messages are under way from; nothing is gathered any more."""
        self._do(under_way)
        for message in self.messages.left:
            self.messages.take(message)
        self.messages.finish()
        gathers = Counter[int]()
        for kind, stage, *_ in head:
            gathers[stage] += (kind == "GATHER") - (kind == "RELEASE")
        for stage in sorted(+gathers):
            self._each_unit(self.states.wait, stage)
            self._each_unit(self.states.release, stage)
        self._saved.clear()
        self._losses.clear()

    def _do(self, steps: Iterable[Step]) -> None:
        for step in steps:
            kind, stage, micro_batch, peer = step
            try:
                self.actions[kind](stage, micro_batch, peer)
            except Exception as error:
                error.add_note(f"in step {kind} of stage {stage} for micro-batch {micro_batch}")
                raise
            if self.observe is not None:
                self.observe(step)

    def _forward(self, stage: int, micro_batch: int, _: int) -> None:
        self._each_unit(self.states.wait, stage)
        trains = torch.is_grad_enabled()
        received = [self.messages.take(("F", source, stage, micro_batch)) for source in self.before[stage]]
        for message in received:
            for tensor in message:
                tensor.requires_grad_(trains and (tensor.is_floating_point() or tensor.is_complex()))
        if self.seed is not None:
            torch.manual_seed(self.seed(stage, micro_batch))
        batch = self._batches[micro_batch]
        output = self.stages[stage](batch, *received)
        if stage == self.last:
            loss = self.loss(output, batch)
            self._losses[micro_batch] = loss.detach()
            output = ((loss,),)
        if trains:
            places = [get_gradient_edge(each) if each.requires_grad else None for made in output for each in made]
            self._saved[stage, micro_batch] = (received, places)
        for target, made in zip(self.after[stage], output, strict=stage != self.last):
            self.messages.put(("F", stage, target, micro_batch), (tensor.detach() for tensor in made))

    def _backward(self, stage: int, micro_batch: int, _: int) -> None:
        self._each_unit(self.states.wait, stage)
        received, places = self._saved.pop((stage, micro_batch))
        gradients = self._output_gradients(stage, micro_batch)
        roots = [
            (place, each)
            for place, each in zip(places, gradients, strict=True)
            if place is not None and each is not None
        ]
        if roots:
            torch.autograd.backward([place for place, _ in roots], [each for _, each in roots])
        for source, tensors in zip(self.before[stage], received, strict=True):
            found = (_gradient(tensor) for tensor in tensors if tensor.requires_grad)
            self.messages.put(("I", stage, source, micro_batch), found)

    def _output_gradients(self, stage: int, micro_batch: int) -> list[Tensor | None]:
        """Of all tensors that a stage has sent, or of the loss; None for those without."""
        if stage == self.last:
            return [torch.ones_like(self._losses[micro_batch])]
        found: list[Tensor | None] = []
        for target in self.after[stage]:
            gradients = iter(self.messages.take(("I", target, stage, micro_batch)))
            found += [next(gradients) if wire.has_gradient else None for wire in self.wires[stage, target]]
        return found

    def _input_gradient(self, stage: int, micro_batch: int, peer: int) -> None:
        with self.queue.deferring() as deferred:
            self._backward(stage, micro_batch, peer)
        self._pending[stage, micro_batch] = deferred

    def _weight_gradient(self, stage: int, micro_batch: int, _: int) -> None:
        compute(self._pending.pop((stage, micro_batch)))

    def _each_unit(self, action: Callable[[int], None], stage: int) -> None:
        for unit in self.units[stage]:
            action(unit)

    def _reduce(self, stage: int) -> None:
        """A unit of several stages is last reduced when the last of them is."""
        for unit in self.units[stage]:
            self._reduced[unit] += 1
            last = self._last_pass and self._reduced[unit] == self._reductions[unit]
            self.states.reduce(unit, last=last)

    def _tie(self) -> None:
        # It comes last on all ranks: their programs differ, and whoever waited for it earlier might wait for a rank
        # that waits for what this one has still to send.
        for parameters, group in self.ties:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=group)

    def _total(self) -> Tensor | None:
        """Of the losses, in the order of the micro-batches."""
        losses = [self._losses[micro_batch] for micro_batch in sorted(self._losses)]
        self._losses.clear()
        return torch.stack(losses).sum() if losses else None


def _gradient(received: Tensor) -> Tensor:
    return torch.zeros_like(received) if received.grad is None else received.grad
