"""Experts shared by several processes against one process with all of them, under every engine that can."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from support.expert_parallel_model import ACCUMULATION, BLOCKS, CLIP, build, train_plainly
from support.launch import results_of

from shardwright.planner.flat import Bucket, Chain, at_rest, buckets, step_sends
from shardwright.planner.quantized import message_bytes
from shardwright.schemas.profile import Parameter

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BOUND = 1e-5
"""Largest difference in fp32, by the order of sums and of rows."""
LAYERS = 2


def alone(implementation: str, chosen: int, routing: str, **changes: Any) -> dict[str, Any]:
    base = {"tp": 1, "recomputed": False, "grad": True, "of_tokens": True} | changes
    name = " ".join(map(str, ("alone", implementation, chosen, routing, *base.values())))
    return {
        "name": name,
        "kind": "alone",
        "implementation": implementation,
        "chosen": chosen,
        "routing": routing,
        **base,
    }


def run(kind: str, model: str, ep: int, sizes: list[int], degrees: Any, **changes: Any) -> dict[str, Any]:
    base = {"optimizer": "sgd", "recomputed": False, "tied": False, "dtype": "float32"} | changes
    name = " ".join(map(str, (kind, model, ep, sizes, degrees, *base.values())))
    return {"name": name, "kind": kind, "model": model, "ep": ep, "sizes": sizes, "degrees": degrees, **base}


ALONE = [
    *(alone(kind, k, to) for kind in ("eager", "grouped_mm") for k in (1, 2) for to in ("uneven", "to the first")),
    alone("eager", 2, "to the first", recomputed=True),
    alone("grouped_mm", 2, "uneven", of_tokens=False),
    alone("grouped_mm", 2, "to the first", grad=False),
]
WITH_TENSOR_PARALLELISM = [
    alone("eager", 2, "uneven", tp=2),
    alone("grouped_mm", 1, "to the first", tp=2, recomputed=True),
]
OF_TWO = [
    run("fsdp2", "mixtral", 2, [2, 1], True),
    run("amsp", "mixtral", 2, [2], [2, 2, 2, None], tied=True),
]
OF_FOUR = [
    run("fsdp2", "mixtral", 2, [4, 1], True),
    run("fsdp2", "qwen3-moe", 2, [2, 2], True, optimizer="adamw", recomputed=True),
    run("fsdp2", "mixtral", 4, [4, 1], False, flag="set_requires_gradient_sync"),
    run("fsdp2", "deepseek-v3", 2, [1, 4], False),
    run("amsp", "mixtral", 2, [2, 2], [4, 4, 4, None]),
    run("amsp", "qwen3-moe", 2, [2, 2], [2, 1, 4, None], optimizer="adamw", recomputed=True),
    run("amsp", "mixtral", 4, [2, 2], [4, 2, 4, 2], recomputed=True),
    run("amsp", "mixtral", 2, [2, 2], [4, 2, 4, 2], recomputed="partly"),
    run("amsp", "deepseek-v3", 2, [2, 2], [1, 2, 2, None]),
    run("pipeline", "mixtral", 2, [2], [1, 1, 2, None]),
    run("pipeline", "qwen3-moe", 2, [2], [2, 2, 2, None], tied=True, recomputed=True),
    run("pipeline", "mixtral", 2, [2], [1, 1, 2, None], tied=True, late=True),
]
IN_BF16 = [
    run(kind, "mixtral", ep, sizes, degrees, dtype="bfloat16")
    for kind, sizes, degrees in (("fsdp2", [4, 1], True), ("amsp", [2, 2], [4, 2, 4, None]))
    for ep in (1, 2)
]
IN_FEWER_BITS = run(
    "amsp", "mixtral", 2, [2, 2], [4, 4, 4, None], int8_gathers=["dp_1", "dp_2"], int4_reductions=["dp_2"]
)
SAVING = [
    run("fsdp2", "mixtral", 2, [2, 1], True, optimizer="adamw"),
    run("amsp", "mixtral", 2, [2], [2, 1, 2, None], optimizer="adamw"),
]
LOADING = [
    (0, run("amsp", "mixtral", 4, [2, 2], [4, 1, 4, None], optimizer="adamw")),
    (0, run("pipeline", "mixtral", 2, [2], [2, 1, 2, None], optimizer="adamw")),
    (0, run("fsdp2", "mixtral", 1, [2, 2], True, optimizer="adamw")),
    (1, run("fsdp2", "mixtral", 4, [2, 2], True, optimizer="adamw")),
    (1, run("amsp", "mixtral", 1, [4], [4, 1, 4, None], optimizer="adamw")),
    (1, run("amsp", "mixtral", 2, [2, 2], [2, 1, 4, None], optimizer="adamw")),
]
EXACT = [*OF_TWO, *OF_FOUR]


def names(cases: list[dict[str, Any]]) -> list[str]:
    return [case["name"] for case in cases]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By the name of the run, what each process found."""
    folder = tmp_path_factory.mktemp("experts")
    saving = [each | {"folder": str(folder / f"saved-{at}"), "name": f"save {at}"} for at, each in enumerate(SAVING)]
    loading = [
        each | {"folder": str(folder / f"saved-{at}"), "loads": True, "name": f"load {at} {each['name']}"}
        for at, each in LOADING
    ]
    shares = {"name": "shares", "kind": "shares"}
    launches = [
        (2, [*ALONE, *OF_TWO, *saving]),
        (4, [shares, *WITH_TENSOR_PARALLELISM, *OF_FOUR, *IN_BF16, IN_FEWER_BITS, *loading]),
    ]
    found = results_of(launches, Path(folder), "expert_parallel_model", "expert_parallel_worker")
    return {name: [each[name] for each in every] for every in found for name in every[0]}


