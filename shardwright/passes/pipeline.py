"""The passes, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import networkx as nx
from torch import nn

from shardwright.passes.blocks import Block
from shardwright.passes.build import Built, build_model
from shardwright.passes.context import find_context
from shardwright.passes.contract import Contract, make_contract
from shardwright.passes.cuts import inner_cuts
from shardwright.passes.dataflow import Dataflow
from shardwright.passes.divided_run import measure_divided, runs_locally, runs_on_part
from shardwright.passes.expert_layers import expert_calls, of_all_blocks, with_experts
from shardwright.passes.fit import NotAffine
from shardwright.passes.flow import Flow
from shardwright.passes.graph import Exported, analyse, export, make_graph
from shardwright.passes.imports import UserCode, user_code
from shardwright.passes.initialise import decide_init
from shardwright.passes.kernels import attention_calls
from shardwright.passes.overrides import impossible, unmatched
from shardwright.passes.parallelism import Model, check_pinned, find_parallelism, not_a_chain
from shardwright.passes.parameters import buffer_bytes, collect_parameters, with_roles, with_segments
from shardwright.passes.recurrent import recurrent_warnings
from shardwright.passes.serialise import digest
from shardwright.passes.sources import elsewhere, local_sources, packages
from shardwright.passes.step_run import EMBEDDING, StepRun
from shardwright.passes.tensor_parallel import Analysis
from shardwright.passes.trace import Tracer
from shardwright.passes.units import make_units
from shardwright.passes.unpriced import ledger
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import (
    Affine,
    ComputeDtypeName,
    ContextParallelism,
    Cut,
    Edge,
    ExpertLayer,
    ModelProfile,
    Parameter,
    TensorParallelism,
    Unit,
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the passes know so far. Each pass returns another with more in it."""

    job: JobSpec
    code: UserCode
    dtypes: tuple[ComputeDtypeName, ...]
    compiled: bool = False
    """Whether the blocks are also profiled as `torch.compile` makes them."""
    built: Built = field(default_factory=lambda: Built(nn.Module(), "", False))
    contract: Contract | None = None
    blocks: tuple[Block, ...] = ()
    draw: float = 0.0
    """What Python's random numbers are taken to be ([Note: draws])."""
    traces: Mapping[ComputeDtypeName, Sequence[StepRun]] | None = None
    attention: Mapping[ComputeDtypeName, str] | None = None
    units: tuple[Unit, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    flow: Flow | None = None
    cuts: tuple[Cut, ...] = ()
    edges: tuple[Edge, ...] = ()
    exported: Exported | None = None
    """None where torch cannot export the model."""
    analysis: Analysis | None = None
    tensor_parallelism: TensorParallelism = field(default_factory=TensorParallelism)
    context_parallelism: ContextParallelism = field(default_factory=lambda: ContextParallelism(refused="not looked at"))
    expert_layers: tuple[ExpertLayer, ...] = ()
    init: Literal["constructor", "modules"] = "constructor"
    local_sources: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    profile: ModelProfile | None = None

    @property
    def tracer(self) -> Tracer:
        """Traces the model under its contract."""
        assert self.contract is not None
        return Tracer(self.built, self.contract, self.code, self.job.cluster.device.kind, self.job.model.profile)


def _build(work: Work) -> Work:
    built = build_model(work.job.model, work.code)
    return replace(work, built=built, warnings=built.warnings)


def _check_contract(work: Work) -> Work:
    contract = make_contract(work.job, work.built, work.code)
    work = replace(work, contract=contract)
    chosen = work.tracer.choose_blocks()
    return replace(work, blocks=chosen.blocks, draw=chosen.draw, warnings=(*work.warnings, *chosen.warnings))


def _trace(work: Work) -> Work:
    with ledger(work.job.model.profile.moves_data) as unpriced:
        traced = {dtype: work.tracer.trace(work.blocks, dtype, work.draw) for dtype in work.dtypes}
    first = traced[work.dtypes[0]][0][0]
    return replace(
        work,
        warnings=(
            *work.warnings,
            *unpriced.warnings(work.built.module),
            *recurrent_warnings(first.forward_operators()),
        ),
        traces={dtype: steps for dtype, (steps, _) in traced.items()},
        attention={dtype: kernel for dtype, (_, kernel) in traced.items()},
    )


def _make_units(work: Work) -> Work:
    assert work.traces is not None
    try:
        return replace(work, units=make_units(work.traces, work.blocks))
    except NotAffine as error:
        message = f"the cost of the model does not grow linearly with the micro-batch; {error}"
        hint = "let no branch, shape or loop of forward depend on the size of the first dimension"
        raise InputError(Diagnostic(key=work.built.key, message=message, suggestion=hint)) from error


def _compile(work: Work) -> Work:
    if not work.compiled:
        return work
    from shardwright.passes.compiled import compile_units  # imports inductor, which takes half a second

    assert work.traces is not None
    units, warnings = compile_units(work.tracer, work.blocks, work.draw, work.traces, work.units)
    return replace(work, units=units, warnings=(*work.warnings, *warnings))


def _collect_parameters(work: Work) -> Work:
    return replace(work, parameters=collect_parameters(work.built, work.units))


def _follow_flow(work: Work) -> Work:
    flow = work.tracer.watch_flow(work.blocks, work.draw)
    parameters = with_segments(work.parameters, flow)
    return replace(work, flow=flow, cuts=flow.cuts, edges=flow.edges, parameters=parameters)


def _find_roles(work: Work) -> Work:
    """What parameters do, and how tensor parallelism would divide them: unknown where there is no graph."""
    assert work.flow is not None
    try:
        exported = _export(work)
    except Exception as error:  # whatever torch.export raises: its errors have no common class
        place = work.code.where(error)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = f"torch.export cannot trace the model{place}: {first}"
        warning = f"{reason}; how tensor parallelism would divide it is unknown"
        parameters = with_roles(work.parameters, work.flow, {}, reason)
        return replace(work, parameters=parameters, warnings=(*work.warnings, warning))
    loss, overrides = work.job.model.loss, work.job.strategy.tensor_parallel.overrides
    analysis = analyse(exported, next_token=loss == "next_token", overrides=overrides)
    if wrong := [*unmatched(work.built.module, overrides)] or [*impossible(analysis, overrides)]:
        raise InputError(wrong)
    reason = "the exported forward does not use it"
    parameters = with_roles(work.parameters, work.flow, analysis.divisions, reason)
    cuts = work.cuts if work.blocks else inner_cuts(make_graph(exported))
    return replace(work, exported=exported, analysis=analysis, parameters=parameters, cuts=cuts)


def _find_parallelism(work: Work) -> Work:
    """How processes could share the model's layers, its sequences, and its experts."""
    if work.exported is None or work.analysis is None:
        refused = "torch.export cannot trace the model"
        check_pinned(work.job, refused)
        return replace(
            work,
            tensor_parallelism=TensorParallelism(refused=refused),
            context_parallelism=ContextParallelism(refused=refused),
        )
    assert work.flow is not None
    model = work.built.module
    with attention_calls() as calls, expert_calls(model, work.flow) as found:
        whole = runs_locally(work.tracer, work.blocks, work.draw, (), (), 1)
    layers = of_all_blocks(found, work.flow, model)
    parameters = with_experts(work.parameters, layers)
    known = Model(work.job, work.tracer, work.blocks, work.draw, work.flow, parameters, whole, calls)
    dataflow = Dataflow(work.exported.program.graph, work.analysis)
    divided = find_parallelism(known, work.exported, dataflow)
    context = find_context(
        work.exported,
        dataflow,
        calls,
        length=work.job.train.sequence_length,
        chain=not_a_chain(work.flow, work.blocks),
        loss=work.job.model.loss,
        runs_on_part=lambda: runs_on_part(work.tracer, work.blocks, work.draw),
    )
    return replace(
        work,
        parameters=divided.parameters,
        tensor_parallelism=divided.parallelism,
        context_parallelism=context,
        expert_layers=layers,
    )


def _measure_divided(work: Work) -> Work:
    """What each unit costs processes that share every layer."""
    found = measure_divided(work.tracer, work.blocks, work.draw, work.units, work.parameters, work.tensor_parallelism)
    if not found.parallelism.degrees and found.parallelism.refused:
        check_pinned(work.job, found.parallelism.refused)
    warnings = (*work.warnings, *found.warnings)
    return replace(work, units=found.units, tensor_parallelism=found.parallelism, warnings=warnings)


def _export(work: Work) -> Exported:
    assert work.contract is not None
    assert work.flow is not None
    with work.tracer.as_forward_runs(work.draw):
        return export(work.built, work.contract, work.flow.like)


def _decide_init(work: Work) -> Work:
    return replace(work, init=decide_init(work.job.model, work.built, work.code))


def _find_sources(work: Work) -> Work:
    sources, compiled = local_sources(work.job, work.code)
    needed = packages(work.job, sources, work.code.folder)
    warnings = [f"{path} is not Python source; it runs only on machines like this one" for path in compiled]
    warnings += [
        f"{name} lies neither beside the job file nor in an installed package: the script needs it on PYTHONPATH"
        for name in elsewhere(work.job, work.code.folder)
    ]
    return replace(work, local_sources=sources, packages=needed, warnings=(*work.warnings, *warnings))


def _assemble(work: Work) -> Work:
    assert work.contract is not None
    assert work.attention is not None
    sample = sum(at.nbytes for at in work.contract.fields.values())
    profile = ModelProfile(
        name=work.built.name,
        device_kind=work.job.cluster.device.kind,
        sequence_length=work.job.train.sequence_length,
        parameters=work.parameters,
        buffer_bytes=buffer_bytes(work.built.module),
        units=work.units,
        cuts=work.cuts,
        edges=work.edges,
        tensor_parallelism=work.tensor_parallelism,
        context_parallelism=work.context_parallelism,
        expert_layers=work.expert_layers,
        attention=dict(work.attention),
        init=work.init,
        input_bytes=Affine(0, sample),
        local_sources=work.local_sources,
        packages=work.packages,
        warnings=work.warnings,
        digest="",
    )
    return replace(work, profile=replace(profile, digest=digest(profile)))


PASSES: tuple[Callable[[Work], Work], ...] = (
    _build,
    _check_contract,
    _trace,
    _make_units,
    _compile,
    _collect_parameters,
    _follow_flow,
    _find_roles,
    _find_parallelism,
    _measure_divided,
    _decide_init,
    _find_sources,
    _assemble,
)


def run_passes(
    job: JobSpec, folder: Path, dtypes: Sequence[ComputeDtypeName], *, compiled: bool = False
) -> ModelProfile:
    """Runs the passes in order and verifies what each returns."""
    with user_code(folder) as code:
        work = Work(job=job, code=code, dtypes=tuple(dtypes), compiled=compiled)
        for apply in PASSES:
            before, work = work, apply(work)
            verify(before, work)
    assert work.profile is not None
    return work.profile


def run_graph(job: JobSpec, folder: Path) -> nx.DiGraph[str]:
    """The graph of a job's model."""
    with user_code(folder) as code:
        work = Work(job=job, code=code, dtypes=())
        for apply in (_build, _check_contract, _follow_flow):
            work = apply(work)
        return make_graph(_export(work))


def verify(before: Work, work: Work) -> None:
    """What must hold after every pass of what it has changed; a failure is an error of ours."""
    paths = [path for unit in work.units for path in unit.paths]
    if work.units:
        assert paths == [block.path for block in work.blocks], "every block belongs to one unit, in order"
        assert [unit.kind for unit in work.units].count("head") == 1
    for unit in work.units if work.units is not before.units else ():
        assert set(unit.costs) == set(work.dtypes)
        for cost in unit.costs.values():
            amounts = [*cost.saved.values(), *cost.backward_peak.values(), cost.output, cost.forward_peak]
            assert all(amount.at(1) >= 0 and amount.slope >= 0 for amount in amounts), unit.paths
        assert set(unit.divided) <= set(work.tensor_parallelism.degrees)
        assert all(set(costs) == set(work.dtypes) for costs in unit.divided.values())
    if work.parameters is not before.parameters:
        total = sum(parameter.numel() for parameter in work.built.module.parameters())
        assert sum(parameter.numel for parameter in work.parameters) == total, "every parameter counts once"
        assert all(-1 <= parameter.unit < len(work.units) for parameter in work.parameters)
    if work.flow is not before.flow and paths:
        assert [cut.after for cut in work.cuts] == [EMBEDDING, *paths]
