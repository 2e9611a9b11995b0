"""Commands that only look: `check`, `profile`, `inspect`, `schema`, `devices`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Group
from rich.text import Text

from shardwright import report
from shardwright.cli.arguments import AsJson, Job, JobOrPlan, NoCache, Overrides
from shardwright.cli.files import check_drawing_target, write_atomically
from shardwright.cli.outcome import MADE, no_plan
from shardwright.cli.terminal import say, show, show_json
from shardwright.cli.timetables import check_targets, draw_to_files
from shardwright.cli.work import located, plan_to_show, profile_job, read_job
from shardwright.schemas import catalogue
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.editor_schema import job_schema, plan_schema
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Infeasible, json_fields
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile


def check(job: Job, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a job, and print what was understood.

    Every key is shown with its value, the defaults and the numbers of the catalogue too.

    \b
    Example:
      shardwright check job.yaml --set train.steps=1000
    """
    loaded = read_job(job, overrides or ())
    if as_json:
        facts = report.job_facts(loaded.job)
        show_json({"job": loaded.job.model_dump(mode="json"), "defaults": list(loaded.defaults), **facts})
    else:
        show(report.draw_job(loaded.job, loaded.defaults))


_DRAWINGS: dict[str, Callable[[ModelProfile, int, ComputeDtypeName], str]] = {
    ".svg": report.profile_svg,
    ".html": report.profile_html,
}
"""What `--graph` draws, by the ending of the file."""


def profile(
    job: Job,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences of one forward.")] = 1,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Compute dtype; bf16 where a plan may use it.")
    ] = None,
    operators: Annotated[bool, typer.Option("--operators", help="Also list the operators of each unit.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also profile the blocks as torch.compile makes them.")
    ] = False,
    graph: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the model to FILE.svg or FILE.html.")
    ] = None,
    overrides: Overrides = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> None:
    """Print what the model costs, unit by unit.

    Parameters, FLOPs and bytes of one micro-batch on one device, hardware aside. The drawing shows the units, what
    passes between them, where the model can be cut, skip connections and shared weights. A profile is kept
    (~/.cache/shardwright, or where SHARDWRIGHT_CACHE says; `off` for nowhere) until the model or what is installed
    changes.

    \b
    Examples:
      shardwright profile job.yaml --micro-batch 4
      shardwright profile job.yaml --operators --graph model.svg
    """
    if graph is not None:
        check_drawing_target(graph, _DRAWINGS)
    loaded = read_job(job, overrides or ())
    shown = _dtype(loaded.job, dtype)
    with located(loaded):
        found = profile_job(
            loaded.job,
            loaded.folder,
            cached=not no_cache,
            only=None if as_json else shown,
            compiled=compiled,
            warned=as_json,
        )
    view = found, micro_batch, shown
    if graph is not None:
        write_atomically(graph, _DRAWINGS[graph.suffix](*view))
        say(f"wrote {graph}")
    if as_json:
        from shardwright.passes import profile_to_json

        show_json(profile_to_json(found))
    else:
        show(report.draw_profile(*view))
        if operators:
            show(Group(Text(), report.draw_operators(*view)))


def _dtype(job: JobSpec, wanted: ComputeDtypeName | None) -> ComputeDtypeName:
    """The wanted dtype, or bf16 where a plan may use it. Raises InputError for one that no plan of the job may use."""
    from shardwright.planner import needed_dtypes

    possible = needed_dtypes(job)
    if wanted is None:
        return "bf16" if "bf16" in possible else possible[0]
    if wanted not in possible:
        message = f"--dtype {wanted}: no plan of this job computes in it"
        raise InputError(Diagnostic(message=message, suggestion=f"it may use {', '.join(possible)}"))
    return wanted


def inspect(
    source: JobOrPlan,
    why: Annotated[str | None, typer.Option(metavar="KEY", help="Explain one key of the decision.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the pipeline's timetable to FILE.svg.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the timetable for Perfetto to FILE.json.")
    ] = None,
    overrides: Overrides = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> int:
    """Show everything that a plan says.

    Stages and timetable of a pipeline, memory by phase, time by part, collectives, reasons, alternatives, assumptions.
    A plan is shown as it was saved; with --set it is predicted again.

    \b
    Examples:
      shardwright inspect run/plan.json
      shardwright inspect plan.json --why micro_batch
      shardwright inspect plan.json --set decision.micro_batch=4
      shardwright inspect plan.json --svg timetable.svg
    """
    check_targets(svg, trace)
    made = plan_to_show(source, overrides or (), cached=not no_cache)
    if isinstance(made, Infeasible):
        return no_plan(made, as_json)
    if svg is not None or trace is not None:
        draw_to_files(report.schedule_of(made), svg, trace)
    if as_json:
        show_json(report.why_fields(made, why) if why else json_fields(made))
    else:
        show(report.draw_why(made, why) if why else report.draw_inspection(made))
    return MADE


_SCHEMAS = {"job": job_schema, "plan": plan_schema}


def schema(
    kind: Annotated[Literal["job", "plan"], typer.Argument(help="Which file the schema describes.")] = "job",
) -> None:
    """Print the JSON Schema of job files or of plans.

    \b
    Example:
      shardwright schema job > job.schema.json
    """
    show_json(_SCHEMAS[kind]())


def devices(as_json: AsJson = False) -> None:
    """List the devices that a job may name.

    \b
    Example:
      shardwright devices
    """
    found = [(catalogue.device(name)[0], catalogue.title(name)) for name in catalogue.device_names()]
    if as_json:
        show_json([{"title": title, **device.model_dump(mode="json")} for device, title in found])
    else:
        show(report.draw_devices(found))