def difference(found: list[dict[str, Any]], expected: dict[str, torch.Tensor], what: str = "parameters") -> float:
    """Largest difference of a parameter; together the processes must have all of them."""
    assert set().union(*(each[what] for each in found)) == set(expected)
    return max(
        float((torch.tensor(values) - expected[name].double().flatten()).abs().max())
        for each in found
        for name, values in each[what].items()
    )


@pytest.mark.parametrize("case", [*ALONE, *WITH_TENSOR_PARALLELISM], ids=names([*ALONE, *WITH_TENSOR_PARALLELISM]))
def test_a_layer_equals_one_process_with_all_experts(case: dict[str, Any], results: Any) -> None:
    found = results[case["name"]]
    gradients = {"tokens", "weights"} if case["of_tokens"] else {"weights"}
    for each in found:
        of = {"output", *gradients, "gate_up_proj", "down_proj"} if case["grad"] else {"output"}
        assert each["off"].keys() == of
        assert max(each["off"].values()) < BOUND
    if case["routing"] == "to the first":
        assert [each["load"] for each in found] == [2.0] * len(found), "the last process gets nothing"
    assert [each["again"] for each in found] == [1.0] * len(found), "nothing since"


@pytest.mark.parametrize("case", EXACT, ids=names(EXACT))
def test_training_equals_one_process(case: dict[str, Any], results: Any) -> None:
    found = results[case["name"]]
    expected = train_plainly(case["model"], case["optimizer"], case["tied"], prod(case["sizes"]))
    assert found[0]["norms"] == pytest.approx(expected.norms, rel=1e-5)
    assert found[0]["losses"] == pytest.approx(expected.losses, rel=1e-5)
    assert min(expected.norms) > CLIP, "clipping acts in every step"
    assert difference(found, expected.parameters) < BOUND
    assert all(1 < each["load"] <= case["ep"] for each in found)
    if case["kind"] != "pipeline":
        assert found[0]["evaluated"] == pytest.approx(expected.evaluated, rel=1e-5)


@pytest.mark.parametrize("case", EXACT, ids=names(EXACT))
def test_exchanges_and_sums_are_counted(case: dict[str, Any], results: Any) -> None:
    """Forward exchanges counts, tokens, weights and results; backward the gradients of the last three."""
    layers = 1 if case["kind"] == "pipeline" or case["model"] == "deepseek-v3" else LAYERS
    expected = ACCUMULATION * layers * ((8 if case["recomputed"] else 4) + 3)
    for found in results[case["name"]]:
        assert sum(n for call, n in found["calls"].items() if call.startswith(f"all_to_all {case['ep']} ")) == expected
        norms = [call for call in found["calls"] if call.startswith("all_reduce") and call.endswith(" 4")]
        world = len(results[case["name"]])
        assert norms == [f"all_reduce {world} 4"]
        assert found["calls"][norms[0]] == 1


def test_experts_are_sharded_over_the_processes_that_have_the_same_ones(results: Any) -> None:
    """Two of four experts, each 48 * 16 + 16 * 24 fp32 numbers; the rest of a block is padded to 560."""
    experts, rest, outside = 2 * (48 * 16 + 16 * 24) * 4, 560 * 2 * 4, 656 * 2 * 4
    (sharded,) = [each for each in OF_FOUR if each["degrees"] == [4, 4, 4, None]]
    for found in results[sharded["name"]]:
        calls = {call: n for call, n in found["calls"].items() if not call.startswith("all_to_all")}
        assert calls == {
            f"all_gather 2 {experts}": 2 * ACCUMULATION * LAYERS,
            f"reduce_scatter 2 {experts}": ACCUMULATION * LAYERS,
            f"all_gather 2 {rest}": 2 * ACCUMULATION * LAYERS,
            f"all_gather 2 {rest // 2}": 2 * ACCUMULATION * LAYERS,
            f"reduce_scatter 2 {rest}": ACCUMULATION * LAYERS,
            f"reduce_scatter 2 {rest // 2}": ACCUMULATION * LAYERS,
            f"all_gather 2 {outside}": ACCUMULATION,
            f"all_gather 2 {outside // 2}": ACCUMULATION,
            f"reduce_scatter 2 {outside}": ACCUMULATION,
            f"reduce_scatter 2 {outside // 2}": ACCUMULATION,
            "all_reduce 4 4": 1,
        }


