"""Sequences that several processes share, against one process: attention alone, and whole models."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from typing import Any

import pytest
from support.launch import results_of

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

METHODS = ("gather", "ulysses", "ring")
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
BOUNDS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2}
"""Of distances from one process in double precision; a bfloat16 has 8 bits."""


def attention(method: str, context: int, *, causal: bool, heads: int, kept: int, **changes: Any) -> dict[str, Any]:
    """A run of one call; `shape`: batch, length, and the size of a head of keys and of values."""
    run = {"kind": "attention", "shape": (2, 16, 8, 8), "dtype": "float64", "scale": None, **changes}
    name = f"{method} {context} {'causal' if causal else 'full'} {heads}/{kept} {run['shape']} {run['dtype']}"
    return run | {"name": name, "method": method, "context": context, "causal": causal, "heads": heads, "kept": kept}


def model(name: str, method: str, context: int, tensor: int = 1, **changes: Any) -> dict[str, Any]:
    """A run of a model."""
    run = {"kind": "model", "model": name, "method": method, "context": context, "tensor": tensor, **changes}
    return run | {"name": " ".join(map(str, (name, method, context, tensor, *changes)))}


SHAPES = [
    ((1, 8, 4, 4), "float64"),
    ((1, 64, 16, 8), "float64"),
    ((3, 48, 16, 16), "float32"),
    ((2, 32, 8, 8), "bfloat16"),
]
ATTENTION = [
    attention(method, context, causal=causal, heads=4, kept=kept)
    for method, context, causal, kept in product(METHODS, (2, 4), (True, False), (4, 2, 1))
] + [
    attention(method, context, causal=True, heads=8, kept=2, shape=shape, dtype=dtype, scale=0.3)
    for method, context, (shape, dtype) in product(METHODS, (2, 4), SHAPES)
]
MODELS = [
    *(model("gpt", method, context) for method, context in product(METHODS, (2, 4))),
    *(model("llama", method, context, checkpointed=True) for method, context in product(METHODS, (2, 4))),
    *(model("mixtral", method, 4) for method in METHODS),
    model("llama", "ring", 4, joins=False),
    *(model("gpt", method, 2, 2) for method in METHODS),
    model("gpt", "gather", 2, 2, checkpointed=True),
    model("gpt", "none", 1, 2),
    model("llama", "ring", 2, sharded=True, checkpointed=True),
]
DROPOUT = {"kind": "dropout", "name": "dropout", "method": "ring", "context": 2, "tensor": 2}
STAGES = [
    {"kind": "stages", "name": f"stages {name} {cuts}", "model": name, "method": method, "cuts": cuts}
    for name, method, cuts in (("llama", "ring", [1]), ("gpt", "gather", [3]), ("gpt", "ulysses", [0]))
]
"""Cut between blocks, behind the last one, and before the first."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, by the name of the run."""
    folder = tmp_path_factory.mktemp("context")
    return results_of([(4, [*ATTENTION, *MODELS, DROPOUT, *STAGES])], folder, "context_models", "context_worker")[0]


def named(run: dict[str, Any]) -> str:
    """Of a run."""
    name: str = run["name"]
    return name


@pytest.mark.parametrize("run", ATTENTION, ids=named)
def test_attention_to_what_others_have_is_that_of_one_process(
    results: list[dict[str, Any]], run: dict[str, Any]
) -> None:
    for each in results:
        assert each[run["name"]]["distance"] < BOUNDS[run["dtype"]]
        assert each[run["name"]]["dtypes"] == [f"torch.{run['dtype']}"]


def calls_of_attention(run: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """The collectives of forward and of backward of one call."""
    (batch, length, size, value_size), context, kept = run["shape"], run["context"], run["kept"]
    element = BYTES[run["dtype"]]
    keys = batch * length * kept * (size + value_size)
    if run["method"] == "gather":
        return (
            Counter({f"all_gather {context} {keys * element}": 1}),
            Counter({f"reduce_scatter {context} {keys * element}": 1}),
        )
    if run["method"] == "ring":
        part, times = keys // context, context - 1
        forward = Counter({f"all_to_all {context} {part * element}": times})
        return forward, forward + Counter({f"all_to_all {context} {part * max(element, 4)}": times})
    repeated = math.lcm(kept, context)
    inputs = batch * length // context * (run["heads"] * size + repeated * (size + value_size)) * element
    outputs = batch * length // context * run["heads"] * value_size * element
    both = Counter([f"all_to_all {context} {inputs}", f"all_to_all {context} {outputs}"])
    return both, both


@pytest.mark.parametrize("run", ATTENTION, ids=named)
def test_attention_tells_the_others_no_more_than_it_says(results: list[dict[str, Any]], run: dict[str, Any]) -> None:
    forward, backward = calls_of_attention(run)
    for each in results:
        assert each[run["name"]]["calls"] == forward + backward


@pytest.mark.parametrize("run", MODELS, ids=named)
def test_models_with_shared_sequences_learn_as_in_one_process(
    results: list[dict[str, Any]], run: dict[str, Any]
) -> None:
    for each in results:
        found = each[run["name"]]
        assert found["learnt"] > 0.1
        assert max(found["losses"], found["norms"], found["parameters"]) < 1e-9


def calls_of_model(run: dict[str, Any]) -> Counter[str]:
    """The collectives of a step: of attention in each block, and where the last block ends."""
    blocks, heads, kept = (3, 4, 4) if run["model"] == "gpt" else (2, 4, 2)
    forward, backward = calls_of_attention(
        {**run, "shape": (2, 32, 8, 8), "heads": heads, "kept": kept, "dtype": "float64"}
    )
    hidden = 2 * 32 * 32 * BYTES["float64"]
    ends = Counter([f"all_gather {run['context']} {hidden}", f"reduce_scatter {run['context']} {hidden}"])
    total = ends if run.get("joins", True) else Counter[str]()
    for _ in range(blocks):
        total += forward + backward + (forward if run.get("checkpointed") else Counter())
    return total


@pytest.mark.parametrize("run", [run for run in MODELS if run["tensor"] == 1 and "sharded" not in run], ids=named)
def test_models_tell_the_others_no_more_than_they_say(results: list[dict[str, Any]], run: dict[str, Any]) -> None:
    for each in results:
        assert each[run["name"]]["calls"] == calls_of_model(run)


def test_what_is_dropped_of_divided_sequences_differs_and_is_dropped_again(results: list[dict[str, Any]]) -> None:
    found = [each["dropout"] for each in results]
    assert all(each["repeats"] == 0 for each in found)
    assert all(0.3 < sum(each["zeros"]) / len(each["zeros"]) < 0.7 for each in found)
    assert len({tuple(each["zeros"]) for each in found}) == 4
    assert [each["generator"] for each in found[::2]] == [each["generator"] for each in found[1::2]]


@pytest.mark.parametrize("run", STAGES, ids=named)
def test_stages_of_a_pipeline_share_sequences(results: list[dict[str, Any]], run: dict[str, Any]) -> None:
    inside = run["cuts"] == [1]
    for each in results:
        assert each[run["name"]]["gradients"] < 1e-12
        assert each[run["name"]]["wires"][0] == [2, 16 if inside else 32, 32]
