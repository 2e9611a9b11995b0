"""The executor of pipelines on two, four and eight processes, against one process and the simulator."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from support.launch import results_of
from support.pipeline_model import CLIP, FEATURES, edges_of
from support.pipeline_orders import random_timetable
from support.pipeline_reference import Trained, train_in_bf16, train_plainly
from torch import Tensor

from shardwright.planner.schedules.simulator import simulate
from shardwright.planner.schedules.table import SCHEDULES, make_schedule
from shardwright.planner.schedules.timetable import Action, Costs, Layout, Placement, Timetable

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BOUND = 2e-6
"""Largest difference of a parameter in fp32, by the order of sums."""
UNIT = (1.0, 1.0, 1.0, 0.0)


def run(
    name: str, layout: Layout, timetable: Timetable, copies: tuple[int, ...] = (), **changes: Any
) -> dict[str, Any]:
    """A run as `pipeline_worker.py` takes it."""
    return {
        "name": name,
        "sizes": [layout.ranks, *copies],
        "chunks": layout.chunks,
        "placement": layout.placement,
        "timetable": timetable,
        "micro_batches": 1 + max(action.micro_batch for action in timetable[0]),
        "passes": 1,
        "clips": False,
        "features": (),
    } | changes


def family(
    name: str, ranks: int, micro_batches: int, copies: tuple[int, ...] = (), chunks: int | None = None, **changes: Any
) -> dict[str, Any]:
    """A family's timetable."""
    layout, _, timetable = make_schedule(name, ranks, micro_batches, UNIT, chunks=chunks)
    words = [
        f"{name} x {layout.chunks}",
        str((ranks, *copies)),
        *(f"{key} {value}" for key, value in changes.items() if key != "measures"),
    ]
    return run(" ".join(words), layout, timetable, copies, **changes)


def shuffled(
    ranks: int, chunks: int, placement: Placement, seed: int, copies: tuple[int, ...] = (), **changes: Any
) -> dict[str, Any]:
    """A random order of all actions."""
    layout = Layout(ranks, chunks, placement)
    timetable = random_timetable(layout, 4, edges_of(layout.stages, changes.get("features", ())), seed)
    return run(f"random {seed}", layout, timetable, copies, **changes)


