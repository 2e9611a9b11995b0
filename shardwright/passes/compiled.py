"""What changes when each block is compiled by `torch.compile`, as training scripts do block by block.

Bytes kept for backward, kernels, bytes moved and temporaries are those of [Note: traced for compile], [Note: fused
under compile] and [Note: alive under compile]. `embedding` and `head` are not compiled; they have an entry too, since
what they count depends on what the blocks keep ([Note: shared storages]). FSDP casts a block's inputs before it is
called, so a cast input counts as the block's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shardwright.passes.blocks import Block
from shardwright.passes.boundary import Layout, fresh
from shardwright.passes.compiled_graph import BlockTracer
from shardwright.passes.compiled_run import Compiled
from shardwright.passes.fake import Twins, faked
from shardwright.passes.fit import NotAffine
from shardwright.passes.kernels import kernels_of
from shardwright.passes.step_run import EMBEDDING, HEAD, StepRun
from shardwright.passes.trace import CAST, Tracer
from shardwright.passes.unit_run import Nest, UnitRun, cast_floating
from shardwright.passes.units import CostFitter
from shardwright.schemas.profile import ComputeDtypeName, Unit, UnitCost

Costs = dict[str, UnitCost]
"""By a block's path; `embedding`, `head`."""


_DIVIDED_AT = 1
"""Of `MICRO_BATCHES` the one at which graphs are divided and kernels fused ([Note: one division]): the odd one, for
which sizes of loops coincide by chance least often."""


@dataclass(frozen=True)
class _Call:
    """A call of a block at one micro-batch, as a compiled block is called: with its inputs cast."""

    tracer: BlockTracer
    layouts: tuple[Layout, ...]
    """Of its input tensors."""
    storages: tuple[int | None, ...]
    """For each of them the index of its storage among those before they were cast, None for what casting made."""

    @classmethod
    def of(cls, block: Block, inputs: Nest, cast: torch.dtype | None, tracer: Tracer) -> _Call:
        """The call with these inputs, cast to `cast` first."""
        before = fresh(inputs.layouts)
        nest, tensors = Nest.of(cast_floating(cast, inputs.filled(before)))
        pairs = zip(tensors, before, inputs.layouts, strict=True)
        storages = tuple(at.storage if tensor is original else None for tensor, original, at in pairs)
        return cls(BlockTracer(block.module, nest.filled, tracer.kind, tracer.mode), nest.layouts, storages)

    def run(self) -> None:
        """Runs the block as it is."""
        args, kwargs = self.tracer.arguments(fresh(self.layouts))
        self.tracer.module(*args, **kwargs)


