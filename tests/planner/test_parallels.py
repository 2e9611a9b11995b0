"""Ways to share one copy of a model: which there are, what one process of them has, how they are searched."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest

from shardwright.planner.candidates import best_first, simplicity
from shardwright.planner.divided import divided
from shardwright.planner.edited import checked_point
from shardwright.planner.layout_search import LayoutSearch
from shardwright.planner.model_facts import as_patterns, divisions, expert_modules
from shardwright.planner.names import plan_name
from shardwright.planner.parallel import WHOLE, Parallel, without_fastest
from shardwright.planner.parallels import parallels
from shardwright.planner.pipelines.space import pipelines
from shardwright.planner.plans import evaluate, make_plan
from shardwright.planner.predict import Predictor
from shardwright.planner.search import Search, least_seconds
from shardwright.planner.space import configurations, decide, exchange_links, point_of
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Plan
from shardwright.schemas.profile import ModelProfile
from tests.planner.divided_profiles import divisible, with_experts
from tests.planner.profiles import gpu_cluster, job

ROW = 8192 * 4096 * 2
"""Bytes of the activations of one sequence, bf16."""


def degrees(spec: JobSpec, profile: ModelProfile) -> set[tuple[int, int, int]]:
    return {(each.tp, each.cp, each.ep) for each in parallels(spec, profile)}


def test_which_there_are() -> None:
    short = divisible()
    assert degrees(job(gpu_cluster(2), batch=64), short) == {(tp, 1, 1) for tp in (1, 2, 4, 8)}
    # Only the fastest level, unless the job says so; and no process has fewer than 8192 tokens of a sequence.
    assert degrees(job(gpu_cluster(4, per_node=4), batch=64), short) == {(tp, 1, 1) for tp in (1, 2, 4)}
    wide = job(gpu_cluster(4, per_node=4), batch=64, strategy={"tp": [8], "cp": [1, 2]})
    assert degrees(wide, short) == {(8, 1, 1), (8, 2, 1)}
    long = divisible(sequence=65536)
    found = parallels(job(gpu_cluster(2), batch=64, sequence=65536), long)
    assert {each.cp for each in found} == {1, 2, 4, 8}
    assert {each.method for each in found if each.cp == 8} == {
        "ring",
        "gather",
        "ulysses",
    }
    assert not [each for each in found if each.method == "ulysses" and 32 // each.tp % each.cp]
    experts = job(gpu_cluster(2), batch=64)
    assert degrees(experts, with_experts(divisible())) == {(1, 1, ep) for ep in (1, 2, 4, 8)}
    assert not [p for p in configurations(experts, short, Parallel(ep=8)) if p.engine in ("single", "ddp")]


@pytest.mark.parametrize(
    ("strategy", "key", "said"),
    [
        ({"tp": 16}, "strategy.tp.0", "do not divide into so many equal parts"),
        ({"cp": [1, 3]}, "strategy.cp.1", "two chunks of 8192 tokens"),
        ({"ep": 2}, "strategy.ep.0", "no layers of experts"),
        ({"cp": 4, "context_method": "ulysses", "tp": 1}, "strategy.cp.0", "whole ones of 6 heads"),
    ],
)
def test_what_the_model_cannot_do(strategy: dict[str, object], key: str, said: str) -> None:
    profile = divisible(heads=6, kv_heads=6, hidden=768) if "context_method" in strategy else divisible()
    with pytest.raises(InputError) as caught:
        parallels(job(gpu_cluster(2), batch=64, strategy=strategy), profile)
    (only,) = caught.value.diagnostics
    assert only.key == key
    assert said in only.message
    assert "write" in only.suggestion


def test_a_refused_model_says_why() -> None:
    profile = with_experts(divisible(context=False))
    for strategy, reason in (({"tp": 2}, "its experts are"), ({"cp": 2}, "it mixes positions")):
        with pytest.raises(InputError, match=reason):
            parallels(job(gpu_cluster(2), batch=64, strategy=strategy), profile)


def test_the_cluster_of_one_process() -> None:
    cluster = gpu_cluster(4)
    for inner, sizes in ((1, (8, 4)), (2, (4, 4)), (8, (1, 4)), (16, (1, 2)), (32, (1, 1))):
        assert tuple(level.size for level in without_fastest(cluster, inner).levels) == sizes
    shared = Parallel(tp=4, cp=4, method="ring")
    assert [(level.name, part) for level, part in exchange_links(cluster, shared, "tp")] == [("node", 4)]
    assert [(level.name, part) for level, part in exchange_links(cluster, shared, "cp")] == [("node", 2), ("rail", 2)]


def test_what_one_process_has_of_a_llama() -> None:
    spec, profile = job(gpu_cluster(2), batch=64), divisible(layers=2)
    own, local = divided(spec, profile, Parallel(tp=8, sequence=True))
    assert own.cluster.world_size == 2
    shapes = {each.name: each.shape for each in local.parameters}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (512, 4096)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (4096, 512)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (128, 4096)
    assert shapes["model.layers.0.input_layernorm.weight"] == (4096,)
    assert shapes["model.embed_tokens.weight"] == (128256 // 8, 4096)
    # Per layer as many bytes as four all-reduces of b s h (arXiv 2205.05198, section 4.2.2).
    cost = local.units[1].costs["bf16"]
    moved = sum(each.count * each.bytes.at(1) for each in cost.exchanges)
    assert moved == 8 * ROW
    assert cost.exchanges[0].axis == "tp"
    assert divided(spec, profile, WHOLE) == (spec, profile)


@pytest.mark.parametrize("method", ["ring", "gather", "ulysses"])
def test_what_one_process_has_of_a_sequence(method: str) -> None:
    spec, profile = job(gpu_cluster(2), batch=64), divisible(layers=2)
    parallel = Parallel(cp=4, method=method)  # type: ignore[arg-type]
    own, local = divided(spec, profile, parallel)
    assert own.train.global_batch_sequences == 4 * 64
    assert local.sequence_length == own.train.sequence_length == 2048
    whole, block = (each.units[1].costs["bf16"] for each in (profile, local))
    assert whole.flops("forward", 3) == 4 * block.flops("forward", 3)
    keys = 8192 * 2 * 1024 * 2  # keys and values of 8 heads of 128, bf16
    moved = {
        phase: sum(each.count * each.bytes.at(1) for each in block.exchanges if each.phase == phase)
        for phase in ("forward", "backward")
    }
    expected = {
        "gather": (keys, keys),
        "ring": (3 * keys // 4, 3 * (keys // 4 + 2 * keys // 4)),  # gradients travel in fp32
        "ulysses": ((2 * ROW + keys) // 4, (2 * ROW + keys) // 4),
    }
    assert (moved["forward"], moved["backward"]) == expected[method]
    kept = {"gather": keys - keys // 4, "ring": 0, "ulysses": 0}[method]
    assert block.saved["none"].slope == whole.saved["none"].slope // 4 + kept


def test_what_one_process_has_of_the_experts() -> None:
    spec, profile = job(gpu_cluster(2), batch=64, strategy={"expert_imbalance": 1.5}), with_experts(divisible(layers=2))
    own, local = divided(spec, profile, Parallel(ep=4))
    stacks = [each for each in local.parameters if each.experts]
    assert {each.experts for each in stacks} == {2}
    assert stacks[0].shape == (2, 1024, 4096)
    assert own.cluster.world_size == 16
    whole, cost = (each.units[1].costs["bf16"] for each in (profile, local))
    routed = [each for each in zip(whole.operators, cost.operators, strict=True) if each[0].module == "experts"]
    assert all(local.flops.slope == 1.5 * of.flops.slope and local.bytes.constant == 200 for of, local in routed)
    # Two tokens' worth of features a token there and back, forward and backward; and their weights.
    tokens = [each for each in cost.exchanges if each.bytes.slope == 2 * ROW]
    assert sum(each.count for each in tokens) == 4
    assert all(each.axis == "ep" and each.kind == "all_to_all" for each in cost.exchanges)


def small(**strategy: object) -> JobSpec:
    return job(gpu_cluster(1, memory="30GiB"), batch=16, strategy={"precision": "bf16_mixed", **strategy})


def test_points_are_written_and_read_back() -> None:
    spec, profile = job(gpu_cluster(2), batch=64, sequence=65536), divisible(sequence=65536)
    spec = spec.model_copy(update={"strategy": spec.strategy.model_copy(update={"precision": ("bf16_mixed",)})})
    for parallel in (Parallel(tp=4, sequence=True), Parallel(tp=2, sequence=True, cp=2, method="ring"), Parallel(ep=2)):
        own = divided(spec, profile, parallel)
        points = [*configurations(*own, parallel), *pipelines(*own, parallel)]
        assert points
        for point in points[:: max(1, len(points) // 200)]:
            if point.pipe is not None:
                point = replace(point, pipe=replace(point.pipe, cuts=(1,), checkpointed=(0, 0)))
            decision = decide(point, spec.cluster, 4)
            assert decision.mesh.world_size == 16
            assert point_of(decision) == point
            names = [axis.name for axis in decision.mesh.axes]
            assert (names[-1:] == ["tp"]) == (parallel.tp > 1)
            assert (names[0] == "pp") == (point.pipe is not None)
            assert parallel.ep == 1 or point.engine in ("fsdp2", "amsp")


def test_the_search_over_all_ways_finds_what_each_of_them_finds() -> None:
    for spec in (small(pp=1), small(pp=1, tp=[1, 4]), job(gpu_cluster(2), batch=16, strategy={"pp": 1})):
        predictor = Predictor(spec, divisible(layers=6))
        ways = parallels(spec, predictor.profile)
        alone = [LayoutSearch(predictor.of(each)).best(lambda point: True) for each in ways]
        found = best_first([each for each in alone if each is not None], predictor.device_budget)[0]
        best = Search(predictor).best(lambda point: True)
        assert best is not None
        assert (best.seconds, simplicity(best.point)) == (found.seconds, simplicity(found.point))
        for way, each in zip(ways, alone, strict=True):
            assert each is None or least_seconds(predictor, way) <= each.seconds


@pytest.fixture(scope="module")
def plan() -> Plan:
    made = make_plan(small(tp=4, pp=1), divisible(layers=6), job_file="job.yaml", defaults=())
    assert isinstance(made, Plan)
    return made


def test_a_plan_with_tensor_parallelism(plan: Plan) -> None:
    decision, prediction = plan.decision, plan.prediction
    assert plan.name.startswith("TP 4 x ")
    assert decision.tensor_parallel.degree == 4
    assert decision.tensor_parallel.sequence
    assert decision.mesh.axes[-1].name == "tp"
    assert decision.mesh.world_size == 8
    reasons = {each.key: each.because for each in plan.reasons}
    assert "8 key-value heads are divided too, 2 to a device" in reasons["tensor_parallel.degree"]
    assert "along the sequence" in reasons["tensor_parallel.degree"]
    exchanged = [each for each in prediction.collectives if each.axis == "tp" and each.purpose == "activations"]
    rounds, recomputed = decision.accumulation, decision.checkpointing.blocks
    moved = sum(each.count * each.bytes for each in exchanged)
    assert moved == rounds * decision.micro_batch * ROW * (8 * 6 + 4 * recomputed)
    # Work is that of the whole model on all devices.
    whole = make_plan(small(tp=1, pp=1), divisible(layers=6), job_file="job.yaml", defaults=())
    assert isinstance(whole, Plan)
    assert whole.prediction.model_flops_per_step == prediction.model_flops_per_step
    assert prediction.mfu == pytest.approx(
        prediction.model_flops_per_step / (8 * 989e12 * prediction.step_time_s), rel=1e-9
    )


def test_a_plan_is_evaluated_again_and_edited(plan: Plan) -> None:
    profile = divisible(layers=6)
    assert evaluate(plan, profile) == plan
    predictor = Predictor(plan.job, profile)
    decision = plan.decision

    def wrong(**changes: object) -> dict[str, str]:
        with pytest.raises(InputError) as caught:
            checked_point(predictor, decision.model_copy(update=changes))
        return {each.key: each.message for each in caught.value.diagnostics}

    tensor, context, experts = decision.tensor_parallel, decision.context_parallel, decision.expert_parallel
    assert "decision.tensor_parallel.degree" in wrong(tensor_parallel=tensor.model_copy(update={"degree": 3}))
    assert "axis tp has 4" in str(wrong(tensor_parallel=tensor.model_copy(update={"degree": 2})))
    assert "decision.tensor_parallel.sequence" in wrong(tensor_parallel=tensor.model_copy(update={"sequence": False}))
    assert "decision.context_parallel.method" in wrong(context_parallel=context.model_copy(update={"method": "ring"}))
    assert "no layers of experts" in str(wrong(expert_parallel=experts.model_copy(update={"degree": 2})))


def test_names() -> None:
    spec, profile = job(gpu_cluster(2), batch=64), divisible()
    parallel = Parallel(tp=2, sequence=True, cp=4, method="ulysses")
    point = next(
        each
        for each in chain(configurations(*divided(spec, profile, parallel), parallel))
        if (each.engine, each.shard) == ("fsdp2", 8) and each.precision == "bf16_mixed" and not each.kept
    )
    assert plan_name(point, 4) == "TP 2 x CP 4 (ulysses) x FSDP2 x 8 (ZeRO-3), bf16"


def test_patterns() -> None:
    profile = with_experts(divisible(layers=2))
    assert [each.pattern for each in expert_modules(profile)] == ["model.layers.*.experts"]
    found = {each.pattern: each for each in divisions(divisible(layers=3))}
    assert next(iter(found)) == "model.embed_tokens"
    assert found["model.embed_tokens"].units == 0
    assert found["model.layers.*.self_attn.k_proj"].units == 8
    assert found["model.layers.*.self_attn.o_proj"].dims == {"weight": 1}
    # A pattern has to mean all modules that it matches.
    assert as_patterns({"a.0.b": 1, "a.1.b": 1}, ["a.0.b", "a.1.b", "a.2.c"]) == {"a.*.b": 1}
    assert as_patterns({"a.0.b": 1, "a.1.b": 1}, ["a.2.b"]) == {"a.0.b": 1, "a.1.b": 1}
    sequential = {f"a.{block}.b.{place}": place for block in range(2) for place in (0, 2)}
    assert as_patterns(sequential, ["a.0.b.1"]) == {"a.*.b.0": 0, "a.*.b.2": 2}
    assert as_patterns({"a.0.b": 1, "a.1.b": 2}, []) == {"a.0.b": 1, "a.1.b": 2}
