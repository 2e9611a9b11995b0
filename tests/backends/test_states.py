"""`ShardedStates` under every legal triple of shard degrees, on four processes, against one process and the planner."""

from __future__ import annotations

from typing import Any

import pytest
from support.launch import results_of
from support.states_model import CLIP, FEATURES, OPTIMIZERS
from support.states_reference import (
    BOUNDS,
    difference,
    layouts,
    planned_bytes,
    planned_calls,
    run,
    train_in_bf16,
    train_plainly,
)

from shardwright.planner.flat import chain

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WORLD = 4
FAULTS = ("scale", "lost micro-batch", "stale bucket", "wrong group")
RUNS = [
    run(*layout, **changes)
    for layout in layouts((2, 2), (4,))
    for changes in (
        {},
        {"optimizer": "adamw", "recomputed": True},
        {"reshard": False},
        {"dtype": "bfloat16", "clips": False},
    )
]
FAULTY = [run((2, 2), (2, 2, 4)) | {"name": fault, "fault": fault} for fault in FAULTS]
DRIVEN = [run((2, 2), degrees, second) for degrees, second in (((2, 2, 4), None), ((4, 4, 4), 2), ((1, 4, 4), None))]
COMPILED = run((2, 2), (4, 2, 4), compiled=True)
ODD_LAYOUTS = (((2, 4, 4), None, True), ((4, 2, 4), 2, True), ((4, 4, 4), None, False))
ODD = [
    run((2, 2), degrees, second, features=features, evaluates=True, reshard=reshard)
    for features, layouts_of in (
        *(([feature], ODD_LAYOUTS[index % 3 :][:1]) for index, feature in enumerate(FEATURES)),
        (FEATURES, ODD_LAYOUTS),
    )
    for degrees, second, reshard in layouts_of
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, by the name of the run."""
    folder = tmp_path_factory.mktemp("states")
    driven = [each | {"name": f"driven {each['name']}", "driven": True} for each in DRIVEN]
    listed = [*RUNS, *FAULTY, *driven, COMPILED, *ODD]
    return results_of([(WORLD, listed)], folder, "states_model", "states_worker")[0]


def names(cases: list[dict[str, Any]]) -> list[str]:
    return [case["name"] for case in cases]


EXACT = [*(each for each in RUNS if each["dtype"] == "float32"), COMPILED]


@pytest.mark.parametrize("case", EXACT, ids=names(EXACT))
def test_equals_one_process(case: dict[str, Any], results: Any) -> None:
    found, (parameters, norms) = results[0][case["name"]], train_plainly(case["optimizer"], WORLD)
    assert found["norms"] == pytest.approx(norms, rel=1e-6)
    assert min(norms) > CLIP, "clipping acts in every step"
    assert difference(found["parameters"], parameters) < BOUNDS[case["optimizer"]]


BF16 = [each for each in RUNS if each["dtype"] == "bfloat16" and tuple(each["sizes"]) == (2, 2)]


@pytest.mark.parametrize("case", BF16, ids=names(BF16))
def test_bf16_with_an_fp32_master_equals_one_process_to_the_bit(case: dict[str, Any], results: Any) -> None:
    expected = train_in_bf16(tuple(case["sizes"]), case["degrees"][1])
    assert difference(results[0][case["name"]]["parameters"], expected) == 0


@pytest.mark.parametrize("case", DRIVEN, ids=names(DRIVEN))
def test_a_list_of_actions_equals_the_hooks_to_the_bit(case: dict[str, Any], results: Any) -> None:
    for found in results:
        driven, hooked = found[f"driven {case['name']}"], found[case["name"]]
        for what in ("norms", "parameters", "at_rest", "calls"):
            assert driven[what] == hooked[what], what


@pytest.mark.parametrize("case", ODD, ids=names(ODD))
def test_odd_models_equal_one_process(case: dict[str, Any], results: Any) -> None:
    parameters, norms = train_plainly(case["optimizer"], WORLD, tuple(case["features"]))
    found = results[0][case["name"]]
    assert found["norms"] == pytest.approx(norms, rel=1e-6)
    assert difference(found["parameters"], parameters) < BOUNDS[case["optimizer"]]


def test_a_process_without_parameters_takes_part(results: Any) -> None:
    """AdamW's first step goes against the sign of the gradient; a gradient of zero stays."""
    for found in results:
        assert found["three numbers"] == pytest.approx([WORLD * 20**0.5, 0.0, 0.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("case", RUNS, ids=names(RUNS))
def test_bytes_at_rest_are_the_planners(case: dict[str, Any], results: Any) -> None:
    for rank, found in enumerate(results):
        assert found[case["name"]]["at_rest"] == planned_bytes(case, rank)


@pytest.mark.parametrize("case", RUNS, ids=names(RUNS))
def test_collectives_are_the_planners(case: dict[str, Any], results: Any) -> None:
    for found in results:
        assert found[case["name"]]["calls"] == planned_calls(case)


def test_every_planted_fault_shows(results: Any) -> None:
    parameters, norms = train_plainly("sgd", WORLD)
    for fault in FAULTS:
        found = results[0][fault]
        off = max(abs(one / other - 1) for one, other in zip(found["norms"], norms, strict=True))
        assert off > 1e-3, fault
        assert difference(found["parameters"], parameters) > 100 * BOUNDS["sgd"] or fault == "scale", fault


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_evaluation_gathers_and_releases(optimizer: str, results: Any) -> None:
    """Whatever the layout, a forward without backward finds the same held-out loss."""
    losses = [
        results[0][each["name"]]["evaluated"]
        for each in RUNS
        if each["dtype"] == "float32" and each["optimizer"] == optimizer
    ]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


@pytest.mark.parametrize("degrees", [(2, 1, 1), (1, 4, 2), (4, 4, 2)])
def test_states_wider_than_the_optimizers_are_refused(degrees: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least as wide"):
        chain(WORLD, *degrees)


def test_degrees_that_do_not_divide_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        chain(12, 2, 3, 6)
    assert chain(16, 2, 4, 8).sizes == (2, 2, 2, 2)
