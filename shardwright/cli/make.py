"""Commands that make something: `init`, `plan`, `compile`, `rehearse`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from shardwright import report
from shardwright.cli.arguments import AsJson, Job, JobOrPlan, NoCache, Overrides
from shardwright.cli.files import (
    check_emission_target,
    check_empty,
    check_plan_target,
    create,
    write_atomically,
    writing,
)
from shardwright.cli.outcome import ANSWER_IS_NO, MADE, no_plan
from shardwright.cli.terminal import doing, json_text, say, show, show_json
from shardwright.cli.work import job_folder, located, plan_job, plan_or_predict, read_job, read_job_or_plan
from shardwright.schemas.cluster import Launcher
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Infeasible, json_fields

START: dict[Launcher, Callable[[Path], str]] = {
    "torchrun": lambda folder: f"bash {shlex.quote(str(folder / 'launch.sh'))}",
    # train.slurm runs in the folder that sbatch was called from.
    "slurm": lambda folder: f"cd {shlex.quote(str(folder))} && sbatch train.slurm",
}
"""The command that starts an emitted folder, by `cluster.launcher`."""


def init(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to write; made if need be.")] = Path("."),
) -> None:
    """Write a commented job.yaml and a small model.py to start from.

    Nothing that exists is overwritten, and nothing is asked.

    \b
    Example:
      shardwright init my-job
    """
    starter = files("shardwright.cli") / "starter"
    targets = [(folder / name, (starter / name).read_text(encoding="utf-8")) for name in ("job.yaml", "model.py")]
    taken = [path for path, _ in targets if path.exists()]
    if taken:
        way_out = "name another folder, or move the file away"
        raise InputError(
            Diagnostic(file=str(path), message="exists already, and is left as it is", suggestion=way_out)
            for path in taken
        )
    for path, text in targets:
        create(path, text)
        show(Text(f"wrote {path}"))
    say(f"next: shardwright plan {folder / 'job.yaml'}")


def plan(
    job: Job,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="PLAN", help="Also write plan.json.")] = None,
    overrides: Overrides = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> int:
    """Print the fastest plan that fits, and why.

    What was decided, what it is predicted to cost, and what came closest.

    \b
    Examples:
      shardwright plan job.yaml
      shardwright plan job.yaml --set budget.device_memory=40GiB -o plan.json
    """
    if output is not None:
        check_plan_target(output)
    made = plan_job(read_job(job, overrides or ()), output.parent if output else Path(), cached=not no_cache)
    if isinstance(made, Infeasible):
        return no_plan(made, as_json)
    if output is not None:
        write_atomically(output, json_text(json_fields(made)))
        say(f"wrote {output}")
    if as_json:
        show_json(json_fields(made))
    else:
        show(report.draw_plan(made))
    return MADE


def compile_(
    source: JobOrPlan,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to write.")],
    overrides: Overrides = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> int:
    """Write the training script of a job or of a plan.

    Of a job, the fastest plan is compiled. The `decision` of a plan may have been edited by hand: it is checked and
    predicted again. DIR must be new, empty, or written by `compile` before: then its files are replaced, and
    checkpoints and the rest stay.

    \b
    Examples:
      shardwright compile job.yaml -o run
      shardwright compile run/plan.json --set decision.micro_batch=2 -o run2
    """
    check_emission_target(output)
    loaded = read_job_or_plan(source, overrides or ())
    made = plan_or_predict(loaded, output, cached=not no_cache)
    if isinstance(made, Infeasible):
        return no_plan(made, as_json)
    from shardwright.backends.emission import write
    from shardwright.backends.pytorch import emit

    with located(loaded):
        emission = emit(made, job_folder(loaded), output)
    with writing(output):
        kept = write(emission, output)
    for name in kept:
        say(f"{name} was there and has changed: the former one is {name}.old")
    if as_json:
        show_json({"plan": made.name, "folder": str(output), "files": sorted(emission.files)})
    else:
        show(report.draw_emission(made, str(output), emission.files))
        say(f"next: {START[made.job.cluster.launcher](output)}")
    return MADE


def rehearse(
    source: JobOrPlan,
    processes: Annotated[int, typer.Option(min=1, help="Most processes to start.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 4,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the scripts, logs and checkpoints of the runs here.")
    ] = None,
    overrides: Overrides = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> int:
    """Prove a plan on this machine's CPU.

    The plan is shrunk to a few processes, compiled, run for a few steps, and compared with one process: losses,
    gradient norms, parameters, bytes at rest, collectives.

    \b
    Example:
      shardwright rehearse job.yaml --processes 4
    """
    if keep is not None:
        check_empty(keep)
    loaded = read_job_or_plan(source, overrides or ())
    made = plan_or_predict(loaded, Path(), cached=not no_cache)
    if isinstance(made, Infeasible):
        return no_plan(made, as_json)
    from shardwright.rehearse import rehearse as run

    with located(loaded), doing("rehearsing") as progress:
        result = run(made, job_folder(loaded), processes=processes, steps=steps, keep=keep, progress=progress)
    if as_json:
        show_json(report.rehearsal_fields(result))
    else:
        show(report.draw_rehearsal(result))
    return MADE if result.passed else ANSWER_IS_NO
