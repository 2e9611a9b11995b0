"""How values and words of a job enter the text of a script: as literals, and as comments that cannot end early.

[Note: what crosses into a script]
Names are checked identifiers. Values cross as literals. Words of people stand in comments and docstrings alone,
with every line break collapsed, backslashes and quotes escaped, and in ASCII.
"""

from __future__ import annotations

import ast
import keyword
import math
import textwrap
from collections.abc import Mapping
from typing import Any

LINE_LENGTH = 120


def literal(value: Any, column: int = 0) -> str:
    """A Python literal, laid out as `ruff format` would after `column` characters of its first line.

    Takes None, booleans, numbers, strings, and lists, tuples and string-keyed mappings of them; else raises TypeError.
    """
    flat = _flat(value)
    if column + len(flat) <= LINE_LENGTH or not isinstance(value, list | tuple | Mapping) or not value:
        return flat
    return _exploded(value, indent=0)


def assignment(name: str, value: Any, comment: str = "", annotation: str = "") -> str:
    """`NAME = literal  # comment`, as `ruff format` leaves it."""
    head = f"{identifier(name)}{': ' + annotation if annotation else ''} = "
    text = literal(value, len(head))
    if isinstance(value, str) and len(head + text) > LINE_LENGTH and len(text) + 4 <= LINE_LENGTH:
        text = f"(\n    {text}\n)"
    if not comment:
        return head + text
    words = prose(comment)
    if "\n" not in text and len(f"{head}{text}  # {words}") <= LINE_LENGTH:
        return f"{head}{text}  # {words}"
    return f"{comment_lines(words)}\n{head}{text}"


def identifier(name: str) -> str:
    """The name itself. Raises ValueError unless it is an ASCII identifier and no keyword."""
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is not a name in Python")
    return name


def dotted(name: str) -> str:
    """A module's name, each part an identifier. Raises ValueError otherwise."""
    return ".".join(identifier(part) for part in name.split("."))


def prose(text: str) -> str:
    """Free text on one line, in printable ASCII."""
    collapsed = " ".join(text.split())
    return "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in collapsed)


def comment_lines(text: str, indent: int = 0) -> str:
    """Free text as one or more `#` lines."""
    width = LINE_LENGTH - indent - 2
    lines = textwrap.wrap(prose(text), width, break_on_hyphens=False) or [""]
    return f"\n{' ' * indent}".join(f"# {line}".rstrip() for line in lines)


def docstring_text(text: str) -> str:
    """Free text, its lines kept, for the inside of a triple-quoted docstring."""
    lines = [
        "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in line) for line in text.split("\n")
    ]
    return "\n".join(line.rstrip() for line in lines).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')


def _flat(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, bool | int | float):
        return repr(value).replace("e+", "e")
    if isinstance(value, list):
        return f"[{', '.join(map(_flat, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_flat, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_quoted(key)}: {_flat(item)}' for key, item in value.items())}}}"
    raise TypeError(f"a value of type {type(value).__name__} has no place in a script")


def _exploded(value: Any, indent: int) -> str:
    """A collection with one element a line, and so on inside where a line is still too long."""
    inner = " " * (indent + 4)
    lines = []
    items = value.items() if isinstance(value, Mapping) else [(None, item) for item in value]
    for key, item in items:
        head = inner if key is None else f"{inner}{_quoted(key)}: "
        flat = _flat(item)
        fits = len(head) + len(flat) + 1 <= LINE_LENGTH
        nested = isinstance(item, list | tuple | Mapping) and len(item) > 0
        lines.append(f"{head}{_exploded(item, indent + 4) if nested and not fits else flat},")
    left, right = "{}" if isinstance(value, Mapping) else "[]" if isinstance(value, list) else "()"
    return "\n".join([left, *lines, " " * indent + right])


def _quoted(text: Any) -> str:
    """A string literal in ASCII, in double quotes unless single ones need fewer escapes, as `ruff format` prefers."""
    if not isinstance(text, str):
        raise TypeError(f"the key {text!r} is not a string")
    body = ascii(text)[1:-1]
    if ascii(text)[0] == "'":
        body = body.replace("\\'", "'")
    quote = "'" if text.count('"') > text.count("'") else '"'
    quoted = quote + body.replace(quote, "\\" + quote) + quote
    assert ast.literal_eval(quoted) == text
    return quoted
