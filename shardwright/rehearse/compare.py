"""What was computed, compared with one process: losses, gradient norms, parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.backends.pytorch.runtime.index import parse_key, read_index
from shardwright.backends.pytorch.runtime.tensorfile import FormatError, open_tensors
from shardwright.rehearse.report_types import Check

_HALF_UNIT = 2.0**-24
"""How far rounding to float32 moves a number at most, relative to it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one launch left in its folder."""

    folder: Path
    processes: int

    def metric(self, name: str) -> list[float | None]:
        """A field of `metrics.jsonl`, step by step."""
        lines = (self.folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)[name] for line in lines]

    def weights(self, when: str) -> dict[str, Tensor]:
        """`initial` or `final` parameters by name, as the processes held them."""
        return dict(torch.load(self.folder / f"{when}.pt", weights_only=True))

    def findings(self) -> list[dict[str, Any]]:
        """What each process observed in the last step."""
        files = [self.folder / f"rank-{rank}.json" for rank in range(self.processes)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def checkpoint(self) -> dict[str, Tensor]:
        """Parameters by name from the last checkpoint, put together from the files of all processes.

        Raises FormatError or OSError when there is none or it is broken.
        """
        folder = self.folder / "out"
        return read_parameters(folder / (folder / "LATEST").read_text(encoding="utf-8").strip())


def read_parameters(folder: Path) -> dict[str, Tensor]:
    """The whole parameters of a checkpoint, whatever layout wrote it. Raises FormatError."""
    stored = {name: value for name, value in read_index(folder).tensors.items() if name.startswith("model.")}
    whole = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in stored.items()}
    for file_name in sorted({piece.file for value in stored.values() for piece in value.pieces}):
        with open_tensors(folder / file_name) as file:
            for key, entry in file.entries.items():
                name, box = parse_key(key)
                if name in whole:
                    place = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
                    whole[name][place] = file.rows(key, 0, entry.shape[0] if entry.shape else 1)
    return {name.removeprefix("model."): tensor for name, tensor in whole.items()}


def compare_series(
    run: str,
    name: str,
    expected: Sequence[float | None],
    found: Sequence[float | None],
    tolerance: float | Sequence[float],
) -> Check:
    """One number a step: each must agree within the tolerance, or that of its step, relative to the expected one."""
    limits = [tolerance] * len(expected) if isinstance(tolerance, float) else tolerance
    differences = [_relative(a, b) for a, b in zip(expected, found, strict=False)]
    complete = len(expected) == len(found) and differences
    worst = max(range(len(differences)), key=lambda step: differences[step] / limits[step]) if differences else 0
    return Check(
        run=run,
        name=f"{name} of {len(expected)} steps",
        expected=f"{_number(expected[worst])} in step {worst + 1}" if expected else "nothing",
        found=f"{_number(found[worst])}, off by {differences[worst]:.1e}" if complete else f"{len(found)} steps",
        tolerance=f"{limits[worst]:.2g}" if limits else "",
        passed=bool(complete) and differences[worst] <= limits[worst],
    )


def _relative(expected: float | None, found: float | None) -> float:
    if expected is None or found is None:
        return math.inf  # a number that was not finite
    return abs(found - expected) / max(abs(expected), 1e-30)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.7g}"


def compare_equal(run: str, name: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Check:
    """Tensors that must be the same bit for bit."""
    different = _keys_that_differ(expected, found) or [
        key for key in expected if not torch.equal(expected[key], found[key])
    ]
    text = f"{len(different)} differ, first {different[0]}" if different else "equal"
    return Check(run=run, name=name, expected="equal", found=text, tolerance="exact", passed=not different)


def compare_updates(
    run: str,
    initial: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    tolerance: float,
    of_each: bool = True,
    steps: int = 0,
) -> Check:
    """Parameters after so many steps, by how much of their change is wrong ([Note: error of the update]).

    `initial`: of the expected run. `of_each`: the worst tensor counts; else all elements of the model together.
    """
    different = _keys_that_differ(expected, found)
    if different:
        worst, error = different[0], math.inf
    else:
        worst, error, together = update_error(initial, expected, found, steps)
        error = error if of_each else together
    return Check(
        run=run,
        name="parameters",
        expected="equal changes",
        found=f"off by {error:.1e}" + (f", most in {worst}" if error else ""),
        tolerance=f"{tolerance:g}",
        passed=error <= tolerance,
    )


def update_error(
    initial: Mapping[str, Tensor], expected: Mapping[str, Tensor], found: Mapping[str, Tensor], steps: int = 0
) -> tuple[str, float, float]:
    """The parameter whose change differs most between two runs, by how much, and by how much all differ together.

    [Note: error of the update]
    Parameters hardly move in a few steps, so that relative to them even a missing update would look small. The
    difference is therefore taken relative to the change, both as root mean squares. The change is the tensor's own, but
    at least a tenth of that of the model's elements on average: what hardly moves, as the bias of attention's keys,
    which has no gradient but rounding, is all rounding and says nothing. Each step rounds the parameter itself, to half
    a unit in its last place: of one that is large beside its change, as a norm's weights near 1, that is more than all
    else, and is not counted.
    """
    changes = {name: expected[name].double() - initial[name].double() for name in expected}
    differences = {name: _beyond(found[name].double() - each.double(), each, steps) for name, each in expected.items()}
    overall = max(_rms(*changes.values()), 1e-30)
    errors = {name: _rms(differences[name]) / max(_rms(change), 0.1 * overall) for name, change in changes.items()}
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst], _rms(*differences.values()) / overall


def _beyond(difference: Tensor, value: Tensor, steps: int) -> Tensor:
    """What of a difference is more than rounding the value to float32 once a step."""
    return (difference.abs() - steps * _HALF_UNIT * value.double().abs()).clamp_min(0.0)


def _rms(*tensors: Tensor) -> float:
    """Root mean square of all elements."""
    elements = torch.cat([tensor.flatten() for tensor in tensors])
    return float(elements.square().mean().sqrt()) if elements.numel() else 0.0


def _keys_that_differ(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    return sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or expected[name].shape != found[name].shape
    )


def compare_checkpoint(run: str, outcome: Outcome) -> Check:
    """The last checkpoint against what the processes held."""
    name = "checkpoint"
    try:
        stored = outcome.checkpoint()
    except (FormatError, OSError) as error:
        return Check(run=run, name=name, expected="final parameters", found=str(error), tolerance="exact", passed=False)
    return compare_equal(run, name, outcome.weights("final"), stored)


def compare_randomness(run: str, found: Sequence[Mapping[str, Any]]) -> Check:
    """A model that draws random numbers in a step cannot be compared: they differ between layouts by design."""
    drawn = any(rank["random_numbers_drawn"] for rank in found)
    return Check(
        run=run,
        name="random numbers in a step",
        expected="none",
        found="drawn; switch dropout off under model.rehearse" if drawn else "none",
        tolerance="exact",
        passed=not drawn,
    )
