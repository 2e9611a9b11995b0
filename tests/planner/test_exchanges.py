"""What processes that share one copy of the model exchange, in the time of a step and in its list of collectives,
worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.pipeline_points import pipe
from planner.pipeline_points import point as pipeline_point
from planner.profiles import cpu_cluster, cuttable, gpu_cluster, job, toy
from planner.test_memory import PLAIN
from shardwright.planner import step_collectives
from shardwright.planner.collectives import exchanged
from shardwright.planner.exchanges import Around, Wiring, units_by_segment
from shardwright.planner.groups import Groups
from shardwright.planner.memory import MemoryModel
from shardwright.planner.network import Links, collective_seconds
from shardwright.planner.parallel import Parallel
from shardwright.planner.pipelines.prediction import Pipelines
from shardwright.planner.space import Point
from shardwright.planner.timing import Step, TimeModel
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.plan import Collective
from shardwright.schemas.profile import Affine, Exchange, ExpertLayer, ModelProfile, UnitCost

REACHED = 0.8
"""Of the stated bandwidth, on a CPU."""
PAIR = Parallel(tp=2)


def exchange(
    axis: str, kind: str, phase: str, size: int, count: int = 1, *, again: bool = False, constant: int = 0
) -> Exchange:
    fields: dict[str, Any] = {"axis": axis, "kind": kind, "phase": phase, "count": count, "again": again}
    return Exchange(bytes=Affine(constant, size), **fields)


GATHER = exchange("tp", "all_gather", "forward", 4000, 2, again=True)
LEAVE = exchange("tp", "reduce_scatter", "forward", 4000)
BACK = exchange("tp", "all_reduce", "backward", 1000, 3, constant=500)
SUMS = exchange("tp", "all_reduce", "forward", 80)


def shared(profile: ModelProfile, block: tuple[Exchange, ...], head: tuple[Exchange, ...] = ()) -> ModelProfile:
    """The profile with exchanges in each block and in the head."""
    of: dict[str, tuple[Exchange, ...]] = {"embedding": (), "block": block, "head": head}

    def told(cost: UnitCost, kind: str) -> UnitCost:
        return replace(cost, exchanges=of[kind])

    units = [
        replace(unit, costs={dtype: told(cost, unit.kind) for dtype, cost in unit.costs.items()})
        for unit in profile.units
    ]
    return replace(profile, units=tuple(units))


def links(size: int, cluster: ClusterSpec) -> Links:
    return ((cluster.levels[0], size),)


def step(point: Point, profile: ModelProfile, around: Around, **sections: object) -> Step:
    batch = point.world * point.micro_batch * point.accumulation
    one = job(cpu_cluster(point.world), batch=batch, sequence=16, **sections)
    return TimeModel(one, profile, Groups(profile), around).step(point)


def parts(found: Step) -> dict[str, float]:
    return {part.name: part.seconds for part in found.parts}


PAIR_AROUND = Around(links={"tp": links(2, cpu_cluster(2))}, world=links(2, cpu_cluster(2)))
POINT = replace(PLAIN, parallel=PAIR, micro_batch=2, accumulation=3, checkpointed=1)


def gather(size: int) -> float:
    """1 GB/s, of which some are reached, and 100 us: of two processes one receives half."""
    return size / 2 / (REACHED * 1e9) + 100e-6


def all_reduce(size: int) -> float:
    return 2 * gather(size)


def test_a_step_takes_what_is_exchanged_longer() -> None:
    """Three micro-batches of two: four blocks, of which one is recomputed, and the head."""
    profile = shared(toy(), (GATHER, LEAVE, BACK), (SUMS,))
    bare, found = step(POINT, toy(), PAIR_AROUND), step(POINT, profile, PAIR_AROUND)
    block = 2 * gather(8000) + gather(8000) + 3 * all_reduce(2500)
    expected = 3 * (4 * block + all_reduce(160) + 2 * gather(8000))
    assert parts(found)["tensor parallel"] == pytest.approx(expected)
    assert found.seconds - bare.seconds == pytest.approx(expected)
    assert {name: seconds for name, seconds in parts(found).items() if name != "tensor parallel"} == parts(bare)


def test_the_fullest_process_of_experts_and_the_ring_take_longer() -> None:
    """Experts: 1.5 times what the mean is sent. A ring: all that a process sends goes to its neighbour."""
    cluster = cpu_cluster(4)
    around = {"links": {"cp": links(4, cluster), "ep": links(2, cluster)}, "world": links(4, cluster)}
    tokens, keys = exchange("ep", "all_to_all", "forward", 6000), exchange("cp", "all_to_all", "backward", 4000)
    profile, point = shared(toy(), (tokens, keys)), replace(POINT, parallel=Parallel(cp=4), accumulation=1)
    strategy = {"expert_imbalance": 1.5}
    ulysses = parts(step(point, profile, Around(**around), strategy=strategy))  # type: ignore[arg-type]
    ring = parts(step(point, profile, Around(**around, ring=True), strategy=strategy))  # type: ignore[arg-type]
    assert ulysses["expert parallel"] == ring["expert parallel"] == pytest.approx(4 * 1.5 * gather(12000))
    moved = 8000 * 3 / 4 / (REACHED * 1e9) + 3 * 100e-6
    assert ulysses["context parallel"] == pytest.approx(4 * moved)
    assert ring["context parallel"] == pytest.approx(4 * moved * 4 / 3)


def test_an_axis_without_links_is_an_error() -> None:
    with pytest.raises(KeyError):
        step(POINT, shared(toy(), (GATHER,)), Around(world=links(2, cpu_cluster(2))))


def test_bounds_count_exchanges_and_stay_below() -> None:
    profile = shared(toy(), (GATHER, LEAVE, BACK), (SUMS,))
    one = job(cpu_cluster(4), batch=24, sequence=16)
    around = Around(links={"tp": links(2, cpu_cluster(2))}, world=links(8, cpu_cluster(8)))
    time, bare = (TimeModel(one, each, Groups(each), around) for each in (profile, toy()))
    for engine, axes in (("ddp", ()), ("fsdp2", ()), ("amsp", (4,))):
        degree = 1 if engine == "ddp" else 4
        point = replace(
            POINT, engine=engine, world=4, shard=degree, optimizer_degree=degree, gradient_degree=degree, axes=axes,
            kept=None if engine == "ddp" else False,
        )  # fmt: skip
        assert bare.least(point) < time.least(point) <= time.step(point).seconds
    assert time.work_seconds("fp32", 2) - bare.work_seconds("fp32", 2) == pytest.approx(
        4 * (3 * gather(8000) + 3 * all_reduce(2500)) + all_reduce(160)
    )


def calls(found: tuple[Collective, ...], purpose: str) -> dict[tuple[str, str, int, int], int]:
    return {
        (each.kind, each.axis, each.group_size, each.bytes): each.count for each in found if each.purpose == purpose
    }


def test_calls_of_a_step() -> None:
    profile = shared(toy(), (GATHER, LEAVE, BACK), (SUMS,))
    found = step_collectives(POINT, Groups(profile))
    assert calls(found, "activations") == {
        ("all_gather", "tp", 2, 8000): 3 * (4 * 2 + 2),
        ("reduce_scatter", "tp", 2, 8000): 3 * 4,
        ("all_reduce", "tp", 2, 2500): 3 * 4 * 3,
        ("all_reduce", "tp", 2, 160): 3,
    }
    # Both have the same samples, and so the same loss.
    assert calls(found, "metrics") == {("all_reduce", "world", 2, 24): 1}
    assert calls(found, "grad_norm") == {("all_reduce", "world", 2, 4): 1}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "amsp"])
def test_the_norm_is_one_sum_over_the_world(engine: str) -> None:
    """Of four data processes of two each; with cp alone it stays what it is."""
    degree = 1 if engine == "ddp" else 4
    made: dict[str, Any] = {"engine": engine, "kept": None if engine == "ddp" else False}
    point = replace(
        PLAIN, world=4, shard=degree, optimizer_degree=degree, gradient_degree=degree, axes=(4,), parallel=PAIR, **made
    )
    assert calls(step_collectives(point, Groups(toy())), "grad_norm") == {("all_reduce", "world", 8, 4): 1}
    alone, context = (replace(point, parallel=parallel) for parallel in (Parallel(), Parallel(cp=2)))
    before, after = (step_collectives(each, Groups(toy())) for each in (alone, context))
    assert calls(before, "grad_norm") == calls(after, "grad_norm") != {("all_reduce", "world", 8, 4): 1}


def test_the_world_is_all_processes_in_time_too() -> None:
    """Two small all-reduces, and the norm: over the links of eight processes rather than four."""
    cluster = gpu_cluster(2, per_node=4)
    world: Links = tuple((level, size) for level, size in zip(cluster.levels, (4, 2), strict=True))
    point = replace(
        POINT, engine="fsdp2", world=4, shard=4, optimizer_degree=4, gradient_degree=4, kept=False, checkpointed=0
    )
    inner = job(gpu_cluster(2, per_node=2), batch=24, sequence=16)
    found = parts(TimeModel(inner, toy(), Groups(toy()), Around(world=world)).step(point))
    efficiency = 0.88
    expected = sum(collective_seconds("all_reduce", world, size, efficiency) for size in (24, 8))
    assert found["metrics"] == pytest.approx(expected)


def test_a_host_runs_all_processes_and_each_builds_the_whole_model() -> None:
    cluster, profile = gpu_cluster(1, per_node=8), replace(toy(), init="constructor")
    point = replace(POINT, engine="fsdp2", world=4, shard=4, optimizer_degree=4, gradient_degree=4, kept=False)
    local = replace(profile, parameters=profile.parameters[:1])
    around = Around(per_node=8, whole=profile)
    inner = job(gpu_cluster(1, per_node=4), batch=24, sequence=16)
    found = MemoryModel(inner, local, Groups(local), around).host_bytes(point, 0)
    whole = MemoryModel(job(cluster, batch=24, sequence=16), profile, Groups(profile))
    assert found == whole.host_bytes(replace(point, parallel=Parallel(), world=8), 0)


# --- pipelines --------------------------------------------------------------------------------------------------------


def pipelines(profile: ModelProfile, around: Around, point: Point) -> Pipelines:
    one = job(cpu_cluster(point.world), batch=point.micro_batch * point.accumulation * point.copies, sequence=16)
    return Pipelines(one, profile, Groups(profile), around)


def test_stages_take_what_they_exchange_longer() -> None:
    """Two stages of two blocks: the second recomputes one, and has the head."""
    point = replace(pipeline_point(pipe(checkpointed=(0, 1))), parallel=PAIR)
    profile = cuttable(shared(toy(), (GATHER, LEAVE, BACK), (SUMS,)))
    bare, found = (pipelines(each, PAIR_AROUND, point) for each in (cuttable(toy()), profile))
    before, after = (each.prediction(point).stages for each in (bare, found))
    forward, backward = 3 * gather(8000), 3 * all_reduce(2500)
    told = [(2 * forward, 2 * backward), (2 * forward + all_reduce(160), 2 * backward + 2 * gather(8000))]
    for one, other, (ahead, back) in zip(before, after, told, strict=True):
        assert other.forward_s - one.forward_s == pytest.approx(ahead)
        assert other.input_gradient_s - one.input_gradient_s == pytest.approx(back)
        assert other.weight_gradient_s == one.weight_gradient_s
    seconds = parts(found.time.step(point))
    assert seconds["tensor parallel"] == pytest.approx(4 * sum(told[1]))
    assert found.time.least(point) <= found.time.step(point).seconds
    assert found.time.least(point) > bare.time.least(point)
    assert sum(seconds.values()) == found.time.step(point).seconds


def test_calls_of_a_stage() -> None:
    point = replace(pipeline_point(pipe(checkpointed=(0, 1))), parallel=PAIR)
    profile = cuttable(shared(toy(), (GATHER, LEAVE, BACK), (SUMS,)))
    found = pipelines(profile, PAIR_AROUND, point)
    first, last = (found.collectives(point, rank) for rank in (0, 1))
    tensor = {each: count for each, count in calls(first, "activations").items() if each[1] == "tp"}
    assert tensor == {
        ("all_gather", "tp", 2, 8000): 4 * 2 * 2,
        ("reduce_scatter", "tp", 2, 8000): 4 * 2,
        ("all_reduce", "tp", 2, 2500): 4 * 2 * 3,
    }
    assert calls(last, "activations")["all_gather", "tp", 2, 8000] == 4 * (2 * 2 + 2)
    assert calls(last, "activations")["all_reduce", "tp", 2, 160] == 4
    assert calls(first, "grad_norm") == {("all_reduce", "world", 4, 4): 1}
    assert {group for _, _, group, _ in calls(first, "metrics")} == {4}


def test_a_late_step_sums_the_norm_over_the_world_alone() -> None:
    point = replace(
        pipeline_point(pipe(late_step=True), world=4, axes=(2,), optimizer_degree=2, gradient_degree=2), parallel=PAIR
    )
    around = replace(PAIR_AROUND, world=links(8, cpu_cluster(8)))
    found = pipelines(cuttable(toy()), around, point).collectives(point, 0)
    assert calls(found, "grad_norm") == {("all_reduce", "world", 8, 4): 1}
    assert {group for _, axis, group, _ in calls(found, "metrics") if axis == "world"} == {8}


def test_whole_copies_exchange_nothing() -> None:
    profile = shared(toy(), (GATHER,))
    assert list(exchanged(PLAIN, ((unit, False) for unit in units_by_segment(profile)))) == []
    assert Wiring().seconds(toy().units[0].costs["fp32"], 1, 1.0).forward == (0.0, 0.0, 0.0)


def test_what_leaves_the_blocks_is_gathered_where_the_last_one_is() -> None:
    """The last stage has the head alone, whose all-gather is of the whole sequence at the exit of the last block."""
    profile = cuttable(shared(toy(), (), (SUMS, exchange("tp", "all_gather", "forward", 500))))
    point = replace(pipeline_point(pipe(cuts=(4,))), parallel=PAIR)
    first, last = (pipelines(profile, PAIR_AROUND, point).collectives(point, rank) for rank in (0, 1))
    tensor = [
        {key: count for key, count in calls(each, "activations").items() if key[1] == "tp"} for each in (first, last)
    ]
    assert tensor == [{("all_gather", "tp", 2, 1000): 4}, {("all_reduce", "tp", 2, 160): 4}]


def test_the_load_of_experts_is_told_once_a_step() -> None:
    """Three layers, of two processes each."""
    layers = tuple(ExpertLayer(path=f"blocks.{index}", experts=4, chosen=1, features=10) for index in range(3))
    profile = replace(toy(), expert_layers=layers)
    point = replace(
        POINT,
        engine="fsdp2",
        world=4,
        shard=4,
        optimizer_degree=4,
        gradient_degree=4,
        kept=False,
        parallel=Parallel(ep=2),
    )
    found = calls(step_collectives(point, Groups(profile)), "metrics")
    assert found["all_gather", "ep", 2, 8 * 3 * 2] == 1
    around = Around(links={"ep": links(2, cpu_cluster(2))})
    told, silent = (parts(step(point, each, around))["metrics"] for each in (profile, toy()))
    assert told - silent == pytest.approx(gather(48))
