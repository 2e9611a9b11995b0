"""Traces a job's model: which modules are its blocks, and every run that its costs are fitted to."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwright.passes import flow
from shardwright.passes.alike import samples
from shardwright.passes.blocks import LISTS, Block, find_blocks
from shardwright.passes.build import Built
from shardwright.passes.contract import Batch, Contract, Loss, TableLimits
from shardwright.passes.divided_form import WHOLE, LocalForm
from shardwright.passes.draws import LARGEST, SMALLEST, Draws, drawing
from shardwright.passes.fake import Twins, fake_mode, faked
from shardwright.passes.flow import Flow
from shardwright.passes.forwards import replaced_by_job
from shardwright.passes.imports import UserCode
from shardwright.passes.kernels import kernels_of
from shardwright.passes.recurrent import recurrent_layers
from shardwright.passes.step_run import Step, StepRun, run_step
from shardwright.passes.trial import Ran, Trial, operators_of
from shardwright.passes.unit_run import cast_floating
from shardwright.passes.unpriced import UnpricedOperator, refusal
from shardwright.schemas.cluster import DeviceKind
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.job import ProfileSpec
from shardwright.schemas.profile import ComputeDtypeName

CAST: dict[ComputeDtypeName, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
"""What parameters and inputs are cast to ([Note: compute dtype])."""
MICRO_BATCHES = (2, 3, 4)
"""Fitted at the first two, verified at the third ([Note: affine in the micro-batch]): that of the whole model, whose
parts do the same."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The blocks of a model, in order of execution."""

    blocks: tuple[Block, ...]
    draw: float
    """What Python's random numbers are taken to be ([Note: draws])."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tracer:
    """What every trace of one job shares."""

    built: Built
    contract: Contract
    code: UserCode
    kind: DeviceKind
    profile: ProfileSpec = field(default_factory=ProfileSpec)
    mode: FakeTensorMode = field(default_factory=fake_mode)
    form: LocalForm = WHOLE
    """The form of the model that is traced, whole unless said otherwise."""

    def choose_blocks(self) -> Chosen:
        """The repeated blocks that forward calls exactly once each, in that order, found by trial runs that also check
        the contract. Blocks that are called otherwise (shared layers, layers taken apart) are passed over."""
        draw, drawn = LARGEST, ""
        excluded: dict[str, int] = {}
        while True:
            blocks = find_blocks(self.built.module, frozenset(excluded), share=self.profile.share)
            trial, draws = self._check(blocks, draw, samples(blocks))
            if draws.first is not None and not drawn:
                draw, drawn = self._most_work(), self.code.place(draws.first)
                continue
            wrong = {block.path: trial.calls[block.path] for block in blocks if trial.calls[block.path] != 1}
            if not wrong:
                break
            excluded |= wrong
        if trial.unlike:
            trial, _ = self._check(blocks, draw, {block.path for block in blocks})
            blocks = tuple(_told_apart(block, trial.unlike) for block in blocks)
        order = {path: index for index, path in enumerate(trial.calls)}
        blocks = tuple(sorted(blocks, key=lambda block: order[block.path]))
        return Chosen(blocks, draw, (*_of_draws(draw, drawn), *_passed_over(self.built.module, excluded)))

    def _most_work(self) -> float:
        """[Note: draws]: the draw that makes forward do most."""
        return max((LARGEST, SMALLEST), key=lambda draw: self._check((), draw, ())[0].operators)

    def _check(self, blocks: Sequence[Block], draw: float, compared: Collection[str]) -> tuple[Trial, Draws]:
        """A trial run that checks the contract. Blocks that are not called as such, but whose parts are, fail for want
        of fake tensors: so a failed trial is made again with all of them."""
        batch = self.contract.batch(MICRO_BATCHES[0])
        faked_model = self._faked(blocks, None, draw)
        with faked_model as (twins, _, draws), TableLimits(self.contract, batch, self.built):
            try:
                trial = Trial(twins, None, compared).run(self._step(batch, None), blocks)
            except InputError:
                for block in blocks:
                    twins.put_in(block.module)
                trial = Trial(twins, None, compared).run(self._step(batch, None), blocks)
        return trial, draws

    def trace(self, blocks: Sequence[Block], dtype: ComputeDtypeName, draw: float) -> tuple[list[StepRun], str]:
        """One step at each of `MICRO_BATCHES`, and the attention kernel that ran. Raises InputError for an operator
        whose work is unknown."""
        runs, cast = [], CAST[dtype]
        try:
            with self._faked(blocks, cast, draw) as (twins, attention, _):
                Trial(twins, cast).run(self._step(self.contract.batch(MICRO_BATCHES[0]), cast), blocks)
                for micro_batch in MICRO_BATCHES[: 3 if self.form.degree == 1 else 2]:
                    step = self._step(self.contract.batch(micro_batch), cast)
                    with self.code.running(self.built.key, "backward", self.built.module):
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
            raise InputError(refusal(error, self.built.module, self.built.key)) from error
        return runs, "+".join(sorted(attention)) or self.built.attention

    @contextmanager
    def as_forward_runs(self, draw: float) -> Iterator[None]:
        """The job's own forwards and draws, and recurrent layers in one operator, for a forward that is not traced
        here."""
        forwards = replaced_by_job(self.built.module, self.profile.forwards, self.code)
        with forwards, drawing(draw, self.code.modules()), recurrent_layers():
            yield

    def of_form(self, form: LocalForm) -> Tracer:
        """Traces what one of several processes that share every layer sees."""
        contract = replace(self.contract, loss=self.contract.divided_loss or self.contract.loss)
        return replace(self, form=form, contract=contract)

    def of_loss(self, loss: Loss) -> Tracer:
        """Traces the same forward with another loss."""
        return replace(self, contract=replace(self.contract, loss=loss))

    def try_out(self, blocks: Sequence[Block], draw: float) -> list[Ran]:
        """One forward and loss on fake tensors, one block of each kind; the operators that ran."""
        batch = self.contract.batch(MICRO_BATCHES[0])
        with self._faked(blocks, None, draw) as (twins, _, _), operators_of(self.built.module) as ran:
            Trial(twins, None).run(self._step(batch, None), blocks)
        return ran

    def watch_flow(self, blocks: Sequence[Block], draw: float) -> Flow:
        """Where activations go and what parameters do, in the dtypes that the model declares."""
        batches = [self.contract.batch(micro_batch) for micro_batch in flow.MICRO_BATCHES]
        with self._faked(blocks, None, draw) as (twins, _, _):
            steps = [(self._step(batch, None), list(batch.values())) for batch in batches]
            return flow.watch(self.built.module, blocks, twins.put_in, steps)

    @contextmanager
    def _faked(
        self, blocks: Sequence[Block], cast: torch.dtype | None, draw: float
    ) -> Iterator[tuple[Twins, set[str], Draws]]:
        """The model on fake tensors, its blocks not yet, with the device's kernels and the job's own forwards. Yields
        what gives a block its tensors, the attention kernels that were taken, and Python's random draws."""
        model, inside = self.built.module, [block.module for block in blocks]
        modules = self.code.modules()
        with (
            replaced_by_job(model, self.profile.forwards, self.code),
            self.form.of(model),
            faked(model, self.mode, cast, inside) as twins,
            self.mode,
            kernels_of(self.kind, modules) as attention,
            drawing(draw, modules) as draws,
            _quiet(),
        ):
            yield twins, attention, draws

    def _step(self, batch: Batch, cast: torch.dtype | None) -> Step:
        def forward() -> Any:
            args, kwargs = cast_floating(cast, self.contract.arguments(batch))
            with self.code.running(self.built.key, "forward", self.built.module):
                return self.built.module(*args, **kwargs)

        return Step(forward, lambda output: self.contract.loss(output, batch))


