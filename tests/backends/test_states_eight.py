"""`ShardedStates` on eight processes, two nodes of four or three levels of two, against one process and the planner."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
from support.launch import results_of
from support.states_model import CLIP
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

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WORLD = 8
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"optimizer": "adamw", "recomputed": True},
    {"reshard": False},
    {"optimizer": "adamw"},
)
EXACT = [run(*layout, **changes) for layout, changes in zip(layouts((2, 4), (2, 2, 2)), cycle(CHANGES), strict=False)]
BF16 = [
    run((2, 2, 2), degrees, second, dtype="bfloat16", clips=False)
    for degrees, second in (((2, 4, 8), None), ((8, 1, 8), 4), ((1, 8, 8), None), ((4, 2, 4), 2))
]
QUANTIZED = [
    run(sizes, degrees, second, int8_gathers=gathers, int4_reductions=reductions)
    for sizes, degrees, second, gathers, reductions in (
        ((2, 4), (8, 8, 8), None, ("dp_2",), ("dp_1", "dp_2")),
        ((2, 4), (8, 2, 8), 2, ("dp_1", "dp_2"), ("dp_2",)),
        ((2, 2, 2), (4, 8, 8), None, ("dp_1", "dp_2", "dp_3"), ("dp_1", "dp_2", "dp_3")),
        ((2, 2, 2), (2, 4, 4), None, (), ("dp_2",)),
    )
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, by the name of the run."""
    folder = tmp_path_factory.mktemp("states")
    return results_of([(WORLD, [*EXACT, *BF16, *QUANTIZED])], folder, "states_model", "states_worker")[0]


@pytest.mark.parametrize("case", EXACT, ids=[case["name"] for case in EXACT])
def test_equals_one_process(case: dict[str, Any], results: Any) -> None:
    found, (parameters, norms) = results[0][case["name"]], train_plainly(case["optimizer"], WORLD)
    assert found["norms"] == pytest.approx(norms, rel=1e-6)
    assert min(norms) > CLIP, "clipping acts in every step"
    assert difference(found["parameters"], parameters) < BOUNDS[case["optimizer"]]


@pytest.mark.parametrize("case", BF16, ids=[case["name"] for case in BF16])
def test_bf16_with_an_fp32_master_equals_one_process_to_the_bit(case: dict[str, Any], results: Any) -> None:
    expected = train_in_bf16(tuple(case["sizes"]), case["degrees"][1])
    assert difference(results[0][case["name"]]["parameters"], expected) == 0


@pytest.mark.parametrize("case", QUANTIZED, ids=[case["name"] for case in QUANTIZED])
def test_what_travels_in_fewer_bits_is_off_within_the_bound(case: dict[str, Any], results: Any) -> None:
    for found in (rank[case["name"]] for rank in results):
        assert found["exact"]
        assert found["gathered"] <= 1
        assert found["reduced"] <= 1
    assert (max(rank[case["name"]]["gathered"] for rank in results) > 0.5) == bool(case["int8_gathers"])
    assert max(rank[case["name"]]["reduced"] for rank in results) > 0.2


@pytest.mark.parametrize("case", QUANTIZED, ids=[case["name"] for case in QUANTIZED])
def test_fewer_bits_train_alike_and_send_what_is_planned(case: dict[str, Any], results: Any) -> None:
    found, (parameters, norms) = results[0][case["name"]], train_plainly("sgd", WORLD)
    assert found["norms"] == pytest.approx(norms, rel=0.05)
    assert found["norms"] != pytest.approx(norms, rel=1e-5)
    assert difference(found["parameters"], parameters) < 0.05
    for rank in results:
        assert rank[case["name"]]["calls"] == planned_calls(case)


@pytest.mark.parametrize("case", [*EXACT, *BF16], ids=[case["name"] for case in (*EXACT, *BF16)])
def test_bytes_and_collectives_are_the_planners(case: dict[str, Any], results: Any) -> None:
    for rank, found in enumerate(results):
        assert found[case["name"]]["at_rest"] == planned_bytes(case, rank)
        assert found[case["name"]]["calls"] == planned_calls(case)
