"""The search for a pipeline, the plan that comes of it, and what may be edited in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
from planner.profiles import cpu_cluster, cuttable, gpu_cluster, job, llama, toy

from shardwright.planner import evaluate, make_plan
from shardwright.planner.candidates import TIE, Candidate, best_first, measure, timed
from shardwright.planner.pipelines.search import PipelineSearch
from shardwright.planner.pipelines.space import pipelines
from shardwright.planner.predict import Predictor
from shardwright.planner.search import Search
from shardwright.planner.space import Point, block_count, decide
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Infeasible, Plan
from shardwright.schemas.profile import Affine, ModelProfile

BLOCKS = 6


def model(blocks: int = BLOCKS, saved: int = 200_000) -> ModelProfile:
    """A toy whose activations weigh more than its states."""
    return cuttable(toy(blocks=blocks, saved=saved))


def toy_job(processes: int = 2, batch: int = 8, memory: int | None = None, **strategy: Any) -> JobSpec:
    budget = {} if memory is None else {"budget": {"device_memory": f"{memory}B"}}
    return job(cpu_cluster(processes), batch=batch, sequence=16, strategy=strategy, **budget)


def planned(spec: JobSpec, profile: ModelProfile | None = None) -> Plan:
    made = make_plan(spec, model() if profile is None else profile, job_file="job.yaml", defaults=())
    assert isinstance(made, Plan)
    return made


@pytest.mark.parametrize(
    ("pinned", "placement"),
    [
        ({"pp": 2, "schedule": "1f1b"}, "loop"),
        ({"pp": 2, "schedule": "zb-h1"}, "loop"),
        ({"pp": 2, "schedule": "interleaved-1f1b", "chunks": 2}, "loop"),
        ({"pp": 2, "schedule": "v-half"}, "wave"),
        ({"pp": 2, "schedule": "hanayo", "chunks": 2}, "wave"),
        ({"pp": 2, "schedule": "zeropp", "chunks": 2}, "loop"),
        ({"pp": 2, "schedule": "zb-auto", "chunks": 1}, "loop"),
        ({"pp": 2, "schedule": "zb-auto", "chunks": 2}, "wave"),
        ({"pp": 2, "schedule": "zb-v"}, "wave"),
        ({"pp": 2, "schedule": "zb-2p"}, "loop"),
    ],
)
def test_what_is_pinned_is_what_is_planned(pinned: dict[str, Any], placement: str) -> None:
    plan = planned(toy_job(**pinned))
    pipeline = plan.decision.pipeline
    assert (pipeline.ranks, pipeline.schedule) == (2, pinned["schedule"])
    assert pipeline.chunks == pinned.get("chunks", 2 if placement == "wave" else 1)
    assert pipeline.placement == placement
    assert len(pipeline.cuts) == 2 * pipeline.chunks - 1
    assert plan.decision.engine.name == "amsp"
    assert plan.name.startswith(f"PP 2 ({pinned['schedule']}")
    assert evaluate(plan, model()) == plan


def test_a_pipeline_is_found_where_nothing_else_fits() -> None:
    """States whole on every device do not fit; nothing that shards them is permitted but stages."""
    profile = cuttable(llama(layers=6, hidden=1024, heads=8, kv_heads=8, ffn=4096, vocabulary=8000, sequence=512))
    states = {"parameters": 1, "optimizer_states": 1}
    cluster = gpu_cluster(1, per_node=4)

    def plan(memory: str, **strategy: Any) -> Plan | Infeasible:
        spec = job(
            cluster,
            batch=32,
            sequence=512,
            budget={"device_memory": memory},
            strategy={"states": states, "micro_batch": 1, "precision": "bf16_mixed", **strategy},
        )
        return make_plan(spec, profile, job_file="", defaults=())

    assert isinstance(plan("1GiB", pp=1), Infeasible)
    found = plan("1GiB")
    assert isinstance(found, Plan)
    assert found.decision.pipeline.ranks > 1
    assert found.prediction.memory.peak_reserved_bytes <= 2**30
    reasons = {reason.key: reason.because for reason in found.reasons}
    assert "micro-batch" in reasons["pipeline.ranks"]
    assert "bubble" in reasons["pipeline.schedule"]
    assert "on average" in reasons["pipeline.cuts"]
    assert any("pipeline placement" in each.name for each in found.assumptions)


def everything(spec: JobSpec, profile: ModelProfile) -> Candidate | None:
    """The best of all cuts and all ways to recompute of every pipeline of the space."""
    predictor, blocks = Predictor(spec, profile), block_count(profile)
    found = []
    for point in pipelines(spec, profile):
        pipe = point.pipe
        assert pipe is not None
        for cuts in combinations(range(blocks + 1), pipe.layout.stages - 1):
            cut = replace(pipe, cuts=cuts)
            sizes = [range(size + 1) for size in cut.sizes(blocks)]
            for counts in product(*sizes):
                candidate = measure(predictor, replace(point, pipe=replace(cut, checkpointed=counts)))
                found += [timed(predictor, candidate)] if candidate.fits else []
    return best_first(found, predictor.device_budget)[0] if found else None


@pytest.mark.parametrize("share", [0.45, 0.7, 1.0])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_choice_is_that_of_trying_everything(schedule: str, share: float) -> None:
    profile = model(blocks=5)
    free = toy_job(pp=2, schedule=schedule, micro_batch=[1, 2])
    most = planned(free, profile).prediction.memory.peak_reserved_bytes
    spec = toy_job(memory=int(most * share), pp=2, schedule=schedule, micro_batch=[1, 2])
    best = everything(spec, profile)
    found = Search(Predictor(spec, profile)).chosen()
    assert best is not None
    assert found is not None
    # What is left for activations is counted with room for messages that may wait: a tight budget can cost a block.
    assert best.seconds * (1 - TIE) <= found.seconds <= best.seconds * (1 + TIE + (0.06 if share < 1 else 0))


def test_early_stages_recompute_at_least_as_much_as_late_ones() -> None:
    profile = model(blocks=16)
    free = toy_job(4, batch=32, pp=4, schedule="1f1b", micro_batch=1)
    most = planned(free, profile).prediction.memory.peak_reserved_bytes
    plan = planned(toy_job(4, batch=32, memory=int(most * 0.6), pp=4, schedule="1f1b", micro_batch=1), profile)
    counts = plan.decision.pipeline.checkpointed
    assert counts[0] > 0
    assert list(counts) == sorted(counts, reverse=True)
    assert plan.decision.checkpointing.blocks == sum(counts)
    assert [stage.stage for stage in plan.prediction.memory.stages] == [0, 1, 2, 3]


@pytest.mark.parametrize(("checkpointing", "total"), [("none", 0), ("full", BLOCKS), (2, 2), ([1, 5], 1)])
def test_how_much_is_recomputed_may_be_pinned(checkpointing: Any, total: int) -> None:
    plan = planned(toy_job(pp=2, schedule="1f1b", checkpointing=checkpointing))
    assert sum(plan.decision.pipeline.checkpointed) == total


def test_a_searched_schedule_is_not_worse_than_published_ones() -> None:
    profile = cuttable(toy(blocks=9))
    seconds = {
        name: planned(toy_job(batch=12, pp=2, schedule=name, chunks=1, micro_batch=1), profile).prediction.step_time_s
        for name in ("1f1b", "zb-h1", "zb-auto")
    }
    assert seconds["zb-auto"] <= min(seconds.values()) * (1 + 1e-9)
    plan = planned(toy_job(batch=12, pp=2, schedule="zb-auto", chunks=1, micro_batch=1), profile)
    assert len(plan.decision.pipeline.activation_limits) == 2
    assert plan.prediction.pipeline is not None
    assert plan.prediction.pipeline.gap >= -1e-9


def test_a_plan_without_stages_shows_the_best_pipeline_and_the_other_way_round() -> None:
    none = planned(toy_job())
    assert none.decision.pipeline.schedule == "none"
    piped = [each for each in none.search.alternatives if each.decision.pipeline.ranks > 1]
    assert len(piped) == 1
    assert {reason.key: reason.value for reason in none.reasons}["pipeline.ranks"] == "no pipeline"
    spec = toy_job(pp=[1, 2], schedule=["1f1b", "zb-h1"], micro_batch=1)
    predictor = Predictor(spec, model())
    piped_best = Search(predictor).best(lambda point: point.pipe is not None)
    assert piped_best is not None
    decided = none.model_copy(update={"job": spec, "decision": decide(piped_best.point, spec.cluster, BLOCKS)})
    others = {each.decision.pipeline.schedule for each in evaluate(decided, model()).search.alternatives}
    assert others == {"none", "1f1b", "zb-h1"}


def test_one_device_has_no_pipeline() -> None:
    spec = toy_job(1)
    search = PipelineSearch(Predictor(spec, model()))
    assert search.considered == 0
    assert search.best(lambda point: True) is None
    assert search.closest(lambda point: True) is None
    assert all(not reason.key.startswith("pipeline") for reason in planned(spec).reasons)


def test_a_search_is_deterministic_whatever_was_asked_before() -> None:
    spec, profile = toy_job(4, batch=16), model(blocks=8)
    asked, fresh = (PipelineSearch(Predictor(spec, profile)) for _ in range(2))
    for ranks in (4, 2):

        def of_ranks(point: Point, ranks: int = ranks) -> bool:
            return point.pipe is not None and point.pipe.ranks == ranks

        found = asked.best(of_ranks)
        assert found is not None
    again = fresh.best(lambda point: True)
    assert again is not None
    assert asked.best(lambda point: True) == again


def test_a_model_that_cannot_be_cut_has_none() -> None:
    with pytest.raises(
        InputError, match=r"with strategy.pp as it is, no engine can run the job .the model has no repeated"
    ):
        make_plan(toy_job(pp=2), replace(model(), cuts=()), job_file="", defaults=())


def test_the_closest_miss() -> None:
    spec = toy_job(2, memory=1000, pp=2)
    found = make_plan(spec, model(), job_file="", defaults=())
    assert isinstance(found, Infeasible)
    assert found.nearest.decision.pipeline.ranks == 2
    assert any(change.startswith("raise `budget.device_memory`") for change in found.changes)


# --- edited plans -------------------------------------------------------------------------------------------------


def edited(plan: Plan, changes: Mapping[str, Any], **others: Any) -> Plan:
    pipeline = plan.decision.pipeline.model_copy(update=dict(changes))
    return plan.model_copy(update={"decision": plan.decision.model_copy(update={"pipeline": pipeline, **others})})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(toy_job(4, batch=16, pp=2, schedule="1f1b", micro_batch=1))


def test_an_edited_pipeline_is_predicted_anew(plan: Plan) -> None:
    assert evaluate(plan, model()) == plan
    (cut,) = plan.decision.pipeline.cuts
    moved = evaluate(edited(plan, {"cuts": (cut - 1,)}), model())
    assert moved.prediction.step_time_s > plan.prediction.step_time_s
    reasons = {reason.key: reason.because for reason in moved.reasons}
    assert reasons["pipeline.cuts"].startswith("Set by hand; the planner's choice is PP 2 (1f1b)")
    other = evaluate(edited(plan, {"schedule": "zb-h1"}), model())
    assert other.name.startswith("PP 2 (zb-h1)")
    checkpointing = plan.decision.checkpointing.model_copy(update={"policy": "full", "blocks": 2})
    more = evaluate(edited(plan, {"checkpointed": (2, 0)}, checkpointing=checkpointing), model())
    assert more.decision.checkpointing.blocks == 2


def test_steps_are_late_only_where_the_job_says_so(plan: Plan) -> None:
    assert not plan.decision.pipeline.late_step
    asked = planned(toy_job(2, late_step=True), model())
    assert asked.decision.pipeline.late_step
    assert "late step" in asked.name
    assert next(each for each in asked.reasons if each.key == "pipeline.late_step").value == "true"
    assert any(each.name == "late step" for each in asked.assumptions)
    both = planned(toy_job(2, late_step=[False, True], pp=2), model())
    assert both.prediction.step_time_s <= min(asked.prediction.step_time_s, plan.prediction.step_time_s) * 1.01
    late = evaluate(edited(plan, {"late_step": True}), model())
    assert late.prediction.step_time_s < plan.prediction.step_time_s
    assert late.prediction.memory.peak_allocated_bytes >= plan.prediction.memory.peak_allocated_bytes
    assert sum(part.seconds for part in late.prediction.time) == pytest.approx(late.prediction.step_time_s)


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"ranks": 3}, "ranks", "do not divide into pipelines of 3"),
        ({"ranks": 4, "cuts": (1, 2, 3), "checkpointed": (0, 0, 0, 0)}, "ranks", "the axis pp has 2"),
        ({"chunks": 2}, "chunks", "no schedule of 2 chunks"),
        ({"placement": "wave"}, "placement", "lie on a loop"),
        ({"schedule": "v-half"}, "chunks", "no schedule of 1 chunks"),
        ({"cuts": ()}, "cuts", "2 stages have 1 cuts between them, not 0"),
        ({"cuts": (7,)}, "cuts", "from 0 to 6"),
        ({"cuts": (-1,)}, "cuts", "from 0 to 6"),
        ({"checkpointed": (0,)}, "checkpointed", "2 stages, but 1 numbers"),
        ({"checkpointed": (6, 0)}, "checkpointed.0", "of which 6 are to be recomputed"),
        ({"activation_limits": (5, 5)}, "activation_limits", "makes no use of memory limits"),
        ({"schedule": "zb-auto", "activation_limits": (5,)}, "activation_limits", "1 memory limits for 2 devices"),
        ({"schedule": "zb-auto", "activation_limits": (5, 5)}, "schedule", "more than its memory limit"),
        ({"schedule": "none"}, "ranks", "without a schedule there is no pipeline"),
        ({"schedule": "none", "late_step": True}, "late_step", "but `late_step` says true"),
    ],
)
def test_mistakes_in_an_edited_pipeline(plan: Plan, changes: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        evaluate(edited(plan, changes), model())
    found = {each.key: each for each in caught.value.diagnostics}
    assert f"decision.pipeline.{key}" in found
    assert says in found[f"decision.pipeline.{key}"].message


def test_a_schedule_may_refuse_a_number_of_micro_batches() -> None:
    profile = model(blocks=12)
    plan = planned(toy_job(4, batch=12, pp=4, schedule="interleaved-1f1b", chunks=2, micro_batch=1), profile)
    wrong = plan.decision.model_copy(update={"accumulation": 6, "micro_batch": 2})
    with pytest.raises(InputError, match="refuses"):
        evaluate(plan.model_copy(update={"decision": wrong}), profile)


def test_a_place_where_the_model_cannot_be_cut_is_named(plan: Plan) -> None:
    profile = model()
    cuts = tuple(
        replace(cut, refused="changes its input in place") if index == 2 else cut
        for index, cut in enumerate(profile.cuts)
    )
    with pytest.raises(InputError, match="cannot be cut after 2 blocks: changes its input in place"):
        evaluate(edited(plan, {"cuts": (2,)}), replace(profile, cuts=cuts))


def test_the_engine_of_a_pipeline(plan: Plan) -> None:
    engine = plan.decision.engine.model_copy(update={"name": "fsdp2", "reshard_after_forward": True})
    with pytest.raises(InputError, match="only `amsp` runs pipeline stages"):
        evaluate(edited(plan, {}, engine=engine), model())


def test_the_batch_is_shared_by_copies(plan: Plan) -> None:
    with pytest.raises(InputError, match="2 copies are 8, but the global batch is 16"):
        evaluate(edited(plan, {}, accumulation=4), model())


def test_held_bytes_of_weights_need_room() -> None:
    """A pending W that holds much makes schedules that cut backward in two recompute more, or wait."""
    profile = model()
    units = tuple(
        replace(
            unit, costs={name: replace(cost, held_by_weight=Affine(0, 150_000)) for name, cost in unit.costs.items()}
        )
        for unit in profile.units
    )
    heavy = replace(profile, units=units)
    spec = toy_job(batch=16, pp=2, schedule="zb-h1", micro_batch=1, memory=3_000_000)
    light, held = planned(spec, profile).prediction, planned(spec, heavy).prediction
    assert held.step_time_s >= light.step_time_s * (1 - TIE)


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ({"pp": 2, "schedule": "dualpipe-v", "chunks": 3}, "dualpipe-v has stages a rank: 2"),
        ({"pp": 2, "schedule": "interleaved-1f1b", "chunks": 8}, "needs 16 stages or more, and the model can be cut"),
        ({"pp": 4, "schedule": "dualpipe-v", "micro_batch": 8}, "dualpipe-v on 4 ranks with 1 micro-batches"),
    ],
)
def test_a_schedule_that_the_job_names_and_cannot_have_says_why(strategy: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        planned(toy_job(4 if strategy["pp"] == 4 else 2, **strategy))


def test_gradients_that_no_pipeline_accumulates_so_say_why() -> None:
    states = {"parameters": 1, "gradients": 2, "optimizer_states": 4}
    with pytest.raises(InputError, match="gradients of a pipeline are whole, or sharded as its optimizer states are"):
        planned(toy_job(8, batch=16, pp=2, states=states, micro_batch=1))
