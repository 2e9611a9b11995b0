"""Values become literals that mean the same and that `ruff format` leaves alone; words cannot leave their comment."""

from __future__ import annotations

import ast
import subprocess
import sys
import tokenize
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hostile import HOSTILE

from shardwright.backends.pytorch.text import assignment, comment_lines, docstring_text, dotted, identifier, literal

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(HOSTILE),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def evaluated(text: str) -> Any:
    return eval(text, {"__builtins__": {}, "float": float})


@given(plain_values, st.integers(0, 200))
def test_literals_mean_the_value(value: Any, column: int) -> None:
    text = literal(value, column)
    assert text.isascii()
    assert evaluated(text) == value


@pytest.mark.parametrize("value", [{1: 2}, object(), b"bytes", {1, 2}, {"key": object()}])
def test_what_is_no_plain_value_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        literal(value)


def test_ruff_leaves_assignments_as_they_are(tmp_path: Path) -> None:
    """Hundreds of drawn values in one file: one run of the formatter judges them all."""
    lines = ['"""Values."""', ""]

    @settings(max_examples=300, database=None, derandomize=True)
    @given(plain_values)
    def collect(value: Any) -> None:
        lines.append(assignment(f"VALUE_{len(lines)}", value))

    collect()
    for length in range(60, 130):
        for value in (
            "x" * length,
            ["y" * length],
            {"k": "z" * length},
            ("ab",) * (length // 6),
            [["q" * length, 1], 2],
        ):
            lines.append(assignment(f"VALUE_{len(lines)}", value, "with a comment" if length % 2 else ""))
    path = tmp_path / "values.py"
    path.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "120", "--diff", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[:3000]


@given(st.text() | st.sampled_from(HOSTILE))
def test_comments_stay_comments(text: str) -> None:
    lines = comment_lines(text, indent=4)
    assert lines.isascii()
    tokens = list(tokenize.generate_tokens(StringIO(lines + "\n").readline))
    assert {token.type for token in tokens} <= {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
    assert all(line.strip().startswith("#") for line in lines.split("\n"))


@given(st.text() | st.sampled_from(HOSTILE))
def test_docstrings_stay_docstrings(text: str) -> None:
    source = f'"""A line.\n\n{docstring_text(text)}\n"""\n'
    body = ast.parse(source).body
    assert source.isascii()
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


@pytest.mark.parametrize("name", ["", "a b", "1a", "a-b", "class", "naïve", "a\n", "a.b", "a;b", "None"])
def test_what_is_no_identifier_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        identifier(name)
    with pytest.raises(ValueError, match="not a name"):
        dotted(f"module.{name}" if name != "a.b" else "a..b")
