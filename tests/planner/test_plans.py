"""Whole plans: their names, reasons and alternatives, what is said when nothing fits, and decisions edited by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from planner.profiles import cpu_cluster, gpu_cluster, job, llama, toy
from shardwright.planner import evaluate, make_plan
from shardwright.planner.candidates import TIE, measure
from shardwright.planner.edited import checked_point
from shardwright.planner.explain import MOST_ALTERNATIVES, REASONED, SHARED
from shardwright.planner.names import plan_name, summary
from shardwright.planner.predict import Predictor
from shardwright.planner.space import Point, configurations, decide
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Infeasible, Plan, json_fields
from shardwright.schemas.profile import ModelProfile

B8 = llama()
B70 = llama(layers=80, hidden=8192, heads=64, ffn=28672)


def planned(spec: JobSpec, profile: ModelProfile = B8) -> Plan:
    plan = make_plan(spec, profile, job_file="../job.yaml", defaults=("quality",))
    assert isinstance(plan, Plan)
    return plan


def refused(spec: JobSpec, profile: ModelProfile) -> Infeasible:
    result = make_plan(spec, profile, job_file="job.yaml", defaults=())
    assert isinstance(result, Infeasible)
    return result


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Llama-3-8B on one node of eight H100."""
    return planned(job(gpu_cluster(), batch=128))


def test_a_plan_is_complete(plan: Plan) -> None:
    assert plan.name == f"FSDP2 x 8 (ZeRO-3), bf16, {plan.decision.checkpointing.blocks} of 32 blocks checkpointed"
    assert (plan.job_file, plan.defaults, plan.profile_digest) == ("../job.yaml", ("quality",), "0" * 64)
    assert plan.model.parameters == 8030261248
    assert len(plan.model.block_paths) == plan.decision.checkpointing.of == 32
    assert plan.model.attention == "flash"
    assert plan.prediction.memory.peak_reserved_bytes <= 78 * 2**30
    assert sum(part.seconds for part in plan.prediction.time) == pytest.approx(plan.prediction.step_time_s)
    assert plan.search.considered >= plan.search.feasible > 0


def test_a_plan_is_written_and_read_back_and_the_same_each_time(plan: Plan) -> None:
    text = json.dumps(json_fields(plan))
    assert Plan.model_validate(json.loads(text)) == plan
    assert json.dumps(json_fields(planned(plan.job))) == text


def test_alternatives_say_why_they_lost(plan: Plan) -> None:
    alternatives = plan.search.alternatives
    assert 5 < len(alternatives) <= MOST_ALTERNATIVES
    assert len({each.summary for each in alternatives}) == len(alternatives)
    assert all(each.decision != plan.decision for each in alternatives)
    fits = [each.fits for each in alternatives]
    assert fits == sorted(fits, reverse=True)
    for each in alternatives:
        if each.fits:
            assert each.step_time_s > plan.prediction.step_time_s * (1 - TIE)
            assert re.search("slower|times as long|as fast", each.lost_because)
        else:
            assert each.peak_reserved_bytes > 78 * 2**30
            assert "over the 78 GiB that a device may reserve" in each.lost_because


def test_one_block_fewer_would_not_fit(plan: Plan) -> None:
    blocks = plan.decision.checkpointing.blocks
    fewer = [each for each in plan.search.alternatives if each.decision.checkpointing.blocks == blocks - 1]
    assert [each.fits for each in fewer if each.decision.micro_batch == plan.decision.micro_batch] == [False]


def test_every_key_of_the_decision_has_a_reason(plan: Plan) -> None:
    reasons = {reason.key: reason for reason in plan.reasons}
    missing = {"communication", "pipeline.ranks", "pipeline.schedule", "pipeline.cuts", "pipeline.late_step", *SHARED}
    assert set(reasons) == set(REASONED) - missing  # lossy communication, and what needs a model that can be divided
    assert reasons["engine.reshard_after_forward"].value == "true"
    assert reasons["mesh"].value == "dp_shard 8"
    assert "Runner-up: AMSP 4/8/8 of 8" in reasons["mesh"].because
    assert "The fewest that fit" in reasons["checkpointing"].because


