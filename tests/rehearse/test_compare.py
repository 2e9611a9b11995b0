"""The comparisons find what is wrong and call it by its name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rehearse.samples import cluster, decision, plan_for
from shardwright.rehearse.compare import compare_equal, compare_series, compare_updates, update_error
from shardwright.rehearse.compare_layout import Processes, compare_at_rest, compare_collectives, group_ranks
from shardwright.rehearse.report_types import Check, RehearsalReport
from shardwright.rehearse.trials import loss_tolerances, trials
from shardwright.schemas.plan import Collective, Plan

HSDP = decision(("dp_replicate", 2), ("dp_shard", 2)).mesh
FSDP = decision(("dp_shard", 2)).mesh


@pytest.mark.parametrize(
    ("found", "passed", "says"),
    [
        ([4.0, 2.0, 1.0], True, "off by 0.0e+00"),
        ([4.0, 2.00001, 1.0], True, "off by 5.0e-06"),
        ([4.0, 2.1, 1.0], False, "2.1, off by 5.0e-02"),
        ([4.0, None, 1.0], False, "not finite"),
        ([4.0, 2.0], False, "2 steps"),
        ([], False, "0 steps"),
    ],
)
def test_a_series_differs_where_it_is_furthest_off(found: list[float | None], passed: bool, says: str) -> None:
    check = compare_series("run", "loss", [4.0, 2.0, 1.0], found, 1e-5)
    assert check.passed is passed
    assert says in check.found


def lossy(*, int8: bool, int4: bool = True) -> Plan:
    sent = {"int8_gathers": ("dp_2",) if int8 else (), "int4_reductions": ("dp_2",) if int4 else ()}
    axes = (("dp_2", 2), ("dp_1", 2))
    chosen = decision(*axes, engine="amsp", parameters=4, optimizer=4, precision="fp32", communication=sent)
    return plan_for(chosen, cluster(("node", 4)), quality="lossy")


def test_the_first_loss_is_exact_and_later_ones_follow_from_the_update() -> None:
    """What gradients in fewer bits may do to the loss is what weights may do that are as far off as is allowed."""
    plan = lossy(int8=False)
    *_, exact, last = trials(plan)
    assert (exact.fewer_bits, last.fewer_bits) == (False, True)
    limits = last.tolerance
    found = loss_tolerances(last, plan.decision, [4.0, 2.0, 2.0], [3.0, 2.0, None], [0.1, 0.2, 0.3])
    reach = 1.15 * 2.0 * limits.update * 0.1
    assert found == [exact.tolerance.loss, pytest.approx(exact.tolerance.loss + reach / 2.0), exact.tolerance.loss]
    assert loss_tolerances(exact, plan.decision, [4.0], [3.0], [0.1]) == [exact.tolerance.loss]
    rounding = replace(exact, precision="bf16_mixed")
    found = loss_tolerances(rounding, plan.decision, [4.0, 2.0], [3.0, 2.0], [0.1, 0.2])
    own = rounding.tolerance
    more = (1 + own.gradient_norm) * 2.0 * own.update * 0.1 / 2.0
    assert found == [own.loss, pytest.approx(own.loss + more)]
    plan = lossy(int8=True)  # weights are rounded before the first forward
    rounded = loss_tolerances(trials(plan)[-1], plan.decision, [4.0, 2.0], [3.0, 2.0], [0.1, 0.2])
    assert rounded == [limits.loss, pytest.approx(limits.loss + reach / 2.0)]


def test_each_step_may_have_a_tolerance_of_its_own() -> None:
    check = compare_series("run", "loss", [1.0, 1.0], [1.00001, 1.001], [1e-6, 1e-2])
    assert not check.passed
    assert check.expected == "1 in step 1"
    assert check.tolerance == "1e-06"
    assert compare_series("run", "loss", [1.0, 1.0], [1.0, 1.001], [1e-6, 1e-2]).passed


def test_equal_means_every_bit() -> None:
    one = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert compare_equal("run", "weights", one, {name: tensor.clone() for name, tensor in one.items()}).passed
    other = one | {"b": torch.tensor([0.0, 1e-30])}
    assert compare_equal("run", "weights", one, other).found == "1 differ, first b"
    assert not compare_equal("run", "weights", one, {"a": torch.ones(3)}).passed


def test_a_missing_update_is_all_of_the_update() -> None:
    initial = {"a": torch.ones(4), "b": torch.ones(4)}
    expected = {"a": torch.ones(4) + 1e-4, "b": torch.ones(4) + 1e-4}
    check = compare_updates("run", initial, expected, expected | {"b": initial["b"]}, 1e-3)
    assert check.found == "off by 1.0e+00, most in b"
    assert not check.passed


def test_a_tensor_that_hardly_moves_is_measured_against_the_model() -> None:
    initial = {"weight": torch.zeros(4), "bias": torch.zeros(4)}
    expected = {"weight": torch.full((4,), 0.1), "bias": torch.full((4,), 1e-9)}
    found = {"weight": torch.full((4,), 0.1), "bias": torch.full((4,), -1e-9)}
    assert update_error(initial, expected, found)[1] < 1e-5


def test_what_rounding_a_parameter_explains_is_not_counted() -> None:
    """A norm's weights near 1 that hardly move: one rounding a step is more than a thousandth of their change."""
    initial = {"norm": torch.ones(4), "weight": torch.full((4,), 0.01)}
    expected = {"norm": torch.ones(4) + 2.0**-14, "weight": torch.full((4,), 0.02)}
    rounded = {"norm": expected["norm"] + 2.0**-23, "weight": expected["weight"]}
    assert update_error(initial, expected, rounded)[1] > 1e-4
    assert update_error(initial, expected, rounded, steps=3)[1] == 0
    wrong = {"norm": expected["norm"] + 2.0**-20, "weight": expected["weight"]}
    assert update_error(initial, expected, wrong, steps=3)[1] > 5e-4


