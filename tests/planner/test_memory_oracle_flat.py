"""Predicted memory of engine `amsp` against PyTorch's memory tracker, which watches the emitted script and its runtime
on fake tensors. What differs stands in docs/memory-oracle.md."""

from __future__ import annotations

from typing import Any

import pytest
from support.oracle_cases import Case, Comparison, compare

pytestmark = pytest.mark.slow


def case(parameters: int, gradients: int, optimizer: int, world: int = 8, **others: Any) -> Case:
    fields = {"model": "llama3.1-8b", "layers": 3, "checkpointed": "none", "sequence": 512, **others}
    return Case(shard=parameters, gradients=gradients, optimizer_states=optimizer, world=world, **fields)


FROZEN = {"model": "frozen", "layers": 4, "sequence": 256, "micro_batch": 2}
CASES = {
    "zero-1": case(1, 1, 8, accumulation=3),
    "zero-1, three axes": case(1, 64, 64, 64, axes=(2, 4, 8), checkpointed=1),
    "zero-3, whole gradients, kept": case(8, 1, 8, accumulation=3, kept=True, checkpointed="full"),
    "independent": case(2, 2, 4, accumulation=3),
    "hierarchical": case(64, 8, 64, 64, axes=(8, 8), accumulation=3),
    "second copy": case(64, 64, 64, 64, axes=(2, 4, 8), second=8, precision="fp32", layers=5, checkpointed="full"),
    "frozen": case(4, 2, 8, accumulation=3, **FROZEN),
    "frozen, tied": case(1, 2, 4, accumulation=2, **(FROZEN | {"model": "frozen, tied", "precision": "fp32"})),
    "fewer bits": case(64, 64, 64, 64, axes=(8, 8), int8=(0, 1), int4=(0, 1), accumulation=2),
}
SUM_OF_TIED = 5000 * 1024 * 4
"""Fake tensors are never added in place, so the sum of a tied parameter's two gradients is a third tensor."""


@pytest.fixture(scope="module", params=CASES)
def compared(request: pytest.FixtureRequest) -> tuple[str, Comparison]:
    return request.param, compare(CASES[request.param])


def test_the_peak(compared: tuple[str, Comparison]) -> None:
    """To one part in ten thousand, but where a block's newest gradient is taken to be its largest."""
    name, comparison = compared
    assert comparison.peak == comparison.predicted_peak
    assert -1e-4 < comparison.difference < (0.005 if name == "second copy" else 1e-4)


def test_every_category_at_the_peak(compared: tuple[str, Comparison]) -> None:
    """Activations, temporaries, gradients and what is on its way together: the tracker cannot tell them apart."""
    _, comparison = compared
    peak = comparison.phases[comparison.peak]
    for category, difference in peak.differences().items():
        assert abs(difference) < (0.005 if category == "activations" else 1e-6) * peak.tracked.total(), category


def test_every_phase(compared: tuple[str, Comparison]) -> None:
    """Within 1 %, but for those that docs/memory-oracle.md explains."""
    name, comparison = compared
    above = {"block forward": 0.2, "head backward": 0.05, "backward gather": 0.06, "root gradient reduction": 0.04}
    assert {"initialise", "block forward", "block backward", "root gradient reduction"} <= set(comparison.phases)
    for phase, both in comparison.phases.items():
        third = SUM_OF_TIED * (name == "frozen, tied" and phase == "embedding backward")
        difference = (both.predicted.total() + third) / both.tracked.total() - 1
        assert -0.01 < difference < above.get(phase, 0.01), phase


def test_what_is_left_out_is_below_the_peak(compared: tuple[str, Comparison]) -> None:
    _, comparison = compared
    peak = comparison.phases[comparison.predicted_peak].predicted.total()
    assert all(size < peak for size in comparison.unpredicted.values())