@dataclass
class _Compiler:
    """Compiles the blocks of one traced model in one compute dtype."""

    tracer: Tracer
    blocks: Mapping[str, Block]
    dtype: ComputeDtypeName
    twins: Twins
    warnings: list[str]
    done: dict[tuple[int, ...], list[UnitRun] | None] = field(default_factory=dict)

    def costs(self, steps: Sequence[StepRun]) -> Costs:
        """Costs of the units; a block that cannot be compiled has none, and stays as it is."""
        calls = [list(step.calls) for step in steps]
        compiled = []
        for position, call in enumerate(steps[0].calls):
            runs = self._runs(call.path, [step.calls[position].run for step in steps])
            if runs is not None:
                compiled.append(position)
                for own, run in zip(calls, runs, strict=True):
                    own[position] = replace(own[position], run=run)
        if not compiled:
            return {}
        fitter = CostFitter([replace(step, calls=tuple(own)) for step, own in zip(steps, calls, strict=True)])
        found: Costs = {EMBEDDING: fitter.outside(EMBEDDING), HEAD: fitter.outside(HEAD)}
        refused: set[tuple[int, ...]] = set()
        for position in compiled:
            call, key = steps[0].calls[position], tuple(id(own[position].run) for own in calls)
            try:
                found[call.path] = fitter.block(position)
            except NotAffine as error:
                if key not in refused:
                    self._warn(call.path, f"its cost under torch.compile does not grow linearly: {error}")
                refused.add(key)
        return found

    def _runs(self, path: str, eager: Sequence[UnitRun]) -> list[UnitRun] | None:
        key = tuple(map(id, eager))
        if key not in self.done:
            try:
                self.done[key] = self._compile(self.blocks[path], eager)
            except Exception as error:  # whatever PyTorch or the model raise: they have no common class
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._warn(path, f"it cannot be traced for torch.compile{self.tracer.code.where(error)}: {first}")
                self.done[key] = None
        return self.done[key]

    def _compile(self, block: Block, eager: Sequence[UnitRun]) -> list[UnitRun]:
        self.twins.put_in(block.module)
        calls = [_Call.of(block, run.inputs, CAST[self.dtype], self.tracer) for run in eager]
        with torch.no_grad():  # fills what the block caches on first use: what a trace puts there dies with it
            calls[0].run()
        graphs, values = calls[_DIVIDED_AT].tracer.graphs(fresh(calls[_DIVIDED_AT].layouts))
        compiled = Compiled(graphs)
        runs = []
        for index, (run, call) in enumerate(zip(eager, calls, strict=True)):
            own = values if index == _DIVIDED_AT else call.tracer.values(fresh(call.layouts))
            runs.append(compiled.run(run, own, call.storages))
        return runs

    def _warn(self, path: str, reason: str) -> None:
        self.warnings.append(_no_cost(path, self.dtype, reason))


def compile_units(
    tracer: Tracer,
    blocks: Sequence[Block],
    draw: float,
    traces: Mapping[ComputeDtypeName, Sequence[StepRun]],
    units: Sequence[Unit],
) -> tuple[tuple[Unit, ...], tuple[str, ...]]:
    """The units with `compiled` filled in, and warnings that name the blocks for which that could not be done. `draw`
    is what Python's random numbers are taken to be."""
    if not blocks:
        return tuple(units), ("the model has no repeated blocks, so there is nothing to compile block by block",)
    warnings: list[str] = []
    by_dtype: dict[ComputeDtypeName, Costs] = {}
    for dtype, steps in traces.items():
        with tracer.as_forward_runs(draw), _faked(tracer, blocks, dtype) as twins:
            paths = {block.path: block for block in blocks}
            by_dtype[dtype] = _Compiler(tracer, paths, dtype, twins, warnings).costs(steps)
    return tuple(replace(unit, compiled=_of_unit(unit, by_dtype, warnings)) for unit in units), tuple(warnings)


def _of_unit(
    unit: Unit, by_dtype: Mapping[ComputeDtypeName, Costs], warnings: list[str]
) -> dict[ComputeDtypeName, UnitCost]:
    """The costs that all blocks of a unit share; none where one has none, or where they differ, with a warning."""
    found = {}
    for dtype, costs in by_dtype.items():
        each = [costs.get(name) for name in unit.paths or (unit.kind,)]
        if each[0] is not None and all(cost == each[0] for cost in each):
            found[dtype] = each[0]
        elif None not in each:
            reason = f"it and {unit.paths[-1]} cost the same as they are, but not compiled"
            warnings.append(_no_cost(unit.paths[0], dtype, reason))
    return found


def _no_cost(path: str, dtype: ComputeDtypeName, reason: str) -> str:
    return f"{path} ({dtype}) has no compiled cost: {reason}"


@contextmanager
def _faked(tracer: Tracer, blocks: Sequence[Block], dtype: ComputeDtypeName) -> Iterator[Twins]:
    """The model on fake tensors, with the device's attention; norms are left to inductor, which takes them apart."""
    inside = [block.module for block in blocks]
    kernels: Any = kernels_of(tracer.kind, tracer.code.modules(), fused_norms=False)
    with faked(tracer.built.module, tracer.mode, CAST[dtype], inside) as twins, tracer.mode, kernels:
        yield twins
