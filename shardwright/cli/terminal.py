"""The two streams: results on stdout, and everything said about them on stderr.

A console is made anew for each use, so that it always belongs to the streams, the width and the wish for colour of the
moment. rich honours NO_COLOR and draws plainly where there is no terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text


def _console(*, stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def show(drawing: RenderableType) -> None:
    """A result, on stdout; in a file or a pipe without the blanks that fill lines up."""
    console = _console(stderr=False)
    if console.is_terminal:
        console.print(drawing)
        return
    with console.capture() as captured:
        console.print(drawing)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def show_json(value: Any) -> None:
    """A result for a machine: one JSON value, on stdout."""
    print(json_text(value), end="")


def json_text(value: Any) -> str:
    """The form in which JSON is written, to a stream or to a file."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def say(text: str | Text, style: str = "dim") -> None:
    """A note, on stderr. It is not wrapped: `file:line:column` and carets keep their places."""
    drawn = text if isinstance(text, Text) else Text(text, style=style)
    _console(stderr=True).print(drawn, soft_wrap=True)


def warn(text: str) -> None:
    """A warning, on stderr."""
    say(Text.assemble(("warning: ", "bold yellow"), text))


@contextmanager
def doing(what: str) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal that something slow goes on, and says on stderr how long it took. Yields what takes news of
    its progress.

    Whatever the user's own code prints meanwhile goes to stderr: stdout holds results alone.
    """
    console = _console(stderr=True)
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):
        if console.is_terminal:
            with console.status(f"{what} ...") as status:
                yield lambda news: status.update(f"{what}: {news}")
        else:
            yield lambda news: say(f"{what}: {news}")
    say(f"{what}: {time.perf_counter() - started:.1f} s")


def hush_stdout() -> None:
    """After the reader of a pipe has gone: what is still buffered must not raise again when the process ends.

    The way that https://docs.python.org/3/library/signal.html#note-on-sigpipe gives.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
