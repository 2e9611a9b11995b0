"""The program: its commands in the order of `--help`, and what all of them share."""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import shardwright
from shardwright.cli import look, make
from shardwright.cli.outcome import MADE, TRACEBACK, command
from shardwright.cli.schedule import schedule

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"shardwright {shardwright.__version__}")
        raise typer.Exit(MADE)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback", envvar="SHARDWRIGHT_TRACEBACK", show_envvar=True, help="Show a bug with its traceback."
        ),
    ] = False,
) -> None:
    """Describe a training job in YAML; get the fastest plan that fits, and a PyTorch script that you own.

    \b
    Start here:
      shardwright init my-job && cd my-job
      shardwright plan job.yaml
      shardwright compile job.yaml -o run
      bash run/launch.sh

    Exit codes: 0 made, 1 no plan fits (or a rehearsal failed), 2 the input is wrong, 3 a bug of ours.
    """
    TRACEBACK.set(traceback)


_COMMANDS: dict[str, Callable[..., int | None]] = {
    "init": make.init,
    "check": look.check,
    "profile": look.profile,
    "plan": make.plan,
    "compile": make.compile_,
    "inspect": look.inspect,
    "rehearse": make.rehearse,
    "schedule": schedule,
    "schema": look.schema,
    "devices": look.devices,
}
for _name, _function in _COMMANDS.items():
    app.command(_name)(command(_function))


def main() -> None:
    """The console command. Never raises: ends the process with one of the exit codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a sign is no reason to fail
    gc.disable()  # the process is short: walking all of torch for garbage takes longer than what it would free is worth
    try:
        app(prog_name="shardwright")
    finally:
        gc.freeze()  # at its end Python looks for garbage whether that is disabled or not
