"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Job = Annotated[Path, typer.Argument(metavar="JOB", help="The job file.")]
JobOrPlan = Annotated[
    Path, typer.Argument(metavar="JOB_OR_PLAN", help="A job file, a plan, or a folder written by `compile`.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Set one key of what is read; may be repeated."),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Profile the model anew, even if a profile of it is kept.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
