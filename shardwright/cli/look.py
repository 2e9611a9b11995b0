"""Commands that only look: `check`, `profile`, `inspect`, `schema`, `devices`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from shardwright import report
from shardwright.cli.arguments import AsJson, Job, JobOrPlan, Overrides
from shardwright.cli.outcome import MADE, no_plan
from shardwright.cli.terminal import show, show_json
from shardwright.cli.work import located, plan_to_show, profile_job, read_job
from shardwright.schemas import catalogue
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.editor_schema import job_schema, plan_schema
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


def profile(
    job: Job,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences of one forward.")] = 1,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Compute dtype; bf16 where a plan may use it.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print what the model costs, unit by unit.

    Parameters, FLOPs and bytes of one micro-batch on one device, hardware aside.

    \b
    Example:
      shardwright profile job.yaml --micro-batch 4
    """
    loaded = read_job(job, overrides or ())
    with located(loaded):
        found = profile_job(loaded.job, loaded.folder)
    if as_json:
        from shardwright.passes import profile_to_json

        show_json(profile_to_json(found))
    else:
        show(report.draw_profile(found, micro_batch, _dtype(found, dtype)))


def _dtype(found: ModelProfile, wanted: ComputeDtypeName | None) -> ComputeDtypeName:
    """The wanted dtype, or bf16 where it was profiled. Raises InputError for one that no plan of the job may use."""
    if wanted is None:
        return "bf16" if "bf16" in found.attention else "fp32"
    if wanted not in found.attention:
        known = ", ".join(found.attention)
        raise InputError(
            Diagnostic(
                message=f"--dtype {wanted}: no plan of this job computes in it", suggestion=f"it may use {known}"
            )
        )
    return wanted


def inspect(
    source: JobOrPlan,
    why: Annotated[str | None, typer.Option(metavar="KEY", help="Explain one key of the decision.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Show everything that a plan says.

    Memory by phase, time by part, collectives, reasons, alternatives, assumptions. A plan is shown as it was saved;
    with --set it is predicted again.

    \b
    Examples:
      shardwright inspect run/plan.json
      shardwright inspect plan.json --why micro_batch
      shardwright inspect plan.json --set decision.micro_batch=4
    """
    made = plan_to_show(source, overrides or ())
    if isinstance(made, Infeasible):
        return no_plan(made, as_json)
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