def test_reasons_of_one_device_name_what_it_decided() -> None:
    reasons = {reason.key: reason for reason in planned(job(cpu_cluster(1), batch=4, sequence=16), toy()).reasons}
    assert "engine.reshard_after_forward" not in reasons
    assert reasons["checkpointing"].because.startswith("Nothing need be recomputed")
    assert "There is nothing else to choose from here" in reasons["mesh"].because


def test_assumptions_name_their_origin(plan: Plan) -> None:
    origins = {each.name: each.origin for each in plan.assumptions}
    assert origins["device.memory"] == "job"
    assert origins["matmul efficiency"] == "measured"
    assert origins["host overhead per step"] == "default"
    assert "measured maximum of peak" not in origins
    noted = gpu_cluster().model_copy(
        update={"sources": {"device.memory": "catalogue: vendor", "levels.node.latency": "default: guess"}}
    )
    by_name = {each.name: each for each in planned(job(noted, batch=128)).assumptions}
    assert (by_name["device.memory"].origin, by_name["device.memory"].source) == ("catalogue", "vendor")
    assert (by_name["levels.node.latency"].origin, by_name["levels.node.latency"].source) == ("default", "guess")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"engine": "single", "world": 1, "kept": None, "precision": "fp32"}, "one device, fp32"),
        ({"world": 1}, "one device, bf16"),
        ({"world": 1, "kept": True}, "one device (parameters kept), bf16"),
        ({"engine": "ddp", "world": 2, "kept": None, "precision": "fp32"}, "DDP x 2, fp32"),
        ({"world": 8, "shard": 8, "checkpointed": 12}, "FSDP2 x 8 (ZeRO-3), bf16, 12 of 32 blocks checkpointed"),
        ({"world": 8, "shard": 8, "kept": True}, "FSDP2 x 8 (parameters kept), bf16"),
        ({"world": 64, "shard": 8}, "HSDP 8 x 8, bf16"),
        ({"world": 64, "shard": 8, "kept": True}, "HSDP 8 x 8 (parameters kept), bf16"),
        ({"world": 8}, "FSDP2, replicated x 8, bf16"),
    ],
)
def test_names(changes: dict[str, Any], name: str) -> None:
    point = Point(
        engine="fsdp2", world=1, shard=1, optimizer_degree=1, kept=False, gradient_degree=1,
        micro_batch=2, accumulation=4,
        checkpointed=0,
        precision="bf16_mixed",
    )  # fmt: skip
    assert plan_name(replace(point, **changes), 32) == name
    assert summary(replace(point, **changes), 32).startswith(f"{name}, micro-batch 2 x 4")


# --- nothing fits -----------------------------------------------------------------------------------------------------


def test_infeasible_says_what_is_missing_and_what_would_do() -> None:
    result = refused(job(gpu_cluster(), batch=512), B70)
    assert result.available_bytes == 78 * 2**30
    assert result.needed_bytes > result.available_bytes
    assert result.needed_bytes == result.nearest.peak_reserved_bytes == round(1.15 * sum(result.by_category.values()))
    assert "even with all 80 blocks checkpointed" in result.nearest.lost_because
    assert result.changes
    assert any(change.startswith("use 32 devices instead of 8: FSDP2 x 32") for change in result.changes)
    assert any(change.startswith("use devices with ") for change in result.changes)


def test_a_pinned_strategy_that_stands_in_the_way_is_named() -> None:
    pinned = {"checkpointing": "none", "micro_batch": 1}
    result = refused(job(gpu_cluster(), batch=128, strategy=pinned), B8)
    assert result.changes[0].startswith("leave `strategy.checkpointing` to the planner (auto): FSDP2 x 8")
    assert not any("`strategy.micro_batch`" in change for change in result.changes)


