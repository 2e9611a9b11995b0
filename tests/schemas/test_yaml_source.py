"""YAML 1.2 as a tree: what scalars mean, where values stand, and that nothing but plain data comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.json_source import parse_json
from shardwright.schemas.nodes import Node, Source, best_span, place, plain
from shardwright.schemas.reading import read_tree
from shardwright.schemas.yaml_source import parse_yaml


def read(text: str) -> Node:
    return parse_yaml(Source("job.yaml", text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-7", -7),
        ("+7", 7),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b101", "0b101"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("off", "off"),
        ("yes", "yes"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("''", ""),
        ("'3'", "3"),
        ('"\\u00e9"', "é"),
        ("=", "="),
        ("|\n  a\n  b\n", "a\nb\n"),
        (">-\n  a\n  b\n", "a b"),
        ("8 x h100", "8 x h100"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = plain(read(f"key: {text}\n"))["key"]
    assert found == value
    assert type(found) is type(value)


def test_keys_are_text_as_written() -> None:
    assert plain(read("1: a\ntrue: b\nnull: c\non: d\n3e-4: e")) == {
        "1": "a", "true": "b", "null": "c", "on": "d", "3e-4": "e",
    }  # fmt: skip


def test_a_version_directive_changes_nothing() -> None:
    assert plain(read("%YAML 1.1\n---\na: off\nb: 012\n")) == {"a": "off", "b": 12}


def test_aliases_repeat_values() -> None:
    assert plain(read("a: &x {b: [1]}\nc: *x\n")) == {"a": {"b": [1]}, "c": {"b": [1]}}


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xef\xbb\xbfa:\r\n  b: 1\r\n")
    root = read_tree(path)
    assert plain(root) == {"a": {"b": 1}}
    assert best_span(root, ("a", "b")).line == 2


TEXT = """\
model:
  factory: model:build
  args:
    sizes: [1, 22, {deep: "x y"}]
# a comment
train: {lr: 3e-4, betas: [0.9,
  0.95]}
empty:
list:
  - one
  - two: 2
"""


@pytest.mark.parametrize(
    ("key", "line", "column", "text"),
    [
        (("model",), 1, 1, "model"),
        (("model", "factory"), 2, 12, "model:build"),
        (("model", "args", "sizes"), 4, 12, '[1, 22, {deep: "x y"}]'),
        (("model", "args", "sizes", 1), 4, 16, "22"),
        (("model", "args", "sizes", 2, "deep"), 4, 27, '"x y"'),
        (("train", "lr"), 6, 13, "3e-4"),
        (("train", "betas", 1), 7, 3, "0.95"),
        (("empty",), 8, 1, "empty"),
        (("list", 0), 10, 5, "one"),
        (("list", 1, "two"), 11, 10, "2"),
        (("model", "loss"), 1, 1, "model"),  # absent: at the name of what should hold it
        (("train", "schedule", "warmup"), 6, 1, "train"),
    ],
)
def test_positions(key: tuple[str | int, ...], line: int, column: int, text: str) -> None:
    span = best_span(read(TEXT), key)
    assert (span.line, span.column) == (line, column)
    assert TEXT.splitlines()[line - 1][column - 1 : span.end - 1] == text


WORDS = st.text(alphabet=st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(WORDS, PLAIN, max_size=4), st.sampled_from([None, 2]))
def test_json_reads_equally_as_yaml_and_as_json(values: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(values, indent=indent)
    assert plain(read(text)) == values
    assert plain(parse_json(Source("plan.json", text))) == values


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:{}[]&*!-?|>#%@'\"\\ \n\t,~<=.0123\u00e9\u2028\x85", max_size=40))
def test_any_text_is_read_or_refused_with_a_place(text: str) -> None:
    try:
        value, messages = plain(read(text)), ["fine"]
    except InputError as error:
        value, messages = None, [each.message for each in error.diagnostics]
    assert messages
    assert all(messages)
    assert only_plain(value)


def only_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and only_plain(below) for key, below in value.items())
    if isinstance(value, list):
        return all(map(only_plain, value))
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch hacked']",
        "!!python/name:os.system a: b",
        "a: !!python/module:os",
        "? !!python/object:os.system x\n: 1",
        "a: !!binary aGk=",
        "a: !!set {x}",
        "a: !!timestamp 2001-12-14",
        "a: !!str 3",
        "a: !local [1]",
        "a: ! 3",
        "%TAG ! tag:yaml.org,2002:python/\n--- !object/apply:os.system [id]",
        "a: !<tag:yaml.org,2002:python/name:os.system> ''",
    ],
)
def test_no_tag_is_followed(text: str) -> None:
    with pytest.raises(InputError, match="tag"):
        read(text)


def test_all_problems_at_once() -> None:
    with pytest.raises(InputError) as caught:
        read("a: 1\na: 2\nb: !x 3\nc: *nothing\n? [k]\n: 4\n")
    assert [each.line for each in caught.value.diagnostics] == [2, 3, 4, 5]


def test_place_goes_as_far_as_it_can() -> None:
    node, name, found = place(read("a: {b: [1]}"), ("a", "b", 3))
    assert (plain(node), name.column, found) == ([1], 5, 2)
