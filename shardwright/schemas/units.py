"""Quantities with a unit: what a person writes (`80GiB`, `400Gb/s`, `1M tokens`) and what the program counts in.

Case matters, as it does in the field: `GB` is bytes, `Gb` is bits, `GiB` is 2**30 bytes. A bare number is refused,
because `80` leaves the reader to guess. Every quantity is written back in a form that reads to the same value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import isfinite
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from shardwright.schemas.diagnostics import WrongValueError, shown

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_NUMBER = r"(?P<number>\d{1,30}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,3})?)"

# Per kind of quantity: the scale of each unit that may follow the number.
BYTE_UNITS = {f"{prefix}B": Decimal(scale) for prefix, scale in (_DECIMAL | _BINARY).items()}
RATE_UNITS = {
    f"{prefix}{unit}/s": Decimal(scale) / bits
    for prefix, scale in _DECIMAL.items()
    for unit, bits in (("b", 8), ("B", 1))
}
FLOPS_UNITS = {f"{prefix}FLOP/s": Decimal(scale) for prefix, scale in _DECIMAL.items()}
SECOND_UNITS = {
    unit: Decimal(scale)
    for unit, scale in (
        ("ns", "1e-9"), ("us", "1e-6"), ("ms", "1e-3"), ("s", "1"), ("min", "60"), ("h", "3600"), ("d", "86400")
    )
}  # fmt: skip


def _pattern(units: Mapping[str, Decimal]) -> str:
    return rf"^\d+(\.\d+)?([eE][-+]?\d+)? ?({'|'.join(units)})$"


def _quantity(value: object, units: Mapping[str, Decimal], what: str, example: str) -> Decimal:
    """The value in the base unit, exact. Raises WrongValueError: `what` and `example` say what was expected."""
    text = value.strip() if isinstance(value, str) else ""
    match = re.fullmatch(rf"{_NUMBER} ?(?P<unit>[^\d\s]*)", text)
    if match is None or match["unit"] not in units:
        raise WrongValueError(
            f"{shown(value)} is not {what}; write a number with its unit, for example {example}",
            _near_unit(match, units) if match else "",
        )
    quantity = Decimal(match["number"]) * units[match["unit"]]
    if not isfinite(float(quantity)):
        raise WrongValueError(f"{shown(value)} is not {what}: the number is too large")
    return quantity


def _near_unit(match: re.Match[str], units: Mapping[str, Decimal]) -> str:
    """What may have been meant: another case (`80gib`), or a unit cut short (`80G`, `400GB` for a rate)."""
    written = match["unit"]
    near = [unit for unit in units if unit.lower() == written.lower()]
    near = near or [unit for unit in units if written and unit.startswith(written) and len(unit) <= len(written) + 2]
    return f"did you mean {match['number']}{near[0]}?" if near else ""


def _positive(quantity: Decimal, value: object, what: str) -> Decimal:
    if quantity <= 0:
        raise WrongValueError(f"{shown(value)} is not {what} above zero")
    return quantity


def parse_bytes(value: object) -> int:
    """`"80GiB"` to 85899345920 bytes. Raises ValueError on a bare number, on bits, on an unknown prefix, on zero."""
    what = "a size in bytes"
    return max(1, round(_positive(_quantity(value, BYTE_UNITS, what, "80GiB or 80GB"), value, what)))


def parse_rate(value: object) -> float:
    """`"400Gb/s"` to 5e10 bytes per second, `"900GB/s"` to 9e11. Raises ValueError otherwise, and on zero."""
    what = "a data rate"
    return float(_positive(_quantity(value, RATE_UNITS, what, "400Gb/s (bits) or 900GB/s (bytes)"), value, what))


def parse_flops(value: object) -> float:
    """`"989TFLOP/s"` to 9.89e14 floating-point operations per second. Raises ValueError otherwise, and on zero."""
    what = "a compute rate"
    return float(_positive(_quantity(value, FLOPS_UNITS, what, "989TFLOP/s"), value, what))


def parse_seconds(value: object) -> float:
    """`"5us"` to 5e-6, `"1h"` to 3600 seconds; zero is a time. Raises ValueError otherwise."""
    return float(_quantity(value, SECOND_UNITS, "a time", "5us or 1h"))


def format_bytes(value: int) -> str:
    """The shortest exact form: 85899345920 to `80GiB`, 1000 to `1kB`, 1001 to `1001B`."""
    for prefix, scale in (("Ti", 2**40), ("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if value and value % scale == 0:
            return f"{value // scale}{prefix}B"
    for prefix in ("T", "G", "M", "k"):
        if value and value % _DECIMAL[prefix] == 0:
            return f"{value // _DECIMAL[prefix]}{prefix}B"
    return f"{value}B"


def format_rate(value: float) -> str:
    """Bytes per second in the largest decimal unit that keeps the value exact: 5e10 to `50GB/s`."""
    return _format_decimal(value, "B/s", parse_rate)


def format_flops(value: float) -> str:
    """9.89e14 to `989TFLOP/s`."""
    return _format_decimal(value, "FLOP/s", parse_flops)


def format_seconds(value: float) -> str:
    """5e-6 to `5us`, 3600 to `3600s`: exact, and read back by `parse_seconds`."""
    for unit in ("s", "ms", "us", "ns"):
        scale = float(SECOND_UNITS[unit])
        text = f"{value / scale:g}"
        if (value >= scale or value == 0) and "e" not in text and parse_seconds(text + unit) == value:
            return text + unit
    return f"{value!r}s"


def _format_decimal(value: float, unit: str, parse: Callable[[object], float]) -> str:
    for prefix in ("T", "G", "M", "k", ""):
        text = f"{value / _DECIMAL[prefix]:g}"
        if value >= _DECIMAL[prefix] and "e" not in text and parse(f"{text}{prefix}{unit}") == value:
            return f"{text}{prefix}{unit}"
    return f"{value!r}{unit}"


def human_bytes(value: float) -> str:
    """For people, three significant digits: 85899345920 to `80.0 GiB`."""
    for prefix, scale in (("Ti", 2**40), ("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}B" if abs(value) < 1000 * scale else f"{value / scale:.0f} {prefix}B"
    return f"{value:.0f} B"


def human_seconds(value: float) -> str:
    """For people: 0.0123 to `12.3 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def human_count(value: float) -> str:
    """For people: 8030261248 to `8.03 B` (short scale), as parameter counts and FLOPs are quoted."""
    for prefix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}" if abs(value) < 999.5 * scale else f"{value / scale:.0f} {prefix}"
    return f"{value:.0f}"


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of something that training counts: sequences, tokens, steps, or seconds of wall time."""

    value: int | float
    unit: str
    """`sequences`, `tokens`, `steps` or `seconds`."""

    def __str__(self) -> str:
        return format_seconds(self.value) if self.unit == "seconds" else f"{self.value} {self.unit}"


_AMOUNT_EXAMPLES = {"tokens": "1M tokens", "sequences": "256 sequences", "steps": "2000 steps", "seconds": "1h"}
_AMOUNT_SCALES = _DECIMAL | _BINARY | {"B": 10**9}
_SINGULAR = {"token": "tokens", "sequence": "sequences", "step": "steps"}


def amount_pattern(*units: str) -> str:
    """The JSON Schema pattern of what `amount_parser(*units)` reads."""
    counted = "|".join(f"{unit.removesuffix('s')}s?" for unit in units if unit != "seconds")
    prefixes = "|".join(prefix for prefix in _AMOUNT_SCALES if prefix)
    times = rf"|{_pattern(SECOND_UNITS)}" if "seconds" in units else ""
    return rf"^\d+(\.\d+)?([eE][-+]?\d+)? ?({prefixes})? ?({counted})${times}"


def amount_parser(*units: str, bare: str | None = None, least: int = 1) -> Callable[[object], Amount]:
    """A parser of `1M tokens` (10**6), `1Mi tokens` (2**20), `2000 steps`, `1h`.

    A bare whole number counts as `bare`, or is refused without one. The parser raises ValueError below `least`.
    """
    hints = " or ".join(_AMOUNT_EXAMPLES[unit] for unit in units)
    expected = f"an amount of {' or '.join(units)}"

    def parse(value: object) -> Amount:
        if isinstance(value, Amount):
            return value
        if bare is not None and isinstance(value, int) and not isinstance(value, bool):
            amount = Amount(value, bare)
        else:
            amount = _read_amount(value, units, f"{shown(value)} is not {expected}; write for example {hints}")
        if amount.value <= 0 < least or (amount.unit != "seconds" and amount.value < least):
            raise WrongValueError(f"{shown(value)} is too small; write for example {hints}")
        return amount

    return parse


def _read_amount(value: object, units: tuple[str, ...], refusal: str) -> Amount:
    text = value.strip() if isinstance(value, str) else ""
    match = re.fullmatch(rf"{_NUMBER} ?(?P<prefix>[A-Z]i?|k)?(?: ?(?P<unit>[a-zA-Z]+))?", text)
    if match and match["unit"]:
        unit = _SINGULAR.get(match["unit"], match["unit"])
        if unit in units and (match["prefix"] or "") in _AMOUNT_SCALES:
            number = Decimal(match["number"]) * _AMOUNT_SCALES[match["prefix"] or ""]
            if number > 10**30 or number != int(number):
                raise WrongValueError(f"{shown(value)} is not a whole number of {unit}")
            return Amount(int(number), unit)
        if "seconds" in units and match["prefix"] is None and match["unit"] in SECOND_UNITS:
            return Amount(parse_seconds(text), "seconds")
    bare = match and match["prefix"] in _AMOUNT_SCALES and not match["unit"] and "tokens" in units
    raise WrongValueError(refusal, f"did you mean {text} tokens?" if bare else "")


def _schema(units: Mapping[str, Decimal], *examples: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": _pattern(units), "examples": list(examples)})


Bytes = Annotated[int, BeforeValidator(parse_bytes), PlainSerializer(format_bytes), _schema(BYTE_UNITS, "80GiB")]
BytesPerSecond = Annotated[
    float, BeforeValidator(parse_rate), PlainSerializer(format_rate), _schema(RATE_UNITS, "400Gb/s", "900GB/s")
]
FlopsPerSecond = Annotated[
    float, BeforeValidator(parse_flops), PlainSerializer(format_flops), _schema(FLOPS_UNITS, "989TFLOP/s")
]
Seconds = Annotated[
    float, BeforeValidator(parse_seconds), PlainSerializer(format_seconds), _schema(SECOND_UNITS, "5us")
]
