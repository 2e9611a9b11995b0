"""What becomes of a command: its exit code, and what is said when it fails.

0: made. 1: the answer is no (no plan fits, a rehearsal failed). 2: the input is wrong. 3: a bug of ours.
130: interrupted. 141: the reader of our output has gone.
"""

from __future__ import annotations

import functools
import shlex
import sys
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import typer
from rich.text import Text

from shardwright.cli.terminal import hush_stdout, say, show, show_json
from shardwright.report import diagnostic_fields, draw_infeasible, draw_input_error
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.plan import Infeasible

MADE, ANSWER_IS_NO, INPUT_IS_WRONG, BUG = 0, 1, 2, 3
INTERRUPTED, READER_GONE = 128 + 2, 128 + 13
"""As a shell reports SIGINT and SIGPIPE."""

TRACEBACK = ContextVar("TRACEBACK", default=False)
"""Whether a bug is shown with its traceback."""


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """Makes a function a command: it may raise, and returns its exit code or None for 0.

    With `as_json`, stdout holds exactly one JSON value even when the input is wrong.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        raise typer.Exit(_exit_code(functools.partial(function, *args, **kwargs), bool(kwargs.get("as_json"))))

    return run


def _exit_code(run: Callable[[], int | None], as_json: bool) -> int:
    try:
        code = run() or MADE
        sys.stdout.flush()
        return code
    except InputError as error:
        if as_json:
            show_json({"diagnostics": [diagnostic_fields(one) for one in error.diagnostics]})
        say(draw_input_error(error))
        return INPUT_IS_WRONG
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        hush_stdout()
        return READER_GONE
    except Exception as error:
        _say_bug(error)
        return BUG


def _say_bug(error: Exception) -> None:
    if TRACEBACK.get():
        say("".join(traceback.format_exception(error)).rstrip(), style="")
    summary = "".join(traceback.format_exception_only(error)).strip()
    say(Text.assemble(("bug: ", "bold red"), summary))
    again = shlex.join(["shardwright", "--traceback", *sys.argv[1:]])
    way = "with your job file and the traceback above" if TRACEBACK.get() else f"with the output of\n  {again}"
    say(f"This is a mistake in shardwright, not in your input. Please report it {way}", style="")


def no_plan(result: Infeasible, as_json: bool) -> int:
    """Says that nothing fits, and what would; returns the exit code."""
    if as_json:
        show_json({"infeasible": result.model_dump(mode="json")})
    else:
        show(draw_infeasible(result))
    return ANSWER_IS_NO
