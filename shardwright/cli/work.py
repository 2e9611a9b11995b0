"""From a path on the command line to a job, a profile, a plan. The slow parts are imported only when they are used."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright.cli.files import PLAN_FILE, looks_like_plan
from shardwright.cli.terminal import doing, say, warn
from shardwright.report.layout import duration
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Infeasible, Plan
from shardwright.schemas.source import LoadedJob, LoadedPlan, load_job, load_plan
from shardwright.schemas.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from shardwright.schemas.job import JobSpec
    from shardwright.schemas.profile import ComputeDtypeName, ModelProfile


@contextmanager
def located(loaded: LoadedJob | LoadedPlan) -> Iterator[None]:
    """Adds file, line and column to errors that know only their key; options (`--steps`) stand in no file."""
    try:
        yield
    except InputError as error:
        known = (
            (one,) if one.key.startswith("--") else loaded.locate(InputError(one)).diagnostics
            for one in error.diagnostics
        )
        raise InputError(chain.from_iterable(known)) from error


def read_job(path: Path, overrides: Sequence[str]) -> LoadedJob:
    """Reads and checks a job file. Raises InputError, also for a plan."""
    if looks_like_plan(path):
        way_out = "name the job file; `compile` and `inspect` take plans"
        raise InputError(Diagnostic(file=str(path), message="is a plan, and a job is wanted", suggestion=way_out))
    return load_job(path, overrides)


def read_job_or_plan(path: Path, overrides: Sequence[str], *, only_shown: bool = False) -> LoadedJob | LoadedPlan:
    """Reads a job file, a plan, or the plan in a folder that `compile` wrote. A plan that is `only_shown` is read also
    where its model is not. Raises InputError.
    """
    path = path / PLAN_FILE if path.is_dir() else path
    if looks_like_plan(path):
        return load_plan(path, overrides, check_model=not only_shown)
    return read_job(path, overrides)


def profile_job(
    job: JobSpec,
    folder: Path,
    *,
    cached: bool,
    only: ComputeDtypeName | None = None,
    compiled: bool = False,
    warned: bool = True,
) -> ModelProfile:
    """Profiles the model for every dtype that a plan may use (or for `only` one of them), and says what the profile
    warns of, where that is not drawn anyway (`warned`). With `cached` a profile that was kept is taken, also one for
    more dtypes, and a new one is kept."""
    from shardwright.passes.cache import users_cache
    from shardwright.planner import needed_dtypes

    dtypes, cache = needed_dtypes(job), users_cache() if cached else None
    kept = cache.find(job, folder, dtypes, compiled=compiled) if cache else None
    if only is not None and kept is None:
        dtypes = (only,)
        kept = cache.find(job, folder, dtypes, compiled=compiled) if cache else None
    if kept is not None:
        profile = kept.profile
        say(f"profile from the cache, made {duration(max(0.0, time.time() - kept.made))} ago")
    else:
        with doing("profiling the model"):
            from shardwright import passes

            make = cache.make if cache else passes.profile_model
            profile = make(job, folder, dtypes, compiled=compiled)
    for warning in profile.warnings if warned else ():
        warn(warning)
    return profile


def plan_job(loaded: LoadedJob, folder: Path, *, cached: bool) -> Plan | Infeasible:
    """Profiles and searches, for a plan that is to lie in `folder`."""
    from shardwright.planner import make_plan

    with located(loaded):
        profile = profile_job(loaded.job, loaded.folder, cached=cached)
        with doing("searching for plans"):
            return make_plan(loaded.job, profile, job_file=relative(loaded.path, folder), defaults=loaded.defaults)


def predict_again(loaded: LoadedPlan, folder: Path, *, cached: bool) -> Plan:
    """Checks a plan whose decision may have been edited, and predicts it anew; the plan is to lie in `folder`."""
    from shardwright.planner import evaluate

    old = loaded.plan
    if not (loaded.folder / old.job_file).is_file():
        warn(f"the plan's job file {old.job_file} is not there; relative paths of the job start from its folder")
    with located(loaded):
        profile = profile_job(old.job, loaded.job_folder, cached=cached)
        if profile.digest != old.profile_digest:
            warn("the model's profile is no longer the one of this plan: it, or the tool, has changed since")
        with doing("predicting"):
            plan = evaluate(old, profile)
    _say_changes(old, plan)
    return plan.model_copy(update={"job_file": relative(loaded.job_folder / Path(old.job_file).name, folder)})


def _say_changes(old: Plan, new: Plan) -> None:
    before, after = old.prediction, new.prediction
    if before == after:
        return
    say(
        f"predicted again: step {human_seconds(before.step_time_s)} -> {human_seconds(after.step_time_s)}, reserved"
        f" {human_bytes(before.memory.peak_reserved_bytes)} -> {human_bytes(after.memory.peak_reserved_bytes)}"
    )


def plan_or_predict(loaded: LoadedJob | LoadedPlan, folder: Path, *, cached: bool) -> Plan | Infeasible:
    """The plan of a job, or a plan predicted again."""
    if isinstance(loaded, LoadedPlan):
        return predict_again(loaded, folder, cached=cached)
    return plan_job(loaded, folder, cached=cached)


def plan_to_show(path: Path, overrides: Sequence[str], *, cached: bool) -> Plan | Infeasible:
    """The plan of a job, or a saved plan as it stands; with overrides it is predicted again."""
    loaded = read_job_or_plan(path, overrides, only_shown=not overrides)
    if overrides or isinstance(loaded, LoadedJob):
        return plan_or_predict(loaded, Path(), cached=cached)
    say("as saved: if its decision was edited since, `compile` predicts the plan again")
    return loaded.plan


def job_folder(loaded: LoadedJob | LoadedPlan) -> Path:
    """The folder that relative paths of the job start from."""
    return loaded.job_folder if isinstance(loaded, LoadedPlan) else loaded.folder


def relative(path: Path, folder: Path) -> str:
    """The path as seen from a folder, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