@pytest.mark.parametrize(("ep", "same", "optimizer"), [(1, False, "adamw"), (2, True, "adamw"), (2, True, "sgd")])
def test_only_what_amplifies_makes_choices_of_experts_differ(ep: int, same: bool, optimizer: str) -> None:
    plan = plan_for(
        decision(("dp_shard", 4), precision="fp32", expert_parallel={"degree": ep}),
        cluster(("node", 4)),
    )
    sgd = next(one for one in trials(plan, routes=True) if one.name.startswith("unclipped"))
    own = next(one for one in trials(plan, routes=True) if one.name.startswith("adamw"))
    chosen = replace(own if optimizer == "adamw" else sgd, same_micro_batches=same)
    strict = replace(chosen, routes=False).tolerance
    if optimizer == "sgd":
        assert chosen.tolerance == strict
        assert strict.update == 1e-4
    else:
        assert chosen.tolerance.gradient_norm > strict.gradient_norm


@pytest.mark.parametrize(
    ("axis", "rank", "ranks"),
    [
        ("dp_shard", 0, (0, 1)),
        ("dp_shard", 3, (2, 3)),
        ("dp_replicate", 3, (1, 3)),
        ("world", 2, (0, 1, 2, 3)),
    ],
)
def test_groups_follow_the_mesh(axis: str, rank: int, ranks: tuple[int, ...]) -> None:
    assert group_ranks(HSDP, axis, rank) == ranks


