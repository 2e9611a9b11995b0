"""Unmodified models as pipelines of four processes, against one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import stages_models
from support.launch import results_of
from torch import Tensor

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

COUNT = 6
"""Micro-batches."""
CASES: list[dict[str, Any]] = [
    {"name": f"{model} {family}", "model": model, "family": family, "cuts": cuts[family == "zb-v"]}
    for model, cuts in {
        "u_net": ([2, 3, 5], [0, 1, 2, 3, 4, 5, 6]),
        "conditioned": ([1, 3, 4], [0, 1, 2, 3, 4, 5, 6]),
    }.items()
    for family in ("zb-h1", "zb-v")
] + [{"name": "gated", "model": "gated", "family": "zb-h1", "cuts": [1, 2, 4]}]
"""Four stages, or eight with embedding and head alone."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, by the name of the run."""
    return results_of([(4, CASES)], tmp_path_factory.mktemp("stages"), "stages_models", "stages_worker")[0]


@functools.cache
def reference(model: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole model."""
    torch.manual_seed(0)
    case: stages_models.Case = getattr(stages_models, model)()
    total = 0.0
    for number in range(COUNT):
        torch.manual_seed(number)
        loss = case.forward(case.model, case.batch(number)) / COUNT
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total, {name: each.grad for name, each in case.model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_stages_in_processes_have_the_gradients_of_one_process(
    results: list[dict[str, Any]], case: dict[str, Any]
) -> None:
    loss, expected = reference(case["model"])
    mine = [each[case["name"]] for each in results]
    assert [each["loss"] for each in mine if each["loss"] is not None] == [pytest.approx(loss, rel=1e-6)]
    found = {name: torch.tensor(value) for each in mine for name, value in each["gradients"].items()}
    assert sum(len(each["gradients"]) for each in mine) == len(expected)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