def test_fp32_that_does_not_fit_is_told_of_bf16() -> None:
    spec = job(gpu_cluster(memory="37GiB"), batch=8, quality="exact")
    result = refused(spec, B8)
    assert any(change.startswith("permit bf16 compute (`quality: standard`): FSDP2") for change in result.changes)


def test_a_budget_that_is_too_small_is_named_with_one_that_is_not() -> None:
    result = refused(job(gpu_cluster(), batch=128, budget={"device_memory": "20GiB"}), B8)
    said = next(change for change in result.changes if change.startswith("raise `budget.device_memory` to "))
    enough = said.removeprefix("raise `budget.device_memory` to ").partition(":")[0].replace(" ", "")
    assert isinstance(planned(job(gpu_cluster(), batch=128, budget={"device_memory": enough})), Plan)


def test_a_host_that_is_too_small_is_what_is_reported() -> None:
    small = gpu_cluster().model_copy(update={"host_memory": 200 * 2**30})
    result = refused(job(small, batch=128), replace(B8, init="constructor"))
    assert result.available_bytes == 200 * 2**30
    assert result.needed_bytes > result.available_bytes
    assert "of host memory on a node" in result.nearest.lost_because


# --- nothing is permitted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "strategy", "keys"),
    [
        (cpu_cluster(4), {"engine": "single"}, {"strategy.engine"}),
        (cpu_cluster(1), {"engine": "ddp"}, {"strategy.engine"}),
        (cpu_cluster(4), {"engine": "ddp", "precision": "bf16_mixed"}, {"strategy.engine", "strategy.precision"}),
        (
            cpu_cluster(4),
            {"states": {"parameters": 4, "optimizer_states": 2}},
            {"strategy.states.parameters", "strategy.states.optimizer_states"},
        ),
        (
            cpu_cluster(4),
            {"states": {"gradients": 2, "optimizer_states": 4}, "engine": "fsdp2", "micro_batch": 2},
            {
                "strategy.states.gradients",
                "strategy.states.optimizer_states",
                "strategy.engine",
                "strategy.micro_batch",
            },
        ),
    ],
)
def test_a_strategy_that_leaves_nothing_is_wrong_input(
    cluster: ClusterSpec, strategy: Mapping[str, Any], keys: set[str]
) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(job(cluster, batch=16, sequence=16, strategy=strategy), toy(), job_file="", defaults=())
    assert {each.key for each in caught.value.diagnostics} == keys
    assert all(each.suggestion for each in caught.value.diagnostics)


def test_a_batch_that_devices_cannot_share_is_wrong_input() -> None:
    with pytest.raises(InputError, match="4 devices cannot share 10 sequences equally"):
        make_plan(job(cpu_cluster(4), batch=10, sequence=16), replace(toy(), cuts=()), job_file="", defaults=())


def test_a_model_that_cannot_be_sharded_is_refused_where_it_must_be() -> None:
    scalar = replace(toy().parameters[0], name="scale", shape=())
    profile = replace(toy(), parameters=(*toy().parameters, scalar))
    spec = job(cpu_cluster(2), batch=4, sequence=16, strategy={"engine": "fsdp2"})
    with pytest.raises(InputError, match="scale is a scalar"):
        make_plan(spec, profile, job_file="", defaults=())


# --- edited by hand ---------------------------------------------------------------------------------------------------


def edited(plan: Plan, **changes: Any) -> Plan:
    """The plan with dotted keys of its decision replaced; dots are written as double underscores."""
    fields = plan.model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split("__")
        owner = fields["decision"]
        for name in path:
            owner = owner[int(name) if name.isdigit() else name]
        owner[last] = value
    return Plan.model_validate(fields)


