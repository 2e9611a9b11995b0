"""What emitted scripts left, against what is expected. The bounds are explained in `test_processes.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.launch import parameters_of, read_checkpoint, read_metrics
from support.reference import Trained


def column(out: Path, name: str) -> list[Any]:
    return [line[name] for line in read_metrics(out)]


def averages_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "optimizer.average."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((float((found[name] - expected[name]).abs().max()) for name in expected), default=0.0)


def assert_values_are_near(out: Path, expected: Trained, limit: float) -> None:
    """Parameters and averages of the newest checkpoint."""
    found = read_checkpoint(out)
    assert furthest(parameters_of(found), expected.parameters) < limit
    assert furthest(averages_of(found), expected.averages) < limit


def assert_as_plain(out: Path, expected: Trained, optimizer: str) -> None:
    """A short run in fp32."""
    assert column(out, "tokens") == expected.tokens
    assert column(out, "loss") == pytest.approx(expected.losses, rel=5e-7)
    assert column(out, "grad_norm") == pytest.approx(expected.norms, rel=1e-6)
    assert min(expected.norms) > 0.05
    assert_values_are_near(out, expected, 3e-7 if optimizer == "sgd" else 2e-5)


def assert_as_in_bf16(out: Path, first: Path) -> None:
    """A short run in bf16, against one on one process."""
    assert column(out, "loss") == pytest.approx(column(first, "loss"), rel=1e-4)
    assert column(out, "grad_norm") == pytest.approx(column(first, "grad_norm"), rel=2e-3)
    found, expected = parameters_of(read_checkpoint(out)), parameters_of(read_checkpoint(first))
    assert all(value.dtype == torch.float32 for value in found.values())
    assert furthest(found, expected) < 2e-2
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    assert float(difference.abs().mean()) < 2e-4


def assert_went_on(out: Path, expected: Trained) -> None:
    """A longer run in fp32 that changed its plan on the way."""
    assert column(out, "tokens") == expected.tokens
    assert column(out, "loss") == pytest.approx(expected.losses, rel=1e-5)
    assert_values_are_near(out, expected, 2e-5)
