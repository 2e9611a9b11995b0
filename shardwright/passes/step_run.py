"""One micro-batch of training on fake tensors: every kind of block measured alone once, everything else in place.

In the run of the whole model each block is a stand-in that returns fresh tensors of the right layout, so that what is
recorded is the work outside the blocks: `embedding` until the first block is called, `head` from then on, the loss
included. No autograd node leads through a stand-in; the gradients on its two sides are made where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from shardwright.passes.blocks import Block
from shardwright.passes.boundary import enter, leave
from shardwright.passes.crossing import Uses
from shardwright.passes.held import Held, may_wait
from shardwright.passes.record import Recorder, Recording, module_paths
from shardwright.passes.unit_run import Nest, UnitRun, run_backward, run_unit
from shardwright.passes.unpriced import inside
from shardwright.passes.untyped import Scalar

EMBEDDING, HEAD, BOUNDARY = "embedding", "head", "boundary"


@dataclass(frozen=True, slots=True)
class Step:
    """One micro-batch of training."""

    forward: Callable[[], Any]
    loss: Callable[[Any], torch.Tensor]
    """Of what forward returned, a scalar."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One call of one block in the step. Storages have the recorder's numbers; None is a storage that does not count
    (a parameter, the batch)."""

    path: str
    run: UnitRun
    inputs: tuple[int | None, ...]
    """Number of each storage of the inputs."""
    outputs: tuple[int | None, ...]
    """Number of each storage of the outputs."""
    crossing: int = 0
    """Bytes of gradients that are alive during its backward and pass it by ([Note: crossing gradients])."""


@dataclass(frozen=True, slots=True)
class StepRun:
    """All that was measured of one micro-batch."""

    calls: tuple[BlockCall, ...]
    forward: Recording
    backward: Recording
    input_only: Recording | None
    alive: frozenset[int]
    """Storages that work outside the blocks keeps until backward."""
    size: list[int]
    """Bytes of each storage."""
    region: list[str]
    """Where each storage was made."""
    next_call: Mapping[int, int]
    """Position of the first call after each storage was made."""
    loss_bytes: int
    held_by_weight: Mapping[str, int]
    """Of each region outside the blocks, bytes that wait for weight gradients ([Note: held by weight])."""

    def forward_operators(self) -> Iterator[tuple[str, str]]:
        """Name and module of every operator of forward, those of blocks once for each kind."""
        yield from ((event.name, event.module) for event in self.forward.events)
        first: dict[int, BlockCall] = {}
        for call in self.calls:
            first.setdefault(id(call.run), call)
        for call in first.values():
            yield from ((event.name, f"{call.path}.{event.module}".rstrip(".")) for event in call.run.forward)


@contextmanager
def replaced_forwards(blocks: Sequence[Block], substitute: Callable[[Block], Callable[..., Any]]) -> Iterator[None]:
    """Gives each block another `forward` for a while."""
    before = [vars(block.module).get("forward") for block in blocks]
    substitutes = [substitute(block) for block in blocks]
    try:
        for block, forward in zip(blocks, substitutes, strict=True):
            setattr(block.module, "forward", forward)  # noqa: B010 (a method, to the type checker)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                vars(block.module).pop("forward", None)
            else:
                setattr(block.module, "forward", own)  # noqa: B010


@dataclass
class _StandIns:
    """What stands in for the blocks during one step."""

    recorder: Recorder
    prepare: Callable[[nn.Module], None]
    cast: torch.dtype | None
    input_only: bool
    uses: Uses
    shared: Sequence[nn.Module]
    """Linear layers outside the blocks."""
    runs: dict[tuple[Any, ...], UnitRun] = field(default_factory=dict)
    calls: list[BlockCall] = field(default_factory=list)
    ends: list[torch.Tensor] = field(default_factory=list)
    anchor: torch.Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))

    def stand_in(self, block: Block) -> Callable[..., Any]:
        forward = block.module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(block, forward, args, kwargs)

        return call

    def _call(self, block: Block, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs, tensors = Nest.of((args, kwargs))
        if not self.calls:
            self.recorder.enter_region(HEAD)
        key = (block.fingerprint, inputs.key())
        if key not in self.runs:
            self.runs[key] = self._measure(block, forward, inputs)
        run = self.runs[key]
        self._end_before(tensors)
        numbers = {at.storage: self.recorder.storages.number(t) for t, at in zip(tensors, inputs.layouts, strict=True)}
        outputs = self._outputs(run, tensors)
        made = {
            at.storage: self.recorder.storages.number(tensor)
            for tensor, at in zip(outputs, run.output.layouts, strict=True)
        }
        self.calls.append(BlockCall(block.path, run, _in_order(numbers), _in_order(made)))
        self.uses.call(tensors, outputs)
        self.recorder.rebase(HEAD)
        return run.output.filled(outputs)

    def _measure(self, block: Block, forward: Callable[..., Any], inputs: Nest) -> UnitRun:
        with self.recorder.paused(), inside(block.path):
            self.prepare(block.module)
            return run_unit(block.module, forward, inputs, self.cast, input_only=self.input_only, shared=self.shared)

    def _end_before(self, tensors: Sequence[torch.Tensor]) -> None:
        """Ties what was made outside the blocks and enters this one to scalars, one for each region."""
        storages = self.recorder.storages
        numbered = [(tensor, storages.number(tensor)) for tensor in tensors]
        for region in (EMBEDDING, HEAD):
            made_there = [t for t, number in numbered if number is not None and storages.region[number] == region]
            end = leave(self.recorder, region, made_there, rebase=region == EMBEDDING)
            if end is not None:
                self.ends.append(end)

    def _outputs(self, run: UnitRun, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        fresh = [at for at, place in zip(run.output.layouts, run.output_is_input, strict=True) if place is None]
        made = iter(enter(self.anchor, self.recorder, BOUNDARY, fresh))
        of_storage = {at.storage: tensor for tensor, at in zip(tensors, run.inputs.layouts, strict=True)}
        return [
            next(made) if place is None else of_storage[place].as_strided(at.shape, at.stride, at.offset)
            for at, place in zip(run.output.layouts, run.output_is_input, strict=True)
        ]


def _in_order(numbers: Mapping[int, int | None]) -> tuple[int | None, ...]:
    return tuple(numbers[index] for index in range(len(numbers)))


def _loss(step: Step, recorder: Recorder) -> torch.Tensor:
    """The loss; its own operators are said to be of a module `loss`."""

    def loss(output: Any) -> torch.Tensor:
        recorder.enter_module("loss")
        recorder.enter_loss()
        value = step.loss(output)
        recorder.leave_module()
        return value

    return loss(step.forward())


def run_step(
    model: nn.Module,
    blocks: Sequence[Block],
    step: Step,
    *,
    prepare: Callable[[nn.Module], None],
    cast: torch.dtype | None,
    input_only: bool,
) -> StepRun:
    """Measures one micro-batch. A block is given to `prepare` before it is run. `cast` is the compute dtype that blocks
    cast their inputs to, or None; `input_only` also measures the input gradients apart."""
    inside = tuple(f"{block.path}." for block in blocks)
    of_blocks = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in of_blocks]
    recorder = Recorder(model.parameters(), EMBEDDING if blocks else HEAD)
    uses = Uses(recorder.storages, recorder.is_paused)
    in_blocks = {part for block in blocks for part in block.module.modules()}
    layers = may_wait(part for part in model.modules() if part not in in_blocks)
    held = Held(recorder)
    stand_ins = _StandIns(recorder, prepare, cast, input_only, uses, layers)
    skip = {block.path for block in blocks}
    with (
        replaced_forwards(blocks, stand_ins.stand_in),
        recorder,
        uses,
        held.watching(layers),
        module_paths(recorder, model, lambda path: path in skip or path.startswith(inside)),
    ):
        value = _loss(step, recorder)
        loss, loss_dtype = get_gradient_edge(value), value.dtype
        del value
        forward = recorder.take(in_backward=True)
    storages = recorder.storages
    alive = frozenset(storages.alive())
    ends: list[tuple[Scalar, torch.dtype]] = [(loss, loss_dtype), *((end, end.dtype) for end in stand_ins.ends)]
    for_inputs = None
    if input_only:
        for_inputs = run_backward(recorder, ends, [stand_ins.anchor], [], retain=True)
    held.forget()
    backward = run_backward(recorder, ends, [stand_ins.anchor], outside, retain=False)
    return StepRun(
        calls=tuple(replace(call, crossing=size) for call, size in zip(stand_ins.calls, uses.crossing(), strict=True)),
        forward=forward,
        backward=backward,
        input_only=for_inputs,
        alive=alive,
        size=storages.size,
        region=storages.region,
        next_call=uses.next_call(),
        loss_bytes=loss_dtype.itemsize,
        held_by_weight=held.bytes(),
    )
