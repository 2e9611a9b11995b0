"""The rehearsal of a plan: shrink, compile, run, compare."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from shardwright.planner.space import point_of
from shardwright.rehearse.compare_layout import own_stages, stages_named
from shardwright.rehearse.launch import Failure, Launch, run
from shardwright.rehearse.report_types import Check, RehearsalReport, Run
from shardwright.rehearse.shrink import SmallJob, exactly, pinned, reference, shrink, with_stages
from shardwright.rehearse.shrink_pipeline import pipeline_changes
from shardwright.rehearse.trials import Trial, trials
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Decision, Plan
from shardwright.schemas.profile import ModelProfile
from shardwright.schemas.units import human_bytes, human_count

LEAST_STEPS = 3
"""DistributedDataParallel regroups its buckets in the second step; the last one must be a steady one."""

_BYTES_PER_PARAMETER = 32
"""Parameter, gradient and two moments of four bytes, and as much again while they are initialised and saved."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The scripts of one trial, compiled: the plan's, and that of one process."""

    of: Trial
    plan: Plan
    launch: Launch
    alone: Plan
    launch_alone: Launch


def rehearse(
    plan: Plan,
    folder: Path,
    *,
    processes: int = 8,
    steps: int = 4,
    keep: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> RehearsalReport:
    """Prove a plan on this machine's CPU with at most `processes` processes and `steps` optimizer steps.

    `folder`: where relative paths of the job start. `keep`: an empty or new folder for scripts, logs and checkpoints;
    without it they are removed. Raises InputError if `processes` or `steps` are too few, or if the model stays too
    large for this machine.
    """
    _check_request(plan, processes, steps)
    with _workplace(keep) as workplace:
        small = shrink(plan, folder, processes=processes, steps=steps)
        progress("profiling the shrunk model")
        profile = profile_small(small, plan.decision, folder)
        _check_size(profile, small)
        wanted = trials(plan, routes=bool(profile.expert_layers))
        pairs = [compile_trial(small, plan, profile, one, folder, workplace) for one in wanted]
        runs, checks, failure = _run(pairs, profile, workplace, progress)
    return RehearsalReport(
        plan=plan.name,
        rehearsed=pairs[0].plan.name,
        processes=small.mesh.world_size,
        steps=steps,
        shrunk=(*small.changes, *pipeline_changes(plan.decision, pairs[0].plan.decision)),
        runs=tuple(runs),
        checks=tuple(checks),
        error=failure.message if failure else "",
        log=failure.log if failure else (),
        kept=str(keep) if keep else "",
    )


def _check_request(plan: Plan, processes: int, steps: int) -> None:
    if plan.decision.mesh.world_size > 1 and processes < 2:
        message = f"a plan for {plan.decision.mesh.world_size} devices cannot be rehearsed by one process"
        raise InputError(Diagnostic(key="--processes", message=message, suggestion="allow at least 2"))
    if steps < LEAST_STEPS:
        message = f"{steps} steps are too few: the collectives of the first two are not those of the others"
        raise InputError(Diagnostic(key="--steps", message=message, suggestion=f"run at least {LEAST_STEPS}"))


def profile_small(small: SmallJob, decision: Decision, folder: Path) -> ModelProfile:
    """The profile of the shrunk model, which serves every trial. Raises InputError for a wrong model."""
    from shardwright.passes import profile_model

    return profile_model(small.job, folder, ("fp32", "bf16") if decision.precision == "bf16_mixed" else ("fp32",))


def _check_size(profile: ModelProfile, small: SmallJob) -> None:
    needed = profile.numel * _BYTES_PER_PARAMETER * small.mesh.world_size
    available = _free_memory()
    if needed > available:
        raise InputError(
            Diagnostic(
                key="model.rehearse",
                message=f"the shrunk model still has {human_count(profile.numel)} parameters: {small.mesh.world_size}"
                f" processes need {human_bytes(needed)}, and this machine has {human_bytes(available)} free",
                suggestion="name smaller sizes there, for example {layers: 2, width: 64} with the model's own names",
            )
        )


def _free_memory() -> int:
    """Bytes that programs may still take; where the system does not say, all it has."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _workplace(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise InputError(Diagnostic(file=str(keep), message="is not empty, so nothing is kept there"))
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="shardwright-rehearsal-") as temporary:
        yield Path(temporary).resolve()


def compile_trial(
    small: SmallJob, plan: Plan, profile: ModelProfile, one: Trial, folder: Path, workplace: Path
) -> Pair:
    """Write the scripts of one trial below `workplace`: the shrunk plan's, and that of one process."""
    from shardwright.planner.recipe import fitting

    optimizer = fitting(one.optimizer, profile.parameters)
    job = pinned(small, plan.decision, optimizer, one.precision, len(profile.block_paths))
    micro_batch = small.micro_batch if one.same_micro_batches else small.job.train.global_batch_sequences
    alone = reference(small, optimizer, one.precision, micro_batch)
    name = one.name.replace(", ", "-").replace(" ", "-")
    own, single = _own_plan(small, job, plan, profile, one), _only_plan(alone, plan, profile)
    launch = _emit(own, folder, workplace / name / "plan")
    return Pair(one, own, launch, single, _emit(single, folder, workplace / name / "one-process"))


def _own_plan(small: SmallJob, job: JobSpec, plan: Plan, profile: ModelProfile, one: Trial) -> Plan:
    """The plan of the pinned job, over all axes or with all stages of the plan."""
    from shardwright.planner import evaluate
    from shardwright.planner.predict import Predictor

    if small.pipeline is not None:
        wanted = with_stages(small, small.pipeline, plan.decision, Predictor(job, profile), one.precision)
        shrunk = plan.model_copy(update={"job": job, "decision": wanted, "defaults": ()})
        return evaluate(shrunk, profile)
    own = _only_plan(job, plan, profile)
    wanted = exactly(small, plan.decision, own.decision, fewer_bits=one.fewer_bits)
    return own if wanted == own.decision else evaluate(own.model_copy(update={"decision": wanted}), profile)


def _only_plan(job: JobSpec, plan: Plan, profile: ModelProfile) -> Plan:
    from shardwright.planner import make_plan

    found = make_plan(job, profile, job_file=plan.job_file, defaults=())
    if not isinstance(found, Plan):
        raise RuntimeError(f"the shrunk plan does not fit: {found.changes}")
    return found


def _emit(plan: Plan, folder: Path, out: Path) -> Launch:
    from shardwright.backends.emission import write
    from shardwright.backends.pytorch import emit

    write(emit(plan, folder, out), out)
    return Launch(folder=str(out), processes=plan.decision.mesh.world_size, steps=plan.job.train.total_steps)


def _run(
    pairs: Sequence[Pair], profile: ModelProfile, workplace: Path, progress: Callable[[str], None]
) -> tuple[list[Run], list[Check], Failure | None]:
    from shardwright.rehearse.verdict import check_pair

    runs: list[Run] = []
    checks: list[Check] = []
    launches = [launch for pair in pairs for launch in (pair.launch_alone, pair.launch)]
    # What profiling has imported of the model's packages, every process would import again.
    modules = sorted(name for name in sys.modules if name.split(".")[0] in profile.packages)
    with closing(run(launches, modules, workplace)) as outcomes:
        for pair in pairs:
            seconds = 0.0
            for what in ("one process", pair.plan.name):
                progress(f"{pair.of.name}: {what}")
                outcome = next(outcomes)
                if isinstance(outcome, Failure):
                    return runs, checks, _told(outcome, pair, what)
                seconds += outcome
            runs.append(Run(name=pair.of.name, seconds=seconds))
            checks += check_pair(pair.of, pair.plan, Path(pair.launch.folder), Path(pair.launch_alone.folder), profile)
    return runs, checks, None


def _told(failure: Failure, pair: Pair, what: str) -> Failure:
    """With what ran, and which stages the process has that failed."""
    pipe = point_of(pair.plan.decision).pipe
    stages = ""
    if failure.process is not None and pipe is not None and what == pair.plan.name:
        own = own_stages(pipe, pair.plan.decision.mesh.world_size, failure.process)
        stages = f"; it has {stages_named(own)}"
    return replace(failure, message=f"{pair.of.name}, {what}: {failure.message}{stages}")