def test_an_untouched_plan_comes_back_equal(plan: Plan) -> None:
    assert evaluate(plan, B8) == plan
    small = planned(job(cpu_cluster(2), batch=4, sequence=16), toy())
    assert evaluate(small, toy()) == small


def test_an_edited_plan_is_predicted_anew(plan: Plan) -> None:
    more = plan.decision.checkpointing.blocks + 10
    again = evaluate(edited(plan, checkpointing__blocks=more), B8)
    assert again.decision.checkpointing.blocks == more
    assert again.name == f"FSDP2 x 8 (ZeRO-3), bf16, {more} of 32 blocks checkpointed"
    assert again.prediction.step_time_s > plan.prediction.step_time_s
    assert again.prediction.memory.peak_reserved_bytes < plan.prediction.memory.peak_reserved_bytes
    assert again.search.alternatives[0].decision == plan.decision
    assert "faster" in again.search.alternatives[0].lost_because
    assert "edited by hand" in again.search.alternatives[0].lost_because
    reasons = {reason.key: reason.because for reason in again.reasons}
    assert f"Set by hand; the planner's choice is {plan.name}" in reasons["checkpointing"]
    assert "Set by hand" not in reasons["mesh"]


def test_a_mesh_may_be_edited_and_its_levels_follow(plan: Plan) -> None:
    axes = [{"name": "dp_replicate", "size": 2, "levels": []}, {"name": "dp_shard", "size": 4, "levels": []}]
    states = {"degree": 4, "levels": []}
    changes = {"states__parameters": states, "states__gradients": states, "states__optimizer_states": states}
    again = evaluate(
        edited(plan, mesh__axes=axes, checkpointing__blocks=32, checkpointing__policy="full", **changes), B8
    )
    assert [axis.levels for axis in again.decision.mesh.axes] == [("node",), ("node",)]
    assert again.name.startswith("HSDP 2 x 4")


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"mesh__world_size": 4}, "mesh.world_size", "4 processes on 8 devices"),
    ({"mesh__axes__0__size": 4}, "mesh.axes", "multiply to 4, not to the world size 8"),
    ({"mesh__axes__0__name": "dp_replicate"}, "mesh.axes", "has dp_shard"),
    ({"states__parameters__degree": 4}, "states.parameters.degree", "the axis dp_shard has 8"),
    ({"states__parameters__degree": 3}, "states.parameters.degree", "fastest first"),
    ({"states__optimizer_states__degree": 4}, "states.optimizer_states.degree", "as it shards parameters"),
    ({"states__gradients__degree": 4}, "states.gradients.degree", "not over 4 devices"),
    (
        {"states__gradients__degree": 1, "micro_batch": 16, "accumulation": 1},
        "states.gradients.degree",
        "there is one",
    ),
    ({"accumulation": 3}, "accumulation", "but the global batch is 128"),
    ({"micro_batch": 3}, "micro_batch", "but the global batch is 128"),
    ({"checkpointing__blocks": 33}, "checkpointing.blocks", "there are 32"),
    ({"checkpointing__of": 30}, "checkpointing.of", "the model has 32 blocks"),
    ({"checkpointing__blocks": 0}, "checkpointing.policy", "`full` for 0 blocks"),
    ({"checkpointing__policy": "none"}, "checkpointing.policy", "policy is `none`"),
    ({"engine__name": "ddp"}, "engine.name", "does not run bf16_mixed"),
    ({"engine__reshard_after_forward": None}, "engine.reshard_after_forward", "freed after forward"),
    ({"engine__name": "single", "engine__reshard_after_forward": None}, "engine.name", "does not run"),
]


