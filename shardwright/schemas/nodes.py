"""A file as a tree of plain values that remember where they were written.

YAML files, JSON files and `--set` arguments all become such a tree, so that an error in any of them is shown in the
same way: file, line, column, and the line itself with a caret.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from shardwright.schemas.diagnostics import Diagnostic

Key: TypeAlias = tuple[str | int, ...]
"""The way to a value: keys of mappings and indices of lists. Written with dots: `cluster.levels.0.size`."""

MAX_DEPTH = 64
"""Deepest nesting that a file may have; no job needs ten."""
EXCERPT_WIDTH = 68
"""Most columns of a source line that an excerpt shows, so that it fits a terminal of 80."""


@dataclass(frozen=True, slots=True)
class Source:
    """A text and what it is called when an error is shown."""

    label: str
    text: str = ""
    """Empty for a `--set` argument, which the label shows whole: it has no lines."""

    def line(self, number: int) -> str:
        """The line of that number, from 1."""
        lines = self.text.split("\n")
        return lines[number - 1] if number <= len(lines) else ""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one line. Line and columns count from 1; `end` is the first column after it."""

    source: Source
    line: int
    column: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A value and where it was written."""

    span: Span
    value: str | int | float | bool | tuple[Node, ...] | dict[str, Entry] | None
    """A scalar, the items of a list, or the entries of a mapping in their order."""
    size: int = 1
    """Values in this tree; one that is repeated through an alias counts each time."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One key of a mapping and its value."""

    key: Span
    node: Node


def dotted(key: Key) -> str:
    """The key as a person writes it: `cluster.levels.0.size`."""
    return ".".join(map(str, key))


def parts_of(root: Node, text: str) -> Key:
    """The parts of a dotted key. A name with dots in it, such as a pattern of paths, is one where the tree has it."""
    key = tuple(text.split("."))
    node, _, depth = place(root, key)
    for end in range(len(key), depth + 1, -1):
        if child(node, name := ".".join(key[depth:end])):
            return (*key[:depth], name, *key[end:])
    return key


def plain(node: Node) -> Any:
    """The tree as plain values: dict, list, str, int, float, bool, None."""
    if isinstance(node.value, dict):
        return {name: plain(entry.node) for name, entry in node.value.items()}
    return [plain(item) for item in node.value] if isinstance(node.value, tuple) else node.value


def child(node: Node, part: str | int) -> tuple[Node, Span] | None:
    """The value under a key or index with the place that names it, or None. Indices may be digits in text."""
    if isinstance(node.value, dict):
        entry = node.value.get(str(part))
        return (entry.node, entry.key) if entry else None
    if isinstance(node.value, tuple) and str(part).isdecimal() and int(part) < len(node.value):
        item = node.value[int(part)]
        return item, item.span
    return None


def place(root: Node, key: Key) -> tuple[Node, Span, int]:
    """The deepest value on the way to `key`, the place that names it, and how many parts of the key lead there."""
    node, name = root, root.span
    for depth, part in enumerate(key):
        below = child(node, part)
        if below is None:
            return node, name, depth
        node, name = below
    return node, name, len(key)


def with_entry(node: Node, name: str, entry: Entry) -> Node:
    """The mapping with one entry set."""
    assert isinstance(node.value, dict)
    old = node.value.get(name)
    grown = entry.node.size - (old.node.size if old else 0)
    return replace(node, value={**node.value, name: entry}, size=node.size + grown)


def best_span(root: Node, key: Key) -> Span:
    """Where to point for `key`: at its value; at the name of a mapping, or of what is empty; at what stands for it."""
    node, name, _ = place(root, key)
    return name if node.value is None or isinstance(node.value, dict) else node.span


def diagnostic(span: Span, key: Key, message: str, suggestion: str = "") -> Diagnostic:
    """A diagnostic that points at `span`."""
    return Diagnostic(
        message=message,
        key=dotted(key),
        suggestion=suggestion,
        file=span.source.label,
        line=span.line if span.source.text else 0,
        column=span.column if span.source.text else 0,
        excerpt=excerpt(span),
    )


def excerpt(span: Span) -> str:
    """The line with a caret line under it. Long lines are cut around the caret; control characters are replaced."""
    if not span.source.text:
        return ""
    line = "".join(_printable(span.source.line(span.line)))
    start, end = span.column - 1, max(span.end - 1, span.column)
    cut = max(0, start - EXCERPT_WIDTH // 2) if len(line) > EXCERPT_WIDTH else 0
    shown = line[cut : cut + EXCERPT_WIDTH]
    lead, marked = shown[: start - cut], shown[start - cut : end - cut]
    number = f"{span.line:4d}"
    return f"{number} | {shown}\n{' ' * len(number)} | {' ' * _width(lead)}{'^' * max(1, _width(marked))}".rstrip()


def _printable(text: str) -> Iterator[str]:
    """Every character as one column wide or more, so that the caret stands right and no escape reaches a terminal."""
    for character in text:
        yield " " if character == "\t" else character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"


def _width(text: str) -> int:
    """Columns that a terminal gives the text."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )
