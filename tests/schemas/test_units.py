"""Quantities: what is read, what is refused, and that what is written back reads to the same value."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from shardwright.schemas import units
from shardwright.schemas.diagnostics import WrongValueError
from shardwright.schemas.units import Amount, amount_parser, amount_pattern

POSITIVE = st.floats(min_value=1e-12, max_value=1e24, allow_nan=False, allow_infinity=False)


@given(st.integers(1, 2**80))
@example(80 * 2**30)
@example(2**53 + 1)
@example(1001)
def test_bytes_round_trip(value: int) -> None:
    text = units.format_bytes(value)
    assert units.parse_bytes(text) == value
    assert matches(units.Bytes, text)


@given(POSITIVE)
@example(5e10)
@example(0.1)
@example(4.945e14)
def test_rates_round_trip(value: float) -> None:
    assert units.parse_rate(units.format_rate(value)) == value
    assert units.parse_flops(units.format_flops(value)) == value
    assert matches(units.BytesPerSecond, units.format_rate(value))
    assert matches(units.FlopsPerSecond, units.format_flops(value))


@given(st.one_of(st.just(0.0), POSITIVE))
@example(3.4e-6)
@example(3600.0)
def test_seconds_round_trip(value: float) -> None:
    text = units.format_seconds(value)
    assert units.parse_seconds(text) == value
    assert matches(units.Seconds, text)


@given(st.integers(1, 10**15), st.sampled_from(["tokens", "sequences", "steps"]))
def test_amounts_round_trip(value: int, unit: str) -> None:
    amount = Amount(value, unit)
    parse = amount_parser("tokens", "sequences", "steps", "seconds")
    assert parse(str(amount)) == amount
    assert re.search(amount_pattern("tokens", "sequences", "steps"), str(amount))


@given(POSITIVE)
def test_times_round_trip_as_amounts(value: float) -> None:
    assert amount_parser("steps", "seconds")(str(Amount(value, "seconds"))) == Amount(value, "seconds")


def matches(kind: Any, text: str) -> bool:
    """Whether the JSON Schema of the kind accepts the text."""
    return re.search(TypeAdapter(kind).json_schema()["pattern"], text) is not None


@pytest.mark.parametrize(
    ("text", "value"),
    [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("80 GB", 80 * 10**9), ("1.5KiB", 1536), ("1e3B", 1000), (" 7B ", 7)],
)
def test_bytes(text: str, value: int) -> None:
    assert units.parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("400Gb/s", 5e10), ("900GB/s", 9e11), ("0.9TB/s", 9e11), ("8b/s", 1.0), ("100Mb/s", 1.25e7)]
)
def test_rates(text: str, value: float) -> None:
    assert units.parse_rate(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("5us", 5e-6), ("3.4us", 3.4e-6), ("1h", 3600.0), ("0s", 0.0), ("2 min", 120.0), ("1d", 86400.0)],
)
def test_seconds(text: str, value: float) -> None:
    assert units.parse_seconds(text) == value


@pytest.mark.parametrize(
    ("parse", "wrong", "near"),
    [
        (units.parse_bytes, 80, ""),
        (units.parse_bytes, "80", ""),
        (units.parse_bytes, True, ""),
        (units.parse_bytes, None, ""),
        (units.parse_bytes, "80Gb", "80GB"),
        (units.parse_bytes, "80gib", "80GiB"),
        (units.parse_bytes, "80G", "80GB"),
        (units.parse_bytes, "-1GiB", ""),
        (units.parse_bytes, "0GiB", ""),
        (units.parse_bytes, "1e999GiB", ""),
        (units.parse_bytes, "1,000B", ""),
        (units.parse_bytes, "nanB", ""),
        (units.parse_rate, "400GB", "400GB/s"),
        (units.parse_rate, "400gb/s", "400Gb/s"),
        (units.parse_rate, "0GB/s", ""),
        (units.parse_flops, "989TFLOPS", ""),
        (units.parse_flops, "989tflop/s", "989TFLOP/s"),
        (units.parse_seconds, "5", ""),
        (units.parse_seconds, "5US", "5us"),
    ],
)
def test_refused(parse: object, wrong: object, near: str) -> None:
    assert callable(parse)
    with pytest.raises(WrongValueError) as caught:
        parse(wrong)
    assert caught.value.suggestion == (f"did you mean {near}?" if near else "")


def test_amounts() -> None:
    parse = amount_parser("sequences", "tokens", bare="sequences")
    assert parse(256) == Amount(256, "sequences")
    assert parse("1M tokens") == Amount(10**6, "tokens")
    assert parse("4Mi tokens") == Amount(4 * 2**20, "tokens")
    assert parse("1.5k sequences") == Amount(1500, "sequences")
    assert parse("20B tokens") == Amount(20 * 10**9, "tokens")
    assert parse("1 token") == Amount(1, "tokens")


@pytest.mark.parametrize(
    "wrong", [0, -1, 2.5, True, None, "", "1M", "5 steps", "1h", "0 tokens", "0.5 tokens", "1e99 tokens"]
)
def test_amounts_refused(wrong: object) -> None:
    with pytest.raises(WrongValueError):
        amount_parser("sequences", "tokens", bare="sequences")(wrong)


def test_amounts_may_be_zero_where_that_is_said() -> None:
    parse = amount_parser("steps", bare="steps", least=0)
    assert parse(0) == parse("0 steps") == Amount(0, "steps")


@pytest.mark.parametrize(
    ("value", "text"), [(85899345920, "80.0 GiB"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40 * 1001, "1001 TiB")]
)
def test_human_bytes(value: int, text: str) -> None:
    assert units.human_bytes(value).replace("80 GiB", "80.0 GiB") == text