@pytest.mark.parametrize(("changes", "key", "message"), WRONG)
def test_wrong_edits_are_named(plan: Plan, changes: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        evaluate(edited(plan, **changes), B8)
    found = {each.key: each for each in caught.value.diagnostics}
    assert message in found[f"decision.{key}"].message
    assert found[f"decision.{key}"].suggestion


def test_all_wrong_edits_are_named_at_once(plan: Plan) -> None:
    with pytest.raises(InputError) as caught:
        evaluate(edited(plan, accumulation=3, checkpointing__of=30, states__gradients__degree=2), B8)
    assert len(caught.value.diagnostics) == 3


def test_an_edit_that_does_not_fit_is_refused(plan: Plan) -> None:
    with pytest.raises(InputError, match=r"does not fit: it needs .* over the 78 GiB") as caught:
        evaluate(edited(plan, checkpointing__blocks=0, checkpointing__policy="none"), B8)
    assert caught.value.diagnostics[0].key == "decision"


def test_precision_is_held_to_quality_device_and_profile() -> None:
    exact = planned(job(cpu_cluster(2), batch=4, sequence=16, quality="exact"), toy())
    mixed = {
        "precision": "bf16_mixed",
        "engine": {"name": "fsdp2", "reshard_after_forward": True},
        "mesh__axes": [
            {"name": "dp_replicate", "size": 2, "levels": ["node"]},
            {"name": "dp_shard", "size": 1, "levels": []},
        ],
    }
    whole = {"degree": 1, "levels": []}
    mixed |= {"states": {"parameters": whole, "gradients": whole, "optimizer_states": whole}}
    with pytest.raises(InputError, match="does not permit bf16_mixed"):
        evaluate(edited(exact, **mixed), toy())
    standard = exact.model_copy(update={"job": exact.job.model_copy(update={"quality": "standard"})})
    assert evaluate(edited(standard, **mixed), toy()).decision.precision == "bf16_mixed"
    unprofiled = replace(toy(), units=tuple(replace(unit, costs={"fp32": unit.costs["fp32"]}) for unit in toy().units))
    with pytest.raises(InputError, match="was not profiled in bf16"):
        evaluate(edited(standard, **mixed), unprofiled)
    device = standard.job.cluster.device.model_copy(update={"peak": {"fp32": 1e9}})
    old = standard.job.model_copy(update={"cluster": standard.job.cluster.model_copy(update={"device": device})})
    with pytest.raises(InputError, match="cannot compute in bf16"):
        evaluate(edited(standard.model_copy(update={"job": old}), **mixed), toy())


def test_every_point_that_fits_passes_the_checks_of_an_edit() -> None:
    spec = job(gpu_cluster(2), batch=64, quality="lossy")
    profile = llama(layers=4)
    start = planned(spec, profile)
    predictor = Predictor(spec, profile)
    points = [point for point in configurations(spec, profile) if measure(predictor, point).fits][::101]
    assert {point.engine for point in points} == {"fsdp2", "amsp", "ddp"}
    for point in points:
        decided = start.model_copy(update={"decision": decide(point, spec.cluster, 4)})
        assert checked_point(predictor, decided.decision) == point


def test_more_checkpointed_blocks_than_the_model_has_are_refused() -> None:
    asked = job(gpu_cluster(), strategy={"checkpointing": [99, 1]})
    with pytest.raises(InputError, match=r"strategy\.checkpointing: the model has 32 repeated blocks"):
        make_plan(asked, llama(), job_file="job.yaml", defaults=())


def test_states_spread_apart_need_an_engine_that_can() -> None:
    apart = {"parameters": 2, "optimizer_states": 4}
    spec = job(gpu_cluster(), batch=64, budget={"device_memory": "300GiB"}, strategy={"states": apart})
    plan = make_plan(spec, llama(layers=2), job_file="job.yaml", defaults=())
    assert isinstance(plan, Plan)
    assert plan.decision.engine.name == "amsp"
    stock = job(gpu_cluster(), batch=64, strategy={"states": apart, "engine": "stock"})
    with pytest.raises(InputError, match="no engine can run the job") as refused:
        make_plan(stock, llama(layers=2), job_file="job.yaml", defaults=())
    assert "strategy.engine" in [each.key for each in refused.value.diagnostics]
