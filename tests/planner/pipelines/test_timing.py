from collections import Counter
from dataclasses import replace
from math import isclose

import pytest
from planner.pipeline_points import pipe, pipe_of_family, point
from planner.profiles import cpu_cluster, gpu_cluster, job, llama, toy

from shardwright.planner.flat_lanes import Communication
from shardwright.planner.pipelines.run import PipelineRun, RankLoad
from shardwright.planner.predict import Predictor
from shardwright.planner.schedules.bounds import lower_bound
from shardwright.planner.schedules.lowering import Gathers, lower
from shardwright.planner.schedules.simulator import simulate, steady_period
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.text import from_text
from shardwright.planner.schedules.timetable import Costs, Layout
from shardwright.planner.space import Pipe, Point
from shardwright.schemas.plan import TimePart


def parts_of(parts: tuple[TimePart, ...]) -> Counter[str]:
    found: Counter[str] = Counter()
    for part in parts:
        found[part.name] += part.seconds  # type: ignore[assignment]
    return found


def test_alone_a_pipeline_takes_its_makespan_and_the_tail() -> None:
    predictor = Predictor(job(cpu_cluster(2), batch=8, sequence=16), toy(blocks=8))
    for name in SCHEDULES:
        where = point(pipe_of_family(name), accumulation=8)
        step, time = predictor.step(where), predictor.pipelines.time
        tail = sum(seconds for _, seconds, _ in time._tail(where))
        simulated = time.schedule(where).simulation.makespan
        assert step.seconds == pytest.approx(simulated + tail)
        assert sum(part.seconds for part in step.parts) == pytest.approx(step.seconds)
        assert time.least(where) <= step.seconds


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-h2", "zb-v"])
def test_late_steps_take_the_steady_period_and_the_tail(name: str) -> None:
    predictor = Predictor(job(cpu_cluster(2), batch=8, sequence=16), toy(blocks=8))
    of = pipe_of_family(name)
    waits = point(of, accumulation=8)
    where = replace(waits, pipe=replace(of, late_step=True))
    step, time = predictor.step(where), predictor.pipelines.time
    made = time.schedule(where)
    period = steady_period(made.timetable, made.layout, made.costs)
    assert made.simulation.work <= period <= made.simulation.makespan
    # With the others rank 0 begins an iteration and ends it, too.
    assert (period < made.simulation.makespan) == (name in ("zb-h1", "zb-h2"))
    assert step.seconds == pytest.approx(period + sum(seconds for _, seconds, _ in time._tail(where)))
    assert sum(part.seconds for part in step.parts) == pytest.approx(step.seconds)
    assert time.least(where) <= step.seconds
    assert parts_of(step.parts)["gradient norm"] < parts_of(predictor.step(waits).parts)["gradient norm"]


def test_the_parts_are_those_of_the_rank_that_is_longest_at_work() -> None:
    predictor = Predictor(job(cpu_cluster(2), batch=8, sequence=16), toy())
    where = point(pipe(cuts=(1,), checkpointed=(1, 1)))
    parts = parts_of(predictor.step(where).parts)
    # Stage 1 has three blocks of 2 MFLOP a pass at micro-batch 2, and the head of 4, at 0.56 GFLOP/s.
    each = 4 * 2e6 / (0.7 * 0.8 * 1e9)
    assert parts["forward matmul"] == pytest.approx(5 * each)
    assert parts["backward matmul"] == pytest.approx(2 * 5 * each)
    assert parts["recompute"] == pytest.approx(each + 4 * 8e-6)
    simulation = predictor.pipelines.time.schedule(where).simulation
    assert parts["pipeline bubble"] == pytest.approx(simulation.makespan - simulation.work)


def even(ranks: int, send: float = 0.0) -> Costs:
    return Costs((1.0,) * ranks, (1.0,) * ranks, (1.0,) * ranks, (send,) * (ranks - 1), (1.0,) * ranks, (1.0,) * ranks)


def loads(*ranks: tuple[Communication, ...], adds: bool = False) -> list[RankLoad]:
    return [RankLoad(units, [(rank,) for _ in units], adds) for rank, units in enumerate(ranks)]


def test_one_micro_batch_by_hand() -> None:
    programs = lower(from_text("F0 B0\nF0 B0"), TWO, costs=even(2, 0.25))
    ranks = PipelineRun(programs, even(2, 0.25), {(0, 1): 0.25}, loads((), ()), wires=1).run()
    # 1, sent, 1 and 2, sent, 2.
    assert [rank.clock for rank in ranks] == [6.5, 4.25]
    assert [rank.busy for rank in ranks] == [3.0, 3.0]


TWO = Layout(2)


def test_messages_between_two_ranks_follow_each_other() -> None:
    programs = lower(from_text("F0 F1 B0 B1\nF0 F1 B0 B1"), TWO, costs=even(2))
    slow = Costs((1.0, 0.0), (0.0,) * 2, (0.0,) * 2, (3.0,), (1.0,) * 2, (1.0,) * 2)
    ranks = PipelineRun(programs, slow, {(0, 1): 3.0}, loads((), ()), wires=1).run()
    # The activations arrive at 4 and 7, the gradients leave at 7 both.
    assert [rank.clock for rank in ranks] == [13.0, 7.0]


