"""JSON to a tree of plain values with positions: for `plan.json`, whose errors are then shown as those of a job."""

from __future__ import annotations

import re
from bisect import bisect_right
from json import JSONDecodeError, JSONDecoder
from typing import NoReturn

from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.nodes import MAX_DEPTH, Entry, Node, Source, Span, diagnostic

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_STRINGS = JSONDecoder()
_CONSTANTS = {"true": True, "false": False, "null": None}


def parse_json(source: Source) -> Node:
    """The one value of `source`. Raises InputError for what is not JSON (RFC 8259) and for repeated keys."""
    parser = _Parser(source)
    node, end = parser.value(parser.skip(0), 0)
    if parser.skip(end) < len(source.text):
        parser.refuse(parser.skip(end), "expected the end of the file")
    if parser.problems:
        raise InputError(parser.problems)
    return node


class _Parser:
    """Recursive descent; every method takes a position and returns the one after what it read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.text = source.text
        self.problems: list[Diagnostic] = []
        self._lines = [0, *(match.end() for match in re.finditer("\n", self.text))]

    def skip(self, position: int) -> int:
        """The next position that is not white space."""
        match = _SPACE.match(self.text, position)
        assert match
        return match.end()

    def value(self, start: int, depth: int) -> tuple[Node, int]:
        """Any JSON value."""
        first = self.text[start : start + 1]
        if depth > MAX_DEPTH:
            self.refuse(start, f"nested deeper than {MAX_DEPTH} levels")
        if first in ("{", "["):
            return self._mapping(start, depth) if first == "{" else self._sequence(start, depth)
        if first == '"':
            value, end = self._string(start)
            return Node(self.span(start, end), value), end
        for name, constant in _CONSTANTS.items():
            if self.text.startswith(name, start):
                return Node(self.span(start, start + len(name)), constant), start + len(name)
        match = _NUMBER.match(self.text, start)
        if match is None or len(match[0]) > 400:
            self.refuse(start, "expected a JSON value" if match is None else "the number is too large")
        number = float(match[0]) if match[1] or match[2] else int(match[0])
        if number in (float("inf"), float("-inf")):
            self.refuse(start, "the number is too large")
        return Node(self.span(start, match.end()), number), match.end()

    def _sequence(self, start: int, depth: int) -> tuple[Node, int]:
        items: list[Node] = []
        position = self.skip(start + 1)
        while self.text[position : position + 1] != "]":
            if items:
                position = self._expect(",", position)
            item, position = self.value(position, depth + 1)
            items.append(item)
            position = self.skip(position)
        size = 1 + sum(item.size for item in items)
        return Node(self.span(start, position + 1), tuple(items), size), position + 1

    def _mapping(self, start: int, depth: int) -> tuple[Node, int]:
        entries: dict[str, Entry] = {}
        position = self.skip(start + 1)
        first = True
        while self.text[position : position + 1] != "}":
            if not first:
                position = self._expect(",", position)
            first = False
            if self.text[position : position + 1] != '"':
                self.refuse(position, "expected a key in double quotes")
            name, end = self._string(position)
            key = self.span(position, end)
            node, position = self.value(self._expect(":", self.skip(end)), depth + 1)
            if name in entries:
                first_key = entries[name].key
                message = f"the key `{name}` stands twice in one mapping: here, and on line {first_key.line}"
                self.problems.append(diagnostic(key, (), message, "keep one of the two"))
            entries[name] = Entry(key, node)
            position = self.skip(position)
        size = 1 + sum(entry.node.size for entry in entries.values())
        return Node(self.span(start, position + 1), entries, size), position + 1

    def _string(self, start: int) -> tuple[str, int]:
        try:
            value, end = _STRINGS.raw_decode(self.text, start)
            value.encode()
        except JSONDecodeError as error:
            self.refuse(error.pos, "text that is not closed, or holds a line break or an unknown escape")
        except UnicodeEncodeError:
            self.refuse(start, "half of a surrogate pair is not a character")
        return value, end

    def _expect(self, character: str, position: int) -> int:
        if self.text[position : position + 1] != character:
            self.refuse(position, f"expected `{character}`")
        return self.skip(position + 1)

    def span(self, start: int, end: int) -> Span:
        """The stretch from `start` to `end`, up to the end of its first line."""
        line = bisect_right(self._lines, start)
        begin = self._lines[line - 1]
        stop = self._lines[line] - 1 if line < len(self._lines) else len(self.text)
        return Span(self.source, line, start - begin + 1, max(min(end, stop), start + 1) - begin + 1)

    def refuse(self, position: int, message: str) -> NoReturn:
        """Raises InputError: JSON that is broken here cannot be read on."""
        raise InputError([*self.problems, diagnostic(self.span(position, position + 1), (), message)])
