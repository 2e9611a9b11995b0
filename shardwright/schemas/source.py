"""From a job file, or a plan file, to checked values. Everything wrong in it is reported at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from shardwright.schemas.checks import check_job
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.cluster_source import resolve_cluster
from shardwright.schemas.diagnostics import Diagnostic, InputError, shown
from shardwright.schemas.editor_schema import job_schema, plan_schema
from shardwright.schemas.explain import Form, arranged, explain
from shardwright.schemas.job import JobSpec
from shardwright.schemas.job_files import check_data_files, check_model_files
from shardwright.schemas.nodes import Key, Node, best_span, child, diagnostic, dotted, parts_of, place, plain
from shardwright.schemas.overrides import apply_overrides
from shardwright.schemas.plan import SCHEMA_VERSION, Plan
from shardwright.schemas.reading import read_tree

Locate = Callable[[InputError], InputError]
"""Adds file, line, column and excerpt to diagnostics that carry only a key."""


@dataclass(frozen=True, slots=True)
class LoadedJob:
    """A checked job, and where it came from."""

    job: JobSpec
    path: Path
    folder: Path
    """Relative paths of the job start here."""
    defaults: tuple[str, ...]
    """Dotted keys that the person did not write, in the order of the schema. `cluster` has `ClusterSpec.sources`."""
    locate: Locate


@dataclass(frozen=True, slots=True)
class LoadedPlan:
    """A checked plan, and where it came from. Whether its decision makes sense, the planner says."""

    plan: Plan
    path: Path
    folder: Path
    job_folder: Path
    """Relative paths of the plan's job start here."""
    locate: Locate


def load_job(
    path: Path, overrides: Sequence[str] = (), *, check_model: bool = True, check_data: bool = True
) -> LoadedJob:
    """The job in the YAML (or `.json`) file at `path`, with `--set` overrides applied.

    `check_model` and `check_data` look whether the files that the job names exist and fit; without them the job may be
    read on a machine that does not have them. Raises InputError with every error that can be told.
    """
    folder = path.parent
    root = _mapping(read_tree(path), "a job is a mapping: model, data, train, cluster")
    if isinstance(root.value, dict) and {"decision", "prediction"} <= set(root.value):
        raise InputError(Diagnostic(message="this is a plan, not a job", file=str(path)))
    root = apply_overrides(root, overrides)
    problems: list[Diagnostic] = []
    cluster, root = _cluster(root, folder, problems)
    job = _job(root, cluster, problems)
    if job is None or problems:
        raise InputError(arranged(problems))
    defaults = tuple(_unwritten(job))
    problems += check_job(job, written=lambda key: key not in defaults)
    problems += check_model_files(job, folder) if check_model else ()
    problems += check_data_files(job, folder) if check_data else ()
    locate = _locator(root)
    if problems:
        raise InputError(arranged(locate(InputError(problems)).diagnostics))
    return LoadedJob(job, path, folder, defaults, locate)


def load_plan(path: Path, overrides: Sequence[str] = (), *, check_model: bool = True) -> LoadedPlan:
    """The plan in the JSON file at `path`, with `--set` overrides applied (`decision.micro_batch=2`).

    `check_model` looks whether the model's files are where the plan says. The data are not looked for: a plan may be
    read where they are not. Raises InputError with every error that can be told.
    """
    root = apply_overrides(_mapping(read_tree(path), "a plan is a mapping, as `shardwright plan` writes it"), overrides)
    version, _, found = place(root, ("schema_version",))
    if not found or version.value != SCHEMA_VERSION:
        message = f"expected `schema_version` {SCHEMA_VERSION}, found {shown(plain(version)) if found else 'none'}"
        suggestion = "plan the job again with this version of shardwright"
        raise InputError(diagnostic(best_span(root, ("schema_version",)), ("schema_version",), message, suggestion))
    form = Form(Plan, plan_schema())
    try:
        plan = Plan.model_validate_json(json.dumps(plain(root)), strict=True)
    except ValidationError as error:
        raise InputError(arranged(explain(error, root, form))) from None
    job_folder = (path.parent / plan.job_file).parent
    problems = [*check_job(plan.job, written=lambda key: key not in plan.defaults)]
    problems += check_model_files(plan.job, job_folder) if check_model else ()
    locate = _locator(root)
    if problems:
        raise InputError(arranged(locate(InputError(problems)).diagnostics))
    return LoadedPlan(plan, path, path.parent, job_folder, locate)


def _mapping(root: Node, expectation: str) -> Node:
    if not isinstance(root.value, dict):
        raise InputError(diagnostic(root.span, (), f"expected a mapping, found {shown(plain(root))}", expectation))
    return root


def _cluster(root: Node, folder: Path, problems: list[Diagnostic]) -> tuple[ClusterSpec | None, Node]:
    """The resolved cluster, and the tree in which `cluster` is the tree that describes it. Collects problems."""
    if child(root, "cluster") is None:
        return None, root
    try:
        return resolve_cluster(root, folder)
    except InputError as error:
        problems += error.diagnostics
        return None, root


def _job(root: Node, cluster: ClusterSpec | None, problems: list[Diagnostic]) -> JobSpec | None:
    """The job with its cluster put in, or None. Collects problems; those of the cluster are known already."""
    values: dict[str, Any] = plain(root)
    if cluster is not None:
        values["cluster"] = cluster.model_dump(mode="json")
    form = Form(JobSpec, job_schema())
    try:
        return JobSpec.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        known = bool(problems)
        problems += [each for each in explain(error, root, form) if not (known and each.key.startswith("cluster"))]
        return None


def _unwritten(spec: BaseModel, key: Key = (), given: bool = True) -> Iterator[str]:
    """Dotted keys whose values are defaults; of a part that was not `given`, each key of it."""
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        written = given and name in spec.model_fields_set
        if isinstance(value, BaseModel) and not isinstance(value, ClusterSpec):
            yield from _unwritten(value, (*key, name), written)
        elif not written:
            yield dotted((*key, name))
        elif isinstance(value, tuple):
            for place, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _unwritten(item, (*key, name, place))


def _locator(root: Node) -> Locate:
    """`locate` for errors in the file whose tree is `root`. In a plan, keys of the job lie below `job`."""

    def located(each: Diagnostic) -> Diagnostic:
        if each.file or not each.key:
            return replace(each, file=each.file or root.span.source.label)
        key, in_job = parts_of(root, each.key), parts_of(root, f"job.{each.key}")
        if place(root, in_job)[2] - 1 > place(root, key)[2]:
            key = in_job
        # A single value that stands for a list has no index.
        while key and str(key[-1]).isdecimal() and place(root, key)[2] < len(key):
            key = key[:-1]
        return diagnostic(best_span(root, key), key, each.message, each.suggestion)

    def locate(error: InputError) -> InputError:
        return InputError(map(located, error.diagnostics))

    return locate
