"""The passes, and the loop that runs them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import nn

from shardwright.passes.blocks import Block
from shardwright.passes.build import Built, build_model
from shardwright.passes.contract import Contract, make_contract
from shardwright.passes.fit import NotAffine
from shardwright.passes.graph import find_cuts
from shardwright.passes.imports import UserCode, user_code
from shardwright.passes.initialise import decide_init
from shardwright.passes.parameters import buffer_bytes, collect_parameters
from shardwright.passes.serialise import digest
from shardwright.passes.sources import elsewhere, local_sources, packages
from shardwright.passes.step_run import EMBEDDING, StepRun
from shardwright.passes.trace import Tracer
from shardwright.passes.units import make_units
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import Affine, ComputeDtypeName, Cut, ModelProfile, Parameter, Unit


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the passes know so far. Each pass returns another with more in it."""

    job: JobSpec
    code: UserCode
    dtypes: tuple[ComputeDtypeName, ...]
    built: Built = field(default_factory=lambda: Built(nn.Module(), "", False))
    contract: Contract | None = None
    blocks: tuple[Block, ...] = ()
    traces: Mapping[ComputeDtypeName, Sequence[StepRun]] | None = None
    attention: Mapping[ComputeDtypeName, str] | None = None
    units: tuple[Unit, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    cuts: tuple[Cut, ...] = ()
    init: Literal["constructor", "modules"] = "constructor"
    local_sources: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    profile: ModelProfile | None = None

    @property
    def tracer(self) -> Tracer:
        """Traces the model under its contract."""
        assert self.contract is not None
        return Tracer(self.built, self.contract, self.code, self.job.cluster.device.kind)


def _build(work: Work) -> Work:
    return replace(work, built=build_model(work.job.model, work.code))


def _check_contract(work: Work) -> Work:
    contract = make_contract(work.job, work.built, work.code)
    work = replace(work, contract=contract)
    return replace(work, blocks=work.tracer.choose_blocks())


def _trace(work: Work) -> Work:
    traced = {dtype: work.tracer.trace(work.blocks, dtype) for dtype in work.dtypes}
    return replace(
        work,
        traces={dtype: steps for dtype, (steps, _) in traced.items()},
        attention={dtype: kernel for dtype, (_, kernel) in traced.items()},
    )


def _make_units(work: Work) -> Work:
    assert work.traces is not None
    try:
        return replace(work, units=make_units(work.traces))
    except NotAffine as error:
        message = f"the cost of the model does not grow linearly with the micro-batch; {error}"
        hint = "let no branch, shape or loop of forward depend on the size of the first dimension"
        raise InputError(Diagnostic(key=work.built.key, message=message, suggestion=hint)) from error


def _collect_parameters(work: Work) -> Work:
    return replace(work, parameters=collect_parameters(work.built, work.units))


def _find_cuts(work: Work) -> Work:
    assert work.contract is not None
    try:
        return replace(work, cuts=find_cuts(work.built, work.contract, work.units))
    except Exception as error:  # whatever torch.export raises: its errors have no common class
        place = work.code.where(error)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warning = f"torch.export cannot trace the model{place}: {first}; cuts are taken at module boundaries"
        return replace(work, cuts=_module_boundaries(work), warnings=(*work.warnings, warning))


def _module_boundaries(work: Work) -> tuple[Cut, ...]:
    """Cuts by what each block returns, where there is no graph to tell what else is alive."""
    if not work.blocks or work.traces is None:
        return ()
    dtype = work.dtypes[0]
    cuts = []
    for unit in work.units[:-1]:
        size = unit.costs[dtype].output.at(1)
        cuts += [Cut(after=path, tensors=1, bytes=size) for path in unit.paths or (EMBEDDING,)]
    return tuple(cuts)


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
    _collect_parameters,
    _find_cuts,
    _decide_init,
    _find_sources,
    _assemble,
)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected: reference cycles in the user's code then keep what they hold in every run alike, and the
    collector does not walk the whole of torch again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def run_passes(job: JobSpec, folder: Path, dtypes: Sequence[ComputeDtypeName]) -> ModelProfile:
    """Runs the passes in order and verifies what each returns."""
    with user_code(folder) as code, _no_collection():
        work = Work(job=job, code=code, dtypes=tuple(dtypes))
        for apply in PASSES:
            work = apply(work)
            verify(work)
    assert work.profile is not None
    return work.profile


def verify(work: Work) -> None:
    """What must hold after every pass; a failure is an error of ours."""
    paths = [path for unit in work.units for path in unit.paths]
    if work.units:
        assert paths == [block.path for block in work.blocks], "every block belongs to one unit, in order"
        assert [unit.kind for unit in work.units].count("head") == 1
    for unit in work.units:
        assert set(unit.costs) == set(work.dtypes)
        for cost in unit.costs.values():
            amounts = [*cost.saved.values(), *cost.backward_peak.values(), cost.output, cost.forward_peak]
            assert all(amount.at(1) >= 0 and amount.slope >= 0 for amount in amounts), unit.paths
    if work.parameters:
        total = sum(parameter.numel() for parameter in work.built.module.parameters())
        assert sum(parameter.numel for parameter in work.parameters) == total, "every parameter counts once"
        assert all(-1 <= parameter.unit < len(work.units) for parameter in work.parameters)
    if work.cuts:
        assert [cut.after for cut in work.cuts] == [EMBEDDING, *paths]
    if work.profile is not None:
        assert digest(work.profile) == work.profile.digest
