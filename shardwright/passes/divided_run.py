"""What each unit costs one of several processes that share every layer, measured as the whole model is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shardwright.passes.blocks import Block
from shardwright.passes.contract import Batch
from shardwright.passes.divided_form import LocalForm, NotLocal
from shardwright.passes.fit import NotAffine, fit
from shardwright.passes.step_run import EMBEDDING, HEAD
from shardwright.passes.trace import Tracer
from shardwright.passes.trial import Ran
from shardwright.passes.units import CostFitter
from shardwright.passes.unpriced import ledger
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.profile import (
    ComputeDtypeName,
    ModuleStyle,
    Parameter,
    TensorParallelism,
    Unit,
    UnitCost,
)

Costs = dict[ComputeDtypeName, UnitCost]


@dataclass(frozen=True, slots=True)
class LocalRun:
    """Whether a model runs in a local form."""

    reason: str
    """Why not; empty if it does."""
    operators: tuple[Ran, ...] = ()
    """The operators of a forward and a loss at micro-batch 2, one block of each kind."""


@dataclass(frozen=True, slots=True)
class Divided:
    """The units with their costs for every degree that could be measured."""

    units: tuple[Unit, ...]
    parallelism: TensorParallelism
    warnings: tuple[str, ...] = ()


def runs_locally(
    tracer: Tracer,
    blocks: Sequence[Block],
    draw: float,
    parameters: Sequence[Parameter],
    styles: Sequence[ModuleStyle],
    degree: int,
    *,
    sequence: bool = False,
) -> LocalRun:
    """Runs forward and loss once in the local form of so many processes; degree 1 is the whole model. `blocks` are in
    order of execution; with `sequence` hidden states are divided between the first one and the last."""
    form = _form(blocks, parameters, styles, degree, sequence=sequence)
    try:
        with ledger(tracer.profile.moves_data):
            return LocalRun("", tuple(tracer.of_form(form).try_out(form.told_apart(blocks), draw)))
    except Exception as error:  # whatever the user's forward raises at shapes that it was not made for
        return LocalRun(_reason(error))


def runs_on_part(tracer: Tracer, blocks: Sequence[Block], draw: float) -> bool:
    """Whether the model makes logits of half of the positions where its last block returns only these."""
    hook = blocks[-1].module.register_forward_hook(lambda module, inputs, output: _half(output))
    try:
        tracer.of_loss(_logits_of_half).try_out(blocks, draw)
    except Exception:  # whatever the user's forward raises at shapes that it was not made for
        return False
    finally:
        hook.remove()
    return True


def _half(output: Any) -> Any:
    """What a block returns, its hidden states (batch, sequence, features) without their second half."""
    if isinstance(output, tuple):
        return (_half(output[0]), *output[1:])
    return output[:, : output.shape[1] // 2]


def _logits_of_half(output: Any, batch: Batch) -> torch.Tensor:
    """The logits, which must be those of half of the positions. Raises ValueError if they are not."""
    logits: torch.Tensor = getattr(output, "logits", output)
    rows, length = batch["targets"].shape
    if logits.shape[:2] != (rows, length // 2):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {rows} sequences of {length // 2} tokens")
    return logits


def measure_divided(
    tracer: Tracer,
    blocks: Sequence[Block],
    draw: float,
    units: Sequence[Unit],
    parameters: Sequence[Parameter],
    parallelism: TensorParallelism,
) -> Divided:
    """Measures the units for every degree of `parallelism`. A degree at which the model does not run is left out, with
    a warning; if none is left, tensor parallelism is refused for the reason of the first."""
    found: dict[int, list[Costs]] = {}
    reasons: dict[int, str] = {}
    for degree in parallelism.degrees:
        form = _form(blocks, parameters, parallelism.styles, degree, sequence=parallelism.sequence)
        try:
            with ledger(tracer.profile.moves_data):
                found[degree] = _measure(tracer.of_form(form), form.told_apart(blocks), draw, units)
        except Exception as error:  # whatever the user's forward raises at shapes that it was not made for
            reasons[degree] = _reason(error)
    return Divided(
        units=tuple(
            replace(unit, divided={degree: costs[at] for degree, costs in found.items()})
            for at, unit in enumerate(units)
        ),
        parallelism=replace(
            parallelism,
            degrees=tuple(found),
            refused=parallelism.refused or ("" if found or not reasons else next(iter(reasons.values()))),
        ),
        warnings=tuple(_warnings(reasons)),
    )


def _form(
    blocks: Sequence[Block],
    parameters: Sequence[Parameter],
    styles: Sequence[ModuleStyle],
    degree: int,
    *,
    sequence: bool,
) -> LocalForm:
    chain = tuple(block.path for block in blocks) if sequence else ()
    return LocalForm(degree, parameters, styles, chain)


def _measure(tracer: Tracer, blocks: Sequence[Block], draw: float, units: Sequence[Unit]) -> list[Costs]:
    """The costs of the units, in order."""
    dtypes = list(units[0].costs)
    fitters = {dtype: CostFitter(tracer.trace(blocks, dtype, draw)[0]) for dtype in dtypes}
    costs, position = [], 0
    for unit in units:
        costs.append({dtype: _cost(fitter, unit, position) for dtype, fitter in fitters.items()})
        position += len(unit.paths)
    if tracer.form.chain:
        first = units.index(next(unit for unit in units if unit.kind == "embedding"))
        costs[first] = {dtype: _with_entry(fitter, tracer.form.degree) for dtype, fitter in fitters.items()}
    return costs


def _with_entry(fitter: CostFitter, degree: int) -> UnitCost:
    """The cost of the embedding, which counts what the first block keeps beyond the others once blocks are
    checkpointed: its input is the whole hidden states, scattered inside of what is recomputed."""
    cost = fitter.outside(EMBEDDING)
    parts = [step.calls[0].run.inputs.layouts[0].storage_bytes for step in fitter.steps]
    more = fit([(degree - 1) * part for part in parts], "the bytes of the hidden states are")
    kept = {policy: size if policy == "none" else size.plus(more) for policy, size in cost.saved.items()}
    return replace(cost, saved=kept)


def _cost(fitter: CostFitter, unit: Unit, position: int) -> UnitCost:
    if unit.kind != "block":
        return fitter.outside(EMBEDDING if unit.kind == "embedding" else HEAD)
    paths = tuple(call.path for call in fitter.steps[0].calls[position : position + unit.count])
    if paths != unit.paths:
        raise NotAffine(f"blocks run in another order, {' '.join(paths)}")
    first, *others = (fitter.block(position + at) for at in range(unit.count))
    if any(other != first for other in others):
        raise NotAffine(f"of {unit.paths[0]} and its equals, some cost more than others")
    return first


def _reason(error: Exception) -> str:
    if isinstance(error, InputError):
        return error.diagnostics[0].message
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return text if isinstance(error, NotLocal | NotAffine) else f"{type(error).__name__}: {text}"


def _warnings(reasons: dict[int, str]) -> Iterator[str]:
    for degree, reason in reasons.items():
        yield f"tensor parallelism over {degree} processes is left out: the model does not run divided so: {reason}"