def test_a_gather_hides_behind_the_action_before_and_a_reduction_behind_those_after() -> None:
    layout = TWO
    timetable = from_text("F0 F1 B0 B1\nF0 B0 F1 B1")
    programs = lower(timetable, layout, gathers=Gathers(), reduce_every=1)
    free = Costs((0.0,) * 2, (0.0,) * 2, (0.0,) * 2, (0.0,), (1.0,) * 2, (1.0,) * 2)
    wire = Communication(gathers=(((0, 0.5),),), reductions=(((0, 0.5),),), last_reductions=(((0, 0.75),),))
    ranks = PipelineRun(programs, free, {(0, 1): 0.0}, loads((wire,), (wire,)), wires=1).run()
    # Nothing hides them where nothing is computed.
    assert ranks[0].gather_stall > 0
    assert ranks[0].reduce_stall >= 0.75
    assert ranks[1].clock == pytest.approx(0.5 + 0.5 + 0.75)
    ranks = PipelineRun(programs, even(2), {(0, 1): 0.0}, loads((wire,), (wire,)), wires=1).run()
    # The first gather and the last reduction stay; all others are done before they are needed.
    assert [rank.gather_stall for rank in ranks] == [pytest.approx(0.5)] * 2
    assert [rank.reduce_stall for rank in ranks] == [pytest.approx(0.75)] * 2


def test_new_values_arrive_before_a_stage_is_first_used() -> None:
    programs = lower(from_text("F0 B0\nF0 B0"), TWO, costs=even(2))
    wire = Communication(publications=(((0, 1.5),),))
    ranks = PipelineRun(programs, even(2), {(0, 1): 0.0}, loads((wire, wire), (wire,)), wires=1).run()
    assert ranks[0].gather_stall == pytest.approx(3.0)
    # The other rank's has arrived meanwhile.
    assert ranks[1].gather_stall == pytest.approx(1.5)
    assert ranks[0].clock == pytest.approx(3.0 + 6.0)


def wide(of: Pipe, **changes: object) -> Point:
    usual: dict[str, object] = {
        "world": 16,
        "axes": (4,),
        "micro_batch": 1,
        "accumulation": 16,
        "optimizer_degree": 4,
        "precision": "bf16_mixed",
    }
    return point(of, **{**usual, **changes})


def four(name: str, **changes: object) -> Pipe:
    return pipe(**{"ranks": 4, "schedule": name, "cuts": (2, 4, 6), "checkpointed": (0,) * 4, **changes})


def test_a_whole_prediction_hangs_together() -> None:
    predictor = Predictor(job(gpu_cluster(2), batch=64), llama(layers=8))
    for name, degree in (("1f1b", 1), ("zb-h1", 1), ("zeropp", 4)):
        where = wide(four(name), shard=degree, gradient_degree=degree)
        found = predictor.prediction(where)
        assert found.pipeline is not None
        assert isclose(found.step_time_s, sum(part.seconds for part in found.time))
        assert found.step_time_s >= found.pipeline.makespan_s
        made = predictor.pipelines.time.schedule(where)
        # Another reading of the plan's own numbers gives the plan's makespan.
        again = simulate(from_text("\n".join(found.pipeline.timetable)), made.layout, made.costs)
        assert again.makespan == pytest.approx(found.pipeline.makespan_s)
        assert again.bubble_rate() == pytest.approx(found.pipeline.bubble_rate)
        assert found.pipeline.gap >= -1e-9
        assert found.pipeline.lower_bound_s == pytest.approx(lower_bound(made.layout, made.costs, 16, None))
        assert [stage.forward_s for stage in found.pipeline.stages] == list(made.costs.forward)
        assert found.mfu < 1
        assert len(found.memory.stages) == 4


def test_the_collectives_of_a_rank_are_those_of_its_program() -> None:
    predictor = Predictor(job(gpu_cluster(2), batch=64), llama(layers=8, tied=True))
    where = wide(four("1f1b"))
    calls = predictor.pipelines.collectives(where, 0)
    by_purpose: Counter[tuple[str, str, str]] = Counter()
    for call in calls:
        by_purpose[call.kind, call.axis, call.purpose] += call.count
    # Two blocks, and the tied embedding, a unit by itself: reduced once, and published.
    assert by_purpose["reduce_scatter", "dp_1", "gradients"] == 3
    assert by_purpose["all_gather", "dp_1", "parameters"] == 3
    assert by_purpose["all_reduce", "pp", "gradients"] == 1
    assert by_purpose["send", "pp", "activations"] == 16
    assert by_purpose["all_reduce", "world", "metrics"] == 2
    assert by_purpose["all_reduce", "pp", "grad_norm"] == 1
    middle = Counter(call.kind for call in predictor.pipelines.collectives(where, 1) for _ in range(call.count))
    assert middle["send"] == 32
    sharded = Counter(
        call.kind
        for call in predictor.pipelines.collectives(wide(four("1f1b"), gradient_degree=4), 1)
        for _ in range(call.count)
    )
    assert sharded["reduce_scatter"] == 16 * 2


def test_slower_links_never_make_a_step_faster() -> None:
    profile = llama(layers=8)
    seconds = []
    for device in ("h100-sxm-80gb", "a100-sxm-80gb"):
        predictor = Predictor(job(gpu_cluster(2, device=device), batch=64), profile)
        where = wide(four("zeropp"), shard=4, gradient_degree=4)
        step = predictor.step(where)
        seconds.append((step.seconds, parts_of(step.parts)["exposed reductions"]))
    assert seconds[0] < seconds[1]


def test_what_does_not_matter_is_not_worked_out_twice() -> None:
    predictor = Predictor(job(gpu_cluster(2), batch=64), llama(layers=8))
    where = wide(four("zb-h1"))
    one = predictor.pipelines.schedules.made(where)
    assert predictor.pipelines.schedules.made(replace(where, optimizer_degree=2, axes=(2, 2))) is one
