"""Drawing of what is wrong with an input. Without colour it reads exactly as `str(InputError)`."""

from __future__ import annotations

import re

from rich.text import Text

from shardwright.schemas.diagnostics import Diagnostic, InputError

_STYLES = (
    (re.compile(r"\A[^\n]*?error:"), "bold red"),
    (re.compile(r"^ *\^.*$", re.MULTILINE), "bold red"),
    (re.compile(r"^ *help:", re.MULTILINE), "bold cyan"),
)


def draw_diagnostic(diagnostic: Diagnostic) -> Text:
    """`file:line:column: error: message`, the line with its caret, and the way out."""
    text = Text(str(diagnostic))
    for pattern, style in _STYLES:
        for match in pattern.finditer(text.plain):
            text.stylize(style, *match.span())
    return text


def draw_input_error(error: InputError) -> Text:
    """Every diagnostic, one after the other."""
    return Text("\n").join(map(draw_diagnostic, error.diagnostics))


def diagnostic_fields(diagnostic: Diagnostic) -> dict[str, str | int]:
    """The diagnostic as plain JSON values."""
    return {name: getattr(diagnostic, name) for name in Diagnostic.__slots__}
