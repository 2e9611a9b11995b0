"""Models that several processes share, against one process, and against torch's own tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
from support.launch import results_of

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TWO: list[dict[str, Any]] = [
    {"case": "gpt2 own loss"},
    {"case": "gpt2", "optimizer": "adamw", "deferred": True, "stages": True},
    {"case": "gpt2 dropout"},
    {"case": "gpt2 dropout", "recomputed": True},
    {"case": "gpt2 dropout", "sequence": True, "recomputed": True},
    {"case": "llama", "sequence": True, "stages": True},
    {"case": "qwen3", "sequence": True, "deferred": True},
    {"case": "mixtral", "sequence": True, "recomputed": True},
    {"case": "bytes"},
]
"""On two processes, both with a part of every layer."""
FOUR: list[dict[str, Any]] = [
    {"case": "llama", "deferred": True},
    {"case": "qwen3", "sequence": True},
    {"case": "mixtral"},
    {"case": "t5"},
    {"case": "bytes", "sequence": True},
    {"case": "gpt2", "tensor": 2, "engine": "fsdp2"},
    {"case": "t5", "tensor": 2, "engine": "fsdp2", "recomputed": True},
    {"case": "llama", "tensor": 2, "engine": "amsp", "sequence": True},
    {"case": "gpt2", "tensor": 2, "engine": "amsp", "recomputed": True},
]
"""On four: as many parts, or two of each on two data processes."""
ROUGH: list[dict[str, Any]] = [
    {"case": "llama", "tensor": 2, "engine": "fsdp2 bf16", "sequence": True},
    {"case": "gpt2", "tensor": 2, "engine": "amsp bf16"},
]
FAULTY: list[dict[str, Any]] = [
    {"case": "llama", "fault": "entering"},
    {"case": "qwen3", "fault": "sharing"},
]


def named(runs: list[dict[str, Any]], tensor: int) -> list[dict[str, Any]]:
    """Runs with names, and the processes that share a layer."""
    full = [{"tensor": tensor, **run} for run in runs]
    return [run | {"name": " ".join(f"{key}={value}" for key, value in run.items())} for run in full]


LAUNCHES = [(2, named(TWO + FAULTY, 2)), (4, named(FOUR + ROUGH, 4))]
EXACT = [(launch, run["name"]) for launch, runs in enumerate((named(TWO, 2), named(FOUR, 4))) for run in runs]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the first process of each launch found."""
    folder = tmp_path_factory.mktemp("tensor")
    return [each[0] for each in results_of(LAUNCHES, folder, "tensor_models", "tensor_worker")]


@pytest.mark.parametrize(("launch", "name"), EXACT, ids=[name for _, name in EXACT])
def test_losses_norms_and_parameters_are_those_of_one_process(
    results: list[dict[str, Any]], launch: int, name: str
) -> None:
    found = results[launch][name]
    assert found["losses"] < 1e-5
    assert found["norms"] < 1e-5
    assert found["copies"] < 1e-6
    assert {each: error for each, error in found["parameters"].items() if error > 1e-5} == {}


@pytest.mark.parametrize("name", [run["name"] for run in named(ROUGH, 4)])
def test_in_bf16_they_are_as_close_as_bf16_lets_them(results: list[dict[str, Any]], name: str) -> None:
    found = results[1][name]
    assert found["losses"] < 2e-3
    assert found["norms"] < 2e-2
    assert max(found["parameters"].values()) < 3e-2


@pytest.mark.parametrize("name", [run["name"] for run in named(FAULTY, 2)])
def test_a_gradient_that_is_not_summed_shows(results: list[dict[str, Any]], name: str) -> None:
    assert max(results[0][name]["parameters"].values()) > 1e-4


@pytest.mark.parametrize("launch", [0, 1], ids=["2", "4"])
def test_blocks_compute_what_torch_does(results: list[dict[str, Any]], launch: int) -> None:
    assert max(results[launch]["blocks"]) < 1e-5


@pytest.mark.parametrize("launch", [0, 1], ids=["2", "4"])
def test_cross_entropy_of_divided_logits_is_that_of_whole_ones(results: list[dict[str, Any]], launch: int) -> None:
    assert results[launch]["loss"] < 1e-5


def test_divided_logits_are_not_taken_for_whole_ones(results: list[dict[str, Any]]) -> None:
    part = "of logits of which each process has 7 of 13 classes"
    assert results[0]["refusals"] == [
        f"argmax {part}",
        f"softmax {part}",
        f"__getitem__ {part}",
        f"sum {part}",
        "cross-entropy of divided logits has neither class weights nor label smoothing",
        "a target is no class of 13",
        "cross-entropy of divided logits takes (positions, classes) and the class of each position",
    ]
