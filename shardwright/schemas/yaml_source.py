"""YAML to a tree of plain values with positions.

Only plain data can come out: the parser's events are read here, nothing is ever constructed from a tag. Scalars follow
the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): `3e-4` is a number; `off`, `yes`, `12:30`
and `1_000` are text; `0o17` is 15 and `0x1F` is 31; keys are text as written. Refused with their place: repeated keys,
tags, merge keys, several documents, infinite numbers, endless or exploding aliases, nesting beyond `MAX_DEPTH`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.nodes import MAX_DEPTH, Entry, Node, Source, Span, diagnostic

MAX_VALUES = 100_000
"""Most values of a file after its aliases are written out."""

_CONSTANTS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_NUMBERS: tuple[tuple[re.Pattern[str], Callable[[str], int | float]], ...] = (
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

# What the parser says, by a part of its text: what is wrong in plain words, and the way out.
_SYNTAX = (
    ("found character '\\t'", "a tab stands where YAML wants spaces", "indent with spaces"),
    ("mapping values are not allowed", "a second `:` in one line, or a line indented too far",
     "quote text that holds `: `, and give the keys of one mapping the same indentation"),
    ("could not find expected ':'", "this line is neither `key: value` nor an item of a list",
     "write a space after the colon, and quote text that spans lines"),
    ("found unexpected end of stream", "the file ends inside a quoted text", "close the quote that opens here"),
    ("expected ',' or ']'", "a list in brackets is not closed, or a comma is missing",
     "close it with `]`, and quote text that holds any of `[]{},`"),
    ("expected ',' or '}'", "a mapping in braces is not closed, or a comma is missing",
     "close it with `}`, and quote text that holds any of `[]{},`"),
    ("expected <block end>", "this line does not fit the indentation above it",
     "give the keys of one mapping the same indentation"),
    ("found character", "a value cannot begin with this character", "quote the text"),
    ("found unknown escape", "an unknown escape in double quotes", "in single quotes a backslash is just a backslash"),
    ("found undefined tag handle", "YAML tags are refused: a job is plain data", "quote text that begins with `!`"),
)  # fmt: skip


def parse_yaml(source: Source) -> Node:
    """The one document of `source`. Raises InputError with every problem found up to the first syntax error."""
    composer = _Composer(source)
    try:
        root = composer.document()
    except MarkedYAMLError as error:
        raise InputError([*composer.problems, _syntax_error(source, error)]) from None
    except YAMLError as error:
        raise InputError(_reader_error(source, error)) from None
    if composer.problems:
        raise InputError(composer.problems)
    return root


class _Composer:
    """Builds the tree from the parser's events."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[Diagnostic] = []
        self._events: Iterator[Any] = YAML(typ="safe", pure=True).parse(source.text)
        self._anchors: dict[str, Node | None] = {}  # None while the value is still being read

    def document(self) -> Node:
        """Reads to the end. Raises the parser's errors."""
        root: Node | None = None
        for event in self._events:
            if isinstance(event, DocumentStartEvent) and root is not None:
                self._refuse(self._span(event), "a second document begins here; a file holds one job")
                break
            if isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent | AliasEvent):
                root = self._node(event, 0)
        return root or Node(Span(self.source, 1, 1, 1), None)

    def _node(self, event: Any, depth: int) -> Node:
        span = self._span(event)
        if isinstance(event, AliasEvent):
            return self._alias(event, span)
        if depth > MAX_DEPTH:
            raise InputError([*self.problems, diagnostic(span, (), f"nested deeper than {MAX_DEPTH} levels")])
        if event.tag is not None:
            self._refuse(span, "YAML tags are refused: a job is plain data", "quote text that begins with `!`")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, ScalarEvent):
            node = Node(span, self._scalar(event, span))
        elif isinstance(event, SequenceStartEvent):
            node = self._sequence(span, depth)
        else:
            node = self._mapping(span, depth)
        if node.size > MAX_VALUES:
            message = f"more than {MAX_VALUES:,} values once its aliases are written out"
            raise InputError([*self.problems, diagnostic(span, (), message)])
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _sequence(self, span: Span, depth: int) -> Node:
        items: list[Node] = []
        while not isinstance(event := next(self._events), SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return Node(span, tuple(items), 1 + sum(item.size for item in items))

    def _mapping(self, span: Span, depth: int) -> Node:
        entries: dict[str, Entry] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            place = self._span(event)
            name = event.value if isinstance(event, ScalarEvent) else None
            if name is None:
                self._refuse(place, "a key must be text")
                self._node(event, depth + 1)
            node = self._node(next(self._events), depth + 1)
            if name is None:
                continue
            if isinstance(event, ScalarEvent) and event.tag is not None:
                self._refuse(place, "YAML tags are refused: a job is plain data", "quote text that begins with `!`")
            if name == "<<" and event.style is None:
                self._refuse(place, "merge keys (`<<`) are not part of YAML 1.2", "write the keys out")
            elif name in entries:
                first = entries[name].key
                self._refuse(
                    place,
                    f"the key `{name}` stands twice in one mapping: here, and on line {first.line}, "
                    f"column {first.column}",
                    "keep one of the two",
                )
            else:
                entries[name] = Entry(place, node)
        return Node(span, entries, 1 + sum(entry.node.size for entry in entries.values()))

    def _alias(self, event: Any, span: Span) -> Node:
        node = self._anchors.get(event.anchor)
        if node is not None:
            return node
        if event.anchor in self._anchors:
            self._refuse(span, f"`*{event.anchor}` stands inside the value that it repeats")
        else:
            self._refuse(span, f"`*{event.anchor}` repeats a value that no `&{event.anchor}` names before it")
        return Node(span, None)

    def _scalar(self, event: Any, span: Span) -> str | int | float | bool | None:
        text: str = event.value
        if event.style is not None or text not in _CONSTANTS:
            return self._text(text, span) if event.style is not None else self._number(text, span)
        return _CONSTANTS[text]

    def _number(self, text: str, span: Span) -> str | int | float:
        for pattern, read in _NUMBERS:
            if pattern.fullmatch(text):
                number = read(text) if len(text) <= 400 else float("inf")
                if number in (float("inf"), float("-inf")):
                    self._refuse(span, "the number is too large")
                return number
        if _NOT_FINITE.fullmatch(text):
            self._refuse(span, "infinite numbers and not-a-number are refused", "quote it if text is meant")
        return self._text(text, span)

    def _text(self, text: str, span: Span) -> str:
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._refuse(span, "half of a surrogate pair is not a character", "write the character itself")
        return text

    def _span(self, event: Any) -> Span:
        start, end = event.start_mark, event.end_mark
        line = self.source.line(start.line + 1)
        last = end.column if end.line == start.line else len(line)
        # A block mapping or list has no mark of its own: its first line stands for it.
        if isinstance(event, MappingStartEvent | SequenceStartEvent):
            last = len(line.rstrip())
        return Span(self.source, start.line + 1, start.column + 1, max(last, start.column + 1) + 1)

    def _refuse(self, span: Span, message: str, suggestion: str = "") -> None:
        self.problems.append(diagnostic(span, (), message, suggestion))


_OPENED = ("found unexpected end of stream", "expected ',' or ']'", "expected ',' or '}'")
_NO_SPACE = re.compile(r"\s*[\w.-]+:(?=[^\s/:])")


def _syntax_error(source: Source, error: MarkedYAMLError) -> Diagnostic:
    problem = error.problem or ""
    message, suggestion = next(
        ((message, way_out) for part, message, way_out in _SYNTAX if part in problem), (f"not YAML: {problem}", "")
    )
    opened = any(part in problem for part in _OPENED)
    mark = (error.context_mark if opened else error.problem_mark) or error.problem_mark or error.context_mark
    span = Span(source, mark.line + 1, mark.column + 1, mark.column + 2) if mark else Span(source, 1, 1, 2)
    above = _NO_SPACE.match(source.line(span.line - 1)) if "mapping values" in problem and span.line > 1 else None
    if above:
        # The line above was read as text, so that this one looks like its continuation.
        span = Span(source, span.line - 1, above.end(), above.end() + 1)
        message, suggestion = "a space is missing after the colon", "write `key: value`"
    return diagnostic(_inside(span), (), message, suggestion)


def _inside(span: Span) -> Span:
    """The span, or the end of the last line that holds something where it lies behind the end of the text."""
    lines = span.source.text.split("\n")
    number = min(span.line, len(lines))
    while number > 1 and not lines[number - 1].strip():
        number -= 1
    if number == span.line:
        return span
    column = len(lines[number - 1].rstrip()) + 1
    return Span(span.source, number, column, column + 1)


def _reader_error(source: Source, error: YAMLError) -> Diagnostic:
    """Characters that YAML forbids: NUL and other controls."""
    position = getattr(error, "position", 0) or 0
    before = source.text[:position]
    line, column = before.count("\n") + 1, position - before.rfind("\n")
    character = source.text[position : position + 1]
    message = f"the character U+{ord(character or chr(0)):04X} is not allowed in YAML"
    return diagnostic(Span(source, line, column, column + 1), (), message)