def planned(case: dict[str, Any]) -> list[tuple[Chain, list[tuple[Bucket, ...]]]]:
    """The planner's buckets of what each process has, of all but the experts and of these, on their own axes."""
    sizes, ep, parts = tuple(case["sizes"]), case["ep"], []
    model = build(case["model"], tied=case["tied"])
    ends = list(itertools.accumulate(sizes, operator.mul, initial=1))
    for shared, axes in ((1, sizes), (ep, sizes[ends.index(ep) :])):
        p, g, o, second = (
            max(1, each // shared) for each in (*case["degrees"][:3], case["degrees"][3] or case["degrees"][0])
        )
        layout, groups = Chain.of(axes, p, g, o, second), []
        for path in (*BLOCKS, ""):
            of_group = [
                Parameter(name=name, shape=(value.shape[0] // shared, *value.shape[1:]), trainable=True, unit=-1)
                for name, value in model.named_parameters()
                if (name.startswith(path) if path else not name.startswith(BLOCKS))
                and (".mlp.experts." in name) == (shared > 1)
            ]
            groups.append(buckets(of_group, layout))
        parts.append((layout, groups))
    return parts


FLAT = [each for each in EXACT if each["kind"] == "amsp"]


@pytest.mark.parametrize("case", FLAT, ids=names(FLAT))
def test_states_are_moved_as_planned(case: dict[str, Any], results: Any) -> None:
    expected = Counter({f"all_reduce {prod(case['sizes'])} 4": 1})
    for layout, groups in planned(case):
        sends = step_sends(layout, groups, element=4, accumulation=ACCUMULATION, kept=False, norm=False)
        for send, count in sends.items():
            expected[f"{send.kind} {layout.sizes[send.axis]} {send.bytes}"] += count
    for found in results[case["name"]]:
        assert {call: n for call, n in found["calls"].items() if not call.startswith("all_to_all")} == expected


@pytest.mark.parametrize("case", FLAT, ids=names(FLAT))
def test_states_at_rest_take_what_is_planned(case: dict[str, Any], results: Any) -> None:
    for rank, found in enumerate(results[case["name"]]):
        rest = [
            at_rest(layout, groups, 4, place)
            for (layout, groups), place in zip(planned(case), (rank, rank // case["ep"]), strict=True)
        ]
        assert found["at_rest"]["parameters"] == sum(each.parameters for each in rest)
        assert found["at_rest"]["gradients"] == sum(each.gradients for each in rest)
        states = {"sgd": 4, "adamw": 8}[case["optimizer"]]
        assert found["at_rest"]["optimizer_states"] == states * sum(each.own for each in rest)


def test_bf16_is_as_near_as_with_all_experts_in_one_process(results: Any) -> None:
    exact = train_plainly("mixtral", "sgd", False, 4)
    for case in IN_BF16:
        found = results[case["name"]]
        assert found[0]["norms"] == pytest.approx(exact.norms, rel=0.02)
        assert found[0]["losses"] == pytest.approx(exact.losses, rel=0.005)
        assert difference(found, exact.parameters) < 0.01
    fsdp2, amsp = (results[case["name"]][0]["norms"] for case in IN_BF16 if case["ep"] == 2)
    assert fsdp2 == pytest.approx(amsp, rel=1e-4)


def test_experts_travel_in_fewer_bits_over_their_own_axes(results: Any) -> None:
    """2304 numbers of experts are padded to 2560, whole blocks of 256 for each of two processes."""
    exact, found = train_plainly("mixtral", "sgd", False, 4), results[IN_FEWER_BITS["name"]]
    assert found[0]["norms"] == pytest.approx(exact.norms, rel=0.03)
    assert found[0]["losses"] == pytest.approx(exact.losses, rel=0.01)
    assert 1e-4 < difference(found, exact.parameters) < 0.02
    for each in found:
        assert each["calls"][f"all_gather 2 {message_bytes(2560, 8)}"] == 2 * ACCUMULATION * LAYERS
        assert each["calls"][f"all_to_all 2 {message_bytes(2560, 4)}"] == ACCUMULATION * LAYERS


@pytest.mark.parametrize(("at", "case"), LOADING, ids=[f"{at} {case['name']}" for at, case in LOADING])
def test_checkpoints_load_with_other_degrees(at: int, case: dict[str, Any], results: Any) -> None:
    found, model, optimizer = results[f"load {at} {case['name']}"], case["model"], case["optimizer"]
    saved = results[f"save {at}"]
    for each in found:
        for name, values in each["loaded"].items():
            assert values == saved[0]["parameters"][name], "to the bit"
    expected = train_plainly(model, optimizer, False, 2, prod(case["sizes"]))
    assert found[0]["norms"] == pytest.approx(expected.norms, rel=1e-5)
    assert found[0]["losses"] == pytest.approx(expected.losses, rel=1e-5)
    assert difference(found, expected.parameters) < BOUND


@pytest.mark.parametrize("engine", ["amsp 1", "amsp 2", "ddp", "fsdp2"])
def test_every_element_counts_once_in_the_norm(engine: str, results: Any) -> None:
    for found in results["shares"]:
        assert found[engine] == pytest.approx(found["expected"], rel=1e-6)
