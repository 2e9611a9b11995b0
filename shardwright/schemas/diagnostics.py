"""What is said to a person whose input is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """One thing that is wrong, and where. Line and column count from 1."""

    message: str
    """What is wrong and what was expected, in one sentence."""
    key: str = ""
    """Dotted key of the job or plan, for instance `train.optimizer.lr`; empty for the file as a whole."""
    suggestion: str = ""
    """The nearest valid choice or the way out, in one sentence; may be empty."""
    file: str = ""
    line: int = 0
    column: int = 0
    excerpt: str = ""
    """The source line with a caret line under it; empty where there is none."""

    def __post_init__(self) -> None:
        """What the input holds may be quoted anywhere here; its control characters must not reach a terminal."""
        for name in ("message", "key", "suggestion", "file", "excerpt"):
            text = getattr(self, name)
            if not text.isprintable():
                clean = "".join(
                    each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text
                )
                object.__setattr__(self, name, clean)

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}: " if self.line else f"{self.file}: " if self.file else ""
        lines = [f"{place}error: {self.key + ': ' if self.key else ''}{self.message}"]
        lines += [self.excerpt] if self.excerpt else []
        lines += [f"  help: {self.suggestion}"] if self.suggestion else []
        return "\n".join(lines)


class ConflictError(ValueError):
    """Keys that exclude or need each other (`Spec.conflicts`)."""


class WrongValueError(ValueError):
    """A value that a parser refuses, with the nearest valid one where there is one."""

    def __init__(self, message: str, suggestion: str = "") -> None:
        super().__init__(message)
        self.suggestion = suggestion


def shown(value: object) -> str:
    """A value as a message quotes it: short, and in the words of YAML rather than of Python."""
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    return str(value)


class InputError(Exception):
    """The input is wrong (exit code 2). Carries every diagnostic that could be found at once."""

    def __init__(self, diagnostics: Iterable[Diagnostic] | Diagnostic) -> None:
        self.diagnostics = (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        super().__init__("\n".join(map(str, self.diagnostics)))
