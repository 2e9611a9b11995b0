"""Traces a job's model: which modules are its blocks, and every run that its costs are fitted to."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwright.passes.blocks import Block, find_blocks
from shardwright.passes.boundary import fresh
from shardwright.passes.build import Built
from shardwright.passes.contract import Batch, Contract, TableLimits
from shardwright.passes.fake import Twins, fake_mode, faked
from shardwright.passes.imports import UserCode
from shardwright.passes.kernels import kernels_of
from shardwright.passes.record import UnpricedOperator
from shardwright.passes.step_run import Step, StepRun, replaced_forwards, run_step
from shardwright.passes.unit_run import Nest, cast_floating
from shardwright.schemas.cluster import DeviceKind
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.profile import ComputeDtypeName

CAST: dict[ComputeDtypeName, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
"""What parameters and inputs are cast to ([Note: compute dtype])."""
MICRO_BATCHES = (2, 3, 4)
"""Fitted at the first two, verified at the third ([Note: affine in the micro-batch])."""


@dataclass(frozen=True, slots=True)
class Tracer:
    """What every trace of one job shares."""

    built: Built
    contract: Contract
    code: UserCode
    kind: DeviceKind
    mode: FakeTensorMode = field(default_factory=fake_mode)

    def choose_blocks(self) -> tuple[Block, ...]:
        """The repeated blocks that forward calls exactly once each, in that order, found by trial runs that also check
        the contract. A list of blocks that are called otherwise (shared layers, layers taken apart) is passed over."""
        excluded: frozenset[str] = frozenset()
        while True:
            blocks = find_blocks(self.built.module, excluded)
            with self._faked(blocks, None) as (twins, _):
                calls = self._check(blocks, twins)
            wrong = {block.container for block in blocks if calls[block.path] != 1}
            if not wrong:
                order = {path: index for index, path in enumerate(calls)}
                return tuple(sorted(blocks, key=lambda block: order[block.path]))
            excluded |= wrong

    def _check(self, blocks: Sequence[Block], twins: Twins) -> Counter[str]:
        """A trial run that checks the contract; returns how often each block was called. Blocks that are not called as
        such, but whose parts are, fail for want of fake tensors: so a failed trial is made again with all of them."""
        batch = self.contract.batch(MICRO_BATCHES[0])
        with TableLimits(self.contract, batch, self.built):
            try:
                return self._trial(blocks, batch, twins, None)
            except InputError:
                for block in blocks:
                    twins.put_in(block.module)
                return self._trial(blocks, batch, twins, None)

    def trace(self, blocks: Sequence[Block], dtype: ComputeDtypeName) -> tuple[list[StepRun], str]:
        """One step at each of `MICRO_BATCHES`, and the attention kernel that ran. Raises InputError for an operator
        whose work is unknown."""
        runs, cast = [], CAST[dtype]
        try:
            with self._faked(blocks, cast) as (twins, attention):
                self._trial(blocks, self.contract.batch(MICRO_BATCHES[0]), twins, cast)
                for micro_batch in MICRO_BATCHES:
                    step = self._step(self.contract.batch(micro_batch), cast)
                    with self.code.running(self.built.key, "backward"):
                        run = run_step(
                            self.built.module,
                            blocks,
                            step,
                            prepare=twins.put_in,
                            cast=cast,
                            input_only=micro_batch == MICRO_BATCHES[0],
                        )
                    runs.append(run)
        except UnpricedOperator as error:
            hint = (
                "write it with operators that PyTorch's FLOP counter knows (matrix products, convolutions, attention), "
                "or register a formula with torch.utils.flop_counter.register_flop_formula in the model's file"
            )
            message = f"the work of {error} is unknown, and it uses parameters"
            raise InputError(Diagnostic(key=self.built.key, message=message, suggestion=hint)) from error
        return runs, "+".join(sorted(attention)) or "none"

    @contextmanager
    def _faked(self, blocks: Sequence[Block], cast: torch.dtype | None) -> Iterator[tuple[Twins, set[str]]]:
        """The model on fake tensors, its blocks not yet, with the device's kernels. Yields what gives a block its
        tensors, and the attention kernels that were taken."""
        model, inside = self.built.module, [block.module for block in blocks]
        kernels = kernels_of(self.kind, self.code.modules())
        with faked(model, self.mode, cast, inside) as twins, self.mode, kernels as attention, _quiet():
            yield twins, attention

    def _step(self, batch: Batch, cast: torch.dtype | None) -> Step:
        def forward() -> Any:
            args, kwargs = cast_floating(cast, self.contract.arguments(batch))
            with self.code.running(self.built.key, "forward"):
                return self.built.module(*args, **kwargs)

        return Step(forward, lambda output: self.contract.loss(output, batch))

    def _trial(self, blocks: Sequence[Block], batch: Batch, twins: Twins, cast: torch.dtype | None) -> Counter[str]:
        """Forward and loss with one block of each kind, which also fills what modules cache on first use. Returns how
        often each block was called."""
        calls: Counter[str] = Counter()
        outputs: dict[tuple[Any, ...], Nest] = {}
        held: list[Nest] = []  # keys tell objects by identity, so they must not be freed meanwhile

        def counted(block: Block) -> Callable[..., Any]:
            forward = block.module.forward

            def call(*args: Any, **kwargs: Any) -> Any:
                calls[block.path] += 1
                inputs, _ = Nest.of((args, kwargs))
                held.append(inputs)
                key = (block.fingerprint, inputs.key())
                if key not in outputs:
                    twins.put_in(block.module)
                    args, kwargs = cast_floating(cast, (args, kwargs))
                    output = forward(*args, **kwargs)
                    outputs[key] = Nest.of(output)[0]
                    return output
                return outputs[key].filled(fresh(outputs[key].layouts))

            return call

        step = self._step(batch, cast)
        with replaced_forwards(blocks, counted):
            step.loss(step.forward())
        return calls


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps fake tensors from logging the errors of the user's operators, which are told as diagnostics."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
