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

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .deferred import Deferred, WeightQueue, compute

Step = tuple[str, int, int, int]
"""Kind, stage, micro-batch, and the peer's stage; see [Note: programs]."""
Value = tuple[str, int, int, int]
"""Activations (F) or gradients (I), from a stage, to a stage, of a micro-batch."""
EVALUATES = frozenset({"F", "SEND_F", "RECV_F", "RELEASE"})
"""Steps of an evaluation. What is not gathered ahead is gathered when it is needed."""
IN_FLIGHT = 4
"""Sends that are not waited for. Waiting for older ones bounds what they hold, also where the host runs ahead of a GPU;
it cannot deadlock, for their receives come before whatever follows here."""


class Wire(NamedTuple):
    """What one stage sends to another for each micro-batch; the gradient that comes back is alike."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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


class _Arriving(NamedTuple):
    """A value that is being received."""

    buffer: Tensor
    work: dist.Work


class Pipeline:
    """The stages of one process.

    `stages`: those of this rank by number. Each is called with a micro-batch and what it receives, in the order of the
    stages that this comes from; it returns a tensor, or a tuple of one tensor for each stage that it sends to, in their
    order. What the last one returns goes through `loss(output, micro_batch)`, a scalar already divided as the sum over
    micro-batches (and data-parallel processes) asks for. `ranks`: of every stage, its rank in `group` (without one, of
    all processes). `wires`: of any two stages between which values go. `units`: the units of `states` that each stage
    uses; several may use one. `seed(stage, micro_batch)`: of the random numbers of one forward, which then do not
    depend on the order of steps. `observe` is called after each step.
    """

    def __init__(
        self,
        program: Sequence[Step],
        stages: Mapping[int, Callable[..., Any]],
        *,
        ranks: Sequence[int],
        wires: Mapping[tuple[int, int], Wire],
        loss: Callable[[Any, Any], Tensor],
        queue: WeightQueue,
        states: States,
        units: Mapping[int, Sequence[int]],
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        ties: Sequence[Tie] = (),
        seed: Callable[[int, int], int] | None = None,
        observe: Callable[[Step], None] | None = None,
    ) -> None:
        self.program, self.stages, self.ranks, self.wires, self.loss = program, stages, ranks, wires, loss
        self.queue, self.states, self.units, self.ties = queue, states, units, ties
        self.group, self.device, self.seed, self.observe = group, device, seed, observe
        self.last = len(ranks) - 1
        self.micro_batches = 1 + max((micro_batch for _, _, micro_batch, _ in program), default=-1)
        self.before = {stage: sorted(source for source, target in wires if target == stage) for stage in stages}
        self.after = {stage: sorted(target for source, target in wires if source == stage) for stage in stages}
        self.actions: dict[str, Callable[[int, int, int], None]] = {
            "F": self._forward,
            "I": self._input_gradient,
            "W": self._weight_gradient,
            "B": self._backward,
            "SEND_F": lambda stage, micro_batch, peer: self._send(("F", stage, peer, micro_batch)),
            "SEND_I": lambda stage, micro_batch, peer: self._send(("I", stage, peer, micro_batch)),
            "RECV_F": lambda stage, micro_batch, peer: self._receive(("F", peer, stage, micro_batch)),
            "RECV_I": lambda stage, micro_batch, peer: self._receive(("I", peer, stage, micro_batch)),
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
        self._values: dict[Value, Tensor | _Arriving] = {}
        """Made or received, and not used or sent."""
        self._saved: dict[tuple[int, int], tuple[list[Tensor], list[GradientEdge | None]]] = {}
        """Inputs and outputs of a stage and micro-batch from F to I."""
        self._pending: dict[tuple[int, int], list[Deferred]] = {}
        """From I to W."""
        self._losses: dict[int, Tensor] = {}
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()
        """A tensor is kept until it has been sent."""

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
        steps = [step for step in self.program if step[0] in EVALUATES and step[2] < len(batches)]
        self._run(steps, batches)
        return self._total()

    def _run(self, program: Iterable[Step], batches: Sequence[Any]) -> None:
        if len(batches) > self.micro_batches or (torch.is_grad_enabled() and len(batches) < self.micro_batches):
            raise ValueError(f"the program is for {self.micro_batches} micro-batches, and {len(batches)} were given")
        self._batches = batches
        for step in program:
            kind, stage, micro_batch, peer = step
            try:
                self.actions[kind](stage, micro_batch, peer)
            except Exception as error:
                error.add_note(f"in step {kind} of stage {stage} for micro-batch {micro_batch}")
                raise
            if self.observe is not None:
                self.observe(step)
        while self._sends:
            self._end_send()
        left = [*self._values, *(("F", *key) for key in self._saved), *(("I", *key) for key in self._pending)]
        if left:
            raise RuntimeError(f"the program never uses what these made: {left[:4]}")

    def _forward(self, stage: int, micro_batch: int, _: int) -> None:
        self._each_unit(self.states.wait, stage)
        trains = torch.is_grad_enabled()
        received = [self._take(("F", source, stage, micro_batch)) for source in self.before[stage]]
        for value in received:
            value.requires_grad_(trains and value.is_floating_point())
        if self.seed is not None:
            torch.manual_seed(self.seed(stage, micro_batch))
        batch = self._batches[micro_batch]
        output = self.stages[stage](batch, *received)
        if stage == self.last:
            output = self.loss(output, batch)
            self._losses[micro_batch] = output.detach()
        outputs: tuple[Tensor, ...] = output if isinstance(output, tuple) else (output,)
        if trains:
            places = [get_gradient_edge(value) if value.requires_grad else None for value in outputs]
            self._saved[stage, micro_batch] = (received, places)
        for target, value in zip(self.after[stage], outputs, strict=stage != self.last):
            self._values["F", stage, target, micro_batch] = value.detach().contiguous()

    def _backward(self, stage: int, micro_batch: int, _: int) -> None:
        self._each_unit(self.states.wait, stage)
        received, places = self._saved.pop((stage, micro_batch))
        if stage == self.last:
            gradients = [torch.ones_like(self._losses[micro_batch])]
        else:
            gradients = [self._take(("I", target, stage, micro_batch)) for target in self.after[stage]]
        roots = [(place, each) for place, each in zip(places, gradients, strict=True) if place is not None]
        if roots:
            torch.autograd.backward([place for place, _ in roots], [each for _, each in roots])
        for source, value in zip(self.before[stage], received, strict=True):
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            self._values["I", stage, source, micro_batch] = gradient.contiguous()

    def _input_gradient(self, stage: int, micro_batch: int, peer: int) -> None:
        with self.queue.deferring() as deferred:
            self._backward(stage, micro_batch, peer)
        self._pending[stage, micro_batch] = deferred

    def _weight_gradient(self, stage: int, micro_batch: int, _: int) -> None:
        compute(self._pending.pop((stage, micro_batch)))

    def _take(self, value: Value) -> Tensor:
        """A value that another stage made, here or elsewhere."""
        found = self._values.pop(value)
        if isinstance(found, _Arriving):
            found.work.wait()
            return found.buffer
        return found

    def _send(self, value: Value) -> None:
        tensor, wire = self._take(value), self._wire(value)
        if (tensor.shape, tensor.dtype) != wire:
            raise ValueError(f"made {tensor.dtype} of {tuple(tensor.shape)}, and the other side expects {wire}")
        work = dist.isend(tensor, group=self.group, group_dst=self.ranks[value[2]])
        assert work is not None
        self._sends.append((work, tensor))
        if len(self._sends) > IN_FLIGHT:
            self._end_send()

    def _end_send(self) -> None:
        work, _ = self._sends.popleft()
        work.wait()

    def _receive(self, value: Value) -> None:
        wire, source = self._wire(value), value[1]
        buffer = torch.empty(wire.shape, dtype=wire.dtype, device=self.device)
        work = dist.irecv(buffer, group=self.group, group_src=self.ranks[source])
        assert work is not None
        self._values[value] = _Arriving(buffer, work)

    def _wire(self, value: Value) -> Wire:
        _, source, target, _ = value
        return self.wires[min(source, target), max(source, target)]

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
