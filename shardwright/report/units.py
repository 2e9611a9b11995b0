"""The units of a profile as people tell them apart: what repeats is one kind, and has one name everywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from shardwright.report.layout import plural
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile, Parameter, Unit

OUTSIDE = -1
"""`Parameter.unit` of the parameters outside all blocks."""


@dataclass(frozen=True, slots=True)
class UnitKind:
    """All units that cost the same, wherever they stand in the model."""

    name: str
    """`embedding`, `head`, `block`; with several kinds of blocks `block a`, `block b`."""
    units: tuple[tuple[int, Unit], ...]
    """With their index in the profile, in order of execution."""

    @property
    def unit(self) -> Unit:
        """One of them."""
        return self.units[0][1]

    @property
    def count(self) -> int:
        """How many times the model runs it."""
        return sum(unit.count for _, unit in self.units)

    @property
    def paths(self) -> tuple[str, ...]:
        """Module paths of all of them."""
        return tuple(path for _, unit in self.units for path in unit.paths)

    def parameters(self, profile: ModelProfile) -> list[Parameter]:
        """Of all of them together."""
        indices = {index for index, _ in self.units}
        return [parameter for parameter in profile.parameters if parameter.unit in indices]

    def says(self, profile: ModelProfile) -> str:
        """Class and place: `DecoderLayer with experts, layers.3-60`."""
        experts = " with experts" if any(at.role == "experts" for at in self.parameters(profile)) else ""
        return f"{self.unit.module or 'blocks'}{experts}, {path_ranges(self.paths)}"


def unit_kinds(profile: ModelProfile) -> tuple[UnitKind, ...]:
    """The kinds in order of first execution."""
    by_cost: dict[tuple[str, str], list[tuple[int, Unit]]] = {}
    for index, unit in enumerate(profile.units):
        by_cost.setdefault((unit.kind, unit.fingerprint), []).append((index, unit))
    blocks = [key for key in by_cost if key[0] == "block"]
    names = {key: f"block {_letters(at)}" if len(blocks) > 1 else "block" for at, key in enumerate(blocks)}
    return tuple(UnitKind(names.get(key, key[0]), tuple(units)) for key, units in by_cost.items())


def _letters(index: int) -> str:
    """0 to `a`, 25 to `z`, 26 to `aa`."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def path_ranges(paths: Sequence[str]) -> str:
    """Paths that differ in one number only, as ranges of it: `layers.0-4, 6-10`; others one by one."""
    shown = []
    for (before, after), group in groupby(map(_numbered, paths), key=lambda at: (at[0], at[2])):
        numbers = [at[1] for at in group]
        shown.append(before + ", ".join(_ranges(numbers)) + after if numbers[0] is not None else before)
    return ", ".join(dict.fromkeys(shown))


def _numbered(path: str) -> tuple[str, int | None, str]:
    """A path around its last number that is a whole part of it."""
    found = re.fullmatch(r"(.*(?:^|\.))(\d+)((?:\.\D[^.]*)*)", path)
    return (found[1], int(found[2]), found[3]) if found else (path, None, "")


def _ranges(numbers: Sequence[int | None]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        assert number is not None
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def order(profile: ModelProfile, kinds: Sequence[UnitKind]) -> str:
    """How kinds of blocks alternate: `10 x (5 a, 1 b), 2 a`; empty where each kind stands in one place."""
    if all(len(kind.units) == 1 for kind in kinds):
        return ""
    letter = {index: kind.name.removeprefix("block ") for kind in kinds for index, _ in kind.units}
    runs = [f"{unit.count} {letter[index]}" for index, unit in enumerate(profile.units) if unit.kind == "block"]
    length = period(runs)
    times = len(runs) // length
    folded = [f"{times} x ({', '.join(runs[:length])})", *runs[times * length :]] if times > 1 else runs
    return ", ".join(folded)


def period(runs: Sequence[str]) -> int:
    """The shortest period that the runs repeat, but for an unfinished last one."""
    candidates = range(1, len(runs) + 1)
    return next(n for n in candidates if all(runs[at] == runs[at % n] for at in range(len(runs) // n * n)))


def run_title(profile: ModelProfile, micro_batch: int, dtype: ComputeDtypeName) -> str:
    """What was run; a sample that is no sequence of tokens counts as one token."""
    length = profile.sequence_length
    samples = f"{micro_batch} of {length} tokens" if length > 1 else plural(micro_batch, "sample")
    return f"{profile.name}: {dtype}, micro-batch {'of ' if length == 1 else ''}{samples}"
