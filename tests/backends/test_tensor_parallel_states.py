"""Initial values, weights and checkpoints of models that several processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.launch import read_checkpoint, results_of

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints are."""
    return tmp_path_factory.mktemp("tensor-states")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    return results_of([(4, [{"folder": str(folder)}])], folder, "tensor_models", "tensor_states_worker")[0]


def test_initial_values_are_those_of_one_process(results: list[dict[str, Any]]) -> None:
    assert [each["initialised"] for each in results] == [[True] * 4] * 4


def test_each_process_reads_its_own_part_of_the_weights(results: list[dict[str, Any]]) -> None:
    assert [each["loaded"] for each in results] == [True] * 4
    assert [each["read"] for each in results] == [True] * 4


@pytest.mark.parametrize("case", ["gpt2", "mixtral"])
def test_a_checkpoint_goes_from_any_layout_to_any_other(results: list[dict[str, Any]], folder: Path, case: str) -> None:
    first = read_checkpoint(folder / case / "tp2-fsdp2")
    assert any(name.startswith("optimizer.exp_avg.") for name in first)
    for each in ("tp2-amsp", "tp4", "tp2", "tp1-fsdp2", "tp1-amsp", "again"):
        found = read_checkpoint(folder / case / each)
        assert found.keys() == first.keys()
        assert [name for name in first if not torch.equal(found[name], first[name])] == []