def _told_apart(block: Block, unlike: Mapping[str, int]) -> Block:
    """The block, with a fingerprint of its own kind if it ran unlike the one that stands for it."""
    if block.path not in unlike:
        return block
    return replace(block, fingerprint=f"{block.fingerprint} {unlike[block.path]}")


def _of_draws(draw: float, drawn: str) -> Iterator[str]:
    """What to say of a forward that draws random numbers, at this place."""
    if drawn:
        yield (
            f"forward draws random numbers in Python{drawn}: it is measured with all of them close to {round(draw)}, "
            "where it does the most; what is skipped at random counts as run"
        )


def _passed_over(model: nn.Module, excluded: Mapping[str, int]) -> Iterator[str]:
    """What to say of modules that look like blocks, but are not called exactly once. Nothing is said of lists that
    only hold others."""
    again = [path for path, calls in excluded.items() if calls > 1]
    never = [path for path, calls in excluded.items() if calls == 0]
    never = [path for path in never if not isinstance(model.get_submodule(path), LISTS)]
    for paths, how in ((again, "calls them more than once"), (never, "never calls them")):
        if paths:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            yield (
                f"{paths[0]}{more} would be blocks, but forward {how} as modules: what they do counts as "
                "work outside all blocks, which is not checkpointed, and their parameters belong to the root group"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps fake tensors from logging the errors of the user's operators, which are told as diagnostics."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