TWO = [
    *(family(name, 2, 4) for name in SCHEDULES),
    family("zb-auto", 2, 4, chunks=2),
    family("zb-h1", 2, 4, features=["frozen"]),
    family("zb-h1", 2, 4, features=["checkpointing", "dropout"]),
    family("1f1b", 2, 3, passes=2),
    family("zb-h1", 2, 4, clips=True, features=["tied"]),
    family("zb-v", 2, 4, clips=True, features=["tied"]),
    shuffled(2, 2, "loop", 1),
    shuffled(2, 4, "wave", 2, features=FEATURES, clips=True),
]
"""Stages of 3 and 5 blocks, or of 1, 3, 2 and 2."""
FOUR = [
    *(family(name, 4, 8, measures=True) for name in SCHEDULES),
    family("zb-auto", 4, 8, chunks=2, measures=True),
    family("zb-h1", 4, 8, features=["frozen", "checkpointing"]),
    family("zb-h2", 4, 8, features=["skips", "checkpointing", "dropout"]),
    family("zb-v", 4, 8, features=["skips", "dropout"]),
    family("zb-h1", 4, 8, features=["tied"], clips=True, passes=2),
    shuffled(4, 2, "wave", 3, features=["skips", "dropout", "tied"]),
    shuffled(4, 1, "loop", 4, features=FEATURES, clips=True),
    *(family("zb-h1", 2, 4, (2,), degrees=degrees, clips=True) for degrees in ((1, 1, 1), (1, 1, 2))),
    family("zb-h1", 2, 4, (2,), degrees=(1, 2, 2), reduce_every=1, clips=True, features=["checkpointing"]),
    family("zb-h2", 2, 4, (2,), degrees=(2, 2, 2), reduce_every=2, gathers=(1, 1)),
    family("zb-v", 2, 4, (2,), degrees=(2, 2, 2), gathers=(2, 0), clips=True, features=["tied", "checkpointing"]),
    family("zb-v", 2, 4, (2,), degrees=(1, 2, 2), reduce_every=1, clips=True, passes=2, features=["tied"]),
    family("1f1b", 2, 4, (2,), degrees=(1, 1, 2), clips=True, features=["tied"]),
    family("zb-h1", 2, 4, (2,), clips=True, features=["tied", "dropout"]),
    shuffled(2, 2, "wave", 5, (2,), degrees=(1, 2, 2), reduce_every=1, features=["tied", "skips"]),
]
EIGHT = [
    *(family(name, 8, 16 if name == "dualpipe-v" else 8) for name in SCHEDULES),
    family("zb-v", 8, 8, features=["skips"]),
    family("1f1b", 2, 4, (2, 2), degrees=(1, 1, 4), clips=True),
    family("zb-h1", 2, 4, (2, 2), degrees=(1, 2, 4), reduce_every=1, features=["tied"], clips=True),
    family("zb-v", 2, 4, (2, 2), degrees=(2, 4, 4), gathers=(1, 1), reduce_every=2, features=["dropout"]),
    family("zb-h2", 4, 8, (2,), degrees=(1, 1, 2), clips=True, features=["skips"]),
]
BF16 = [
    family("zb-h1", 2, 4, (2,), degrees=(1, 1, 2), dtype="bfloat16"),
    family("zb-v", 2, 4, (2,), degrees=(2, 2, 2), gathers=(1, 1), dtype="bfloat16"),
]
FAULTS = [
    family("zb-h1", 2, 4, (2,), fault="lost W"),
    family("zb-h1", 2, 4, (2,), fault="scale"),
    family("zb-h1", 2, 4, (2,), fault="no reduction"),
    family("zb-h1", 2, 4, (2,), fault="no tie", features=["tied"]),
]
LAUNCHES = {2: TWO, 4: [*FOUR, *BF16, *FAULTS], 8: EIGHT}
RIGHT = [(world, case) for world, cases in LAUNCHES.items() for case in cases if not {"fault", "dtype"} & set(case)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process found, by the number of processes and then by the name of the run."""
    folder = tmp_path_factory.mktemp("pipeline")
    launches = list(LAUNCHES.items())
    assert all(len({case["name"] for case in cases}) == len(cases) for cases in LAUNCHES.values())
    return dict(zip(LAUNCHES, results_of(launches, folder, "pipeline_model", "pipeline_worker"), strict=True))


def reference(case: dict[str, Any]) -> Trained:
    copies = prod(case["sizes"][1:])
    stages = case["sizes"][0] * case["chunks"]
    features = tuple(each for each in case["features"] if each != "checkpointing")
    return train_plainly(stages, case["micro_batches"], copies, case["passes"], case["clips"], features)


def difference(case: dict[str, Any], found: list[dict[str, Any]], expected: dict[str, Tensor]) -> float:
    """Largest of a parameter, of which every rank of the pipeline has its own."""
    largest, seen = 0.0, set()
    for each in found:
        for name, values in each[case["name"]]["parameters"].items():
            seen.add(name)
            largest = max(largest, float((torch.tensor(values) - expected[name].flatten()).abs().max()))
    assert seen == set(expected)
    return largest


def to_the_bit(case: dict[str, Any]) -> bool:
    """Whether gradients are summed in the order of the plain loop."""
    in_order = all(
        [action.micro_batch for action in actions if (action.kind, action.chunk) == (kind, chunk)]
        == list(range(case["micro_batches"]))
        for actions in case["timetable"]
        for kind in "IW"
        for chunk in range(case["chunks"])
    )
    return in_order and len(case["sizes"]) == 1 and not case["clips"] and not {"tied", "skips"} & set(case["features"])


@pytest.mark.parametrize(("world", "case"), RIGHT, ids=lambda value: value["name"] if isinstance(value, dict) else "")
def test_a_pipeline_equals_one_process(
    results: dict[int, list[dict[str, Any]]], world: int, case: dict[str, Any]
) -> None:
    found, expected = results[world], reference(case)
    apart = difference(case, found, expected.parameters)
    assert apart == 0.0 if to_the_bit(case) else apart < BOUND
    mine = [each[case["name"]] for each in found]
    assert all(each["norms"] == pytest.approx(expected.norms, rel=1e-5) for each in mine)
    if case["clips"]:
        assert min(expected.norms) > CLIP
    last = Layout(case["sizes"][0], case["chunks"], case["placement"]).place(case["sizes"][0] * case["chunks"] - 1)[0]
    copies = world // case["sizes"][0]
    assert mine[last * copies]["losses"] == pytest.approx(
        expected.losses if copies == 1 else mine[last * copies]["losses"]
    )
    if copies == 1:
        assert mine[last]["evaluated"] == pytest.approx(expected.evaluated, rel=1e-5)


def test_several_cases_are_compared_to_the_bit() -> None:
    assert sum(to_the_bit(case) for _, case in RIGHT) >= 10


@pytest.mark.parametrize(("world", "case"), RIGHT, ids=lambda value: value["name"] if isinstance(value, dict) else "")
def test_actions_run_in_the_order_of_the_timetable(
    results: dict[int, list[dict[str, Any]]], world: int, case: dict[str, Any]
) -> None:
    copies = world // case["sizes"][0]
    for rank, found in enumerate(results[world]):
        expected = [list(action) for action in case["timetable"][rank // copies]]
        assert found[case["name"]]["executed"] == expected


MEASURED = [(world, case) for world, case in RIGHT if case.get("measures")]


@pytest.mark.parametrize(("world", "case"), MEASURED, ids=lambda v: v["name"] if isinstance(v, dict) else "")
def test_peak_activation_bytes_are_those_of_the_simulator(
    results: dict[int, list[dict[str, Any]]], world: int, case: dict[str, Any]
) -> None:
    layout = Layout(world, case["chunks"], case["placement"])
    ones = (1.0,) * layout.stages
    found = [each[case["name"]] for each in results[world]]
    kept, held = ({int(at): size for each in found for at, size in each[key].items()} for key in ("kept", "held"))
    stages = range(layout.stages)
    costs = Costs(ones, ones, ones, ones[1:], [kept[at] for at in stages], [held.get(at, 0) for at in stages])
    timetable = tuple(tuple(Action(*action) for action in actions) for actions in case["timetable"])
    assert [each["peak"] for each in found] == list(simulate(timetable, layout, costs).peak_memory)
    assert all(size > 0 for size in kept.values())


@pytest.mark.parametrize("case", BF16, ids=lambda case: case["name"])
def test_in_bf16_gradients_are_added_up_in_fp32(results: dict[int, list[dict[str, Any]]], case: dict[str, Any]) -> None:
    expected = train_in_bf16(case["sizes"][0] * case["chunks"], case["micro_batches"], 2)
    assert difference(case, results[4], expected) == 0.0


def test_faults_are_found(results: dict[int, list[dict[str, Any]]]) -> None:
    lost, *others = FAULTS
    assert all("never uses" in each[lost["name"]]["error"] for each in results[4])
    for case in others:
        assert difference(case, results[4], reference(case).parameters) > 100 * BOUND, case["fault"]