def test_neighbours_on_an_axis_are_a_group_of_their_own() -> None:
    mesh = decision(("dp_replicate", 2), ("dp_shard", 4)).mesh
    assert [group_ranks(mesh, "dp_shard", rank, 2) for rank in (0, 3, 5, 6)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    pairs = [{("all_gather", group_ranks(mesh, "dp_shard", rank, 2), 64): 1} for rank in range(8)]
    predicted = [call("all_gather", "dp_shard", 64, 1)]
    assert verdicts(compare_collectives("run", Processes(mesh), [predicted] * 8, findings(*pairs))) == {
        "all_gather over dp_shard, 2 of it": True
    }


def call(kind: str, axis: str, size: int, count: int) -> Collective:
    purpose = {"all_gather": "parameters", "reduce_scatter": "gradients"}.get(kind, "metrics")
    fields = {"kind": kind, "axis": axis, "group_size": 2, "bytes": size, "count": count, "purpose": purpose}
    return Collective.model_validate(fields)


def findings(*ranks: dict[tuple[str, tuple[int, ...], int], int], unseen: int = 0) -> list[dict[str, Any]]:
    return [
        {"collectives": [[*key, count] for key, count in rank.items()], "unseen_collectives": unseen} for rank in ranks
    ]


PREDICTED = [call("all_gather", "dp_shard", 100, 3), call("all_reduce", "dp_shard", 8, 1)]
PREDICTED += [call("all_reduce", "world", 24, 1), call("all_reduce", "world", 8, 1)]
COUNTED = {("all_gather", (0, 1), 100): 3, ("all_reduce", (0, 1), 24): 1, ("all_reduce", (0, 1), 8): 2}


def verdicts(checks: list[Check]) -> dict[str, bool]:
    return {check.name: check.passed for check in checks}


def test_axes_over_the_same_processes_share_their_calls() -> None:
    checks = compare_collectives("run", Processes(FSDP), [PREDICTED] * 2, findings(COUNTED, COUNTED))
    assert verdicts(checks) == {
        "all_gather over dp_shard": True,
        "all_reduce over dp_shard": True,
        "all_reduce over world": True,
    }
    assert checks[0].expected == checks[0].found == "3 calls, 300 B"


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({("all_gather", (0, 1), 100): 2}, {"all_gather over dp_shard"}),
        ({("all_gather", (0, 1), 100): 4}, {"all_gather in group [0, 1]"}),
        ({("all_reduce", (0, 1), 8): 1}, {"all_reduce over world"}),
        ({("broadcast", (0, 1), 4): 1}, {"broadcast in group [0, 1]"}),
        (
            {("all_gather", (0, 1), 100): 2, ("all_gather", (0, 1), 50): 1},
            {"all_gather over dp_shard", "all_gather in group [0, 1]"},
        ),
    ],
)
def test_a_call_more_or_less_on_one_process_fails(change: dict[Any, int], failed: set[str]) -> None:
    checks = compare_collectives("run", Processes(FSDP), [PREDICTED] * 2, findings(COUNTED, COUNTED | change))
    assert {name for name, passed in verdicts(checks).items() if not passed} == failed


def test_a_call_over_the_wrong_group_is_not_the_predicted_one() -> None:
    right = [{("reduce_scatter", group_ranks(HSDP, "dp_shard", rank), 64): 1} for rank in range(4)]
    wrong = [{("reduce_scatter", group_ranks(HSDP, "dp_replicate", rank), 64): 1} for rank in range(4)]
    predicted = [call("reduce_scatter", "dp_shard", 64, 1)]
    assert all(verdicts(compare_collectives("run", Processes(HSDP), [predicted] * 4, findings(*right))).values())
    checks = compare_collectives("run", Processes(HSDP), [predicted] * 4, findings(*wrong))
    assert verdicts(checks) == {
        "reduce_scatter over dp_shard": False,
        "reduce_scatter in group [0, 2]": False,
        "reduce_scatter in group [1, 3]": False,
    }


def test_calls_that_went_past_the_counter_fail() -> None:
    checks = compare_collectives("run", Processes(FSDP), [PREDICTED] * 2, findings(COUNTED, COUNTED, unseen=2))
    assert verdicts(checks)["collectives of another kind"] is False


def test_bytes_are_compared_on_every_process() -> None:
    expected = [{"parameters": 8, "gradients": 8}, {"parameters": 8, "gradients": 4}]
    found = [{"parameters": 8, "gradients": 8}, {"parameters": 8, "gradients": 8}]
    checks = compare_at_rest("run", Processes(FSDP), expected, found)
    assert [(check.expected, check.found, check.passed) for check in checks] == [
        ("8", "8", True),
        ("8, 4", "8, wrong on process 1", False),
    ]


def test_a_report_without_checks_has_not_passed() -> None:
    empty = RehearsalReport(plan="", rehearsed="", processes=1, steps=1, shrunk=(), runs=(), checks=())
    check = Check(run="", name="", expected="", found="", tolerance="", passed=True)
    assert not empty.passed
    assert RehearsalReport(plan="", rehearsed="", processes=1, steps=1, shrunk=(), runs=(), checks=(check,)).passed
