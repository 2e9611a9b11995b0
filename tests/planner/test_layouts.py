"""The layouts of the states, against the rules written down once more, and the names of the points."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest

from planner.profiles import gpu_cluster, job, llama
from planner.test_space import three_levels
from shardwright.planner.engines import ENGINES
from shardwright.planner.layouts import Layout, layouts, level_ends
from shardwright.planner.names import family
from shardwright.planner.predict import Predictor
from shardwright.planner.space import Point, axis_links, configurations, decide, point_of


def flat(accumulation: int = 2, **changes: object) -> list[Layout]:
    spec = job(gpu_cluster(2, per_node=2), batch=16, **changes)  # type: ignore[arg-type]
    return list(layouts(spec, ENGINES["amsp"], accumulation))


def test_every_legal_triple_is_there() -> None:
    """On 2 x 2: optimizer states at least as wide as the other two, which do not depend on each other."""
    legal = {(p, g, o) for p, g, o in product((1, 2, 4), repeat=3) if max(p, g) <= o}
    found = flat()
    assert {(each.parameters, each.gradients, each.optimizer_states) for each in found} == legal
    assert len(legal) == 14
    assert {(each.parameters, each.optimizer_states) for each in flat(accumulation=1)} == {(p, o) for p, _, o in legal}
    assert all(each.gradients == each.optimizer_states for each in flat(accumulation=1))
    assert all(prod(each.axes) == 4 for each in found)


def test_second_copies_span_whole_levels_unless_others_are_named() -> None:
    assert {each.secondary for each in flat()} == {None, 2}
    spec = job(gpu_cluster(1), batch=16)
    assert {each.secondary for each in layouts(spec, ENGINES["fsdp2"], 2)} == {None}
    spec = job(gpu_cluster(1), batch=16, strategy={"states": {"secondary": 4}})
    assert {each.secondary for each in layouts(spec, ENGINES["fsdp2"], 2)} == {4}
    assert all(each.kept is False for each in flat() if each.secondary)


def test_hierarchical_layouts_are_cut_at_the_levels() -> None:
    spec = job(three_levels(), batch=48)
    whole = [
        each.axes
        for each in layouts(spec, ENGINES["amsp"], 1)
        if each.parameters == each.optimizer_states == 48 and each.secondary is None
    ]
    assert {(48,), (2, 4, 6)} == set(whole)
    assert [len(links) for links in axis_links(spec.cluster, (48,))] == [3]
    assert [links[0][0].name for links in axis_links(spec.cluster, (2, 4, 6))] == ["pair", "node", "rail"]
    assert level_ends((2, 4, 6)) == (1, 2, 8, 48)


def test_fewer_bits_only_where_the_job_is_lossy() -> None:
    assert not any(each.quantized for each in flat())
    lossy = flat(quality="lossy")
    assert {each.int8_gathers for each in lossy if each.axes == (2, 2) and each.parameters == 4} == {(), (1,), (0, 1)}
    assert {each.int4_reductions for each in lossy if each.axes == (2, 2) and each.optimizer_states == 2} == {(), (0,)}
    only = flat(quality="lossy", strategy={"int8_gathers": "none", "int4_reductions": "rail"})
    assert {(each.int8_gathers, each.int4_reductions) for each in only if each.optimizer_states == 4} <= {
        ((), (1,)), ((), (0,))
    }  # fmt: skip


def test_a_point_that_stock_pytorch_runs_is_not_offered_twice() -> None:
    spec = job(gpu_cluster(2, per_node=2), batch=16)
    points = list(configurations(spec, llama(layers=2)))
    own = {
        (p.shard, p.gradient_degree, p.optimizer_degree, p.secondary, p.precision) for p in points if p.engine == "amsp"
    }
    stock = {
        (p.shard, p.gradient_degree, p.optimizer_degree, p.secondary, p.precision) for p in points if p.engine != "amsp"
    }
    assert own
    assert not own & stock
    alone = list(
        configurations(job(gpu_cluster(2, per_node=2), batch=16, strategy={"engine": "amsp"}), llama(layers=2))
    )
    assert {p.engine for p in alone} == {"amsp"}
    assert {(p.shard, p.optimizer_degree) for p in alone} >= {(1, 1), (4, 4)}


def test_every_point_is_read_back_from_its_decision() -> None:
    spec = job(three_levels(), batch=96, quality="lossy", strategy={"precision": "bf16_mixed"})
    points = list(configurations(spec, llama(layers=2)))
    assert len(points) > 1000
    assert all(point_of(decide(point, spec.cluster, 2)) == point for point in points)


@pytest.mark.parametrize(
    ("degrees", "secondary", "name"),
    [
        ((1, 1, 1), None, "data parallel"),
        ((1, 1, 48), None, "ZeRO-1"),
        ((1, 48, 48), None, "ZeRO-2"),
        ((48, 48, 48), None, "ZeRO-3"),
        ((1, 1, 8), None, "ZeRO-1.5"),
        ((8, 8, 8), None, "MiCS / HSDP"),
        ((48, 48, 48), 8, "ZeRO++ hpZ"),
        ((2, 8, 48), None, "Frontier"),
        ((8, 8, 48), None, "AMSP"),
        ((8, 1, 48), None, "AMSP"),
    ],
)
def test_named_points(degrees: tuple[int, int, int], secondary: int | None, name: str) -> None:
    """Table 1 of AMSP (arXiv 2311.00257), ZeRO++ (2306.10209) and Frontier's three levels (2501.04266)."""
    p, g, o = degrees
    pinned = {"parameters": p, "gradients": g, "optimizer_states": o, "secondary": secondary or "none"}
    spec = job(three_levels(), batch=96, strategy={"states": pinned, "micro_batch": 1})
    found = list(configurations(spec, llama(layers=2)))
    assert found
    assert {family(point) for point in found} == {name}


def points_of(spec: object) -> list[Point]:
    return list(configurations(spec, llama(layers=4)))  # type: ignore[arg-type]


def test_the_bound_is_never_above_the_step() -> None:
    spec = job(three_levels(), batch=96, quality="lossy")
    predictor = Predictor(spec, llama(layers=4))
    points = points_of(spec)[::7]
    assert len(points) > 500
    for point in points:
        assert predictor.time.least(point) <= predictor.time.step(point).seconds * (1 + 1e-12)


def test_more_bandwidth_is_never_slower_at_any_point() -> None:
    cluster = three_levels()
    spec = job(cluster, batch=96)
    points = points_of(spec)[::5]
    slow = Predictor(spec, llama(layers=4)).time
    for index, level in enumerate(cluster.levels):
        levels = list(cluster.levels)
        levels[index] = level.model_copy(update={"bandwidth": 4 * level.bandwidth})
        fast = Predictor(job(cluster.model_copy(update={"levels": tuple(levels)}), batch=96), llama(layers=4)).time
        for point in points:
            assert fast.step(point).seconds <= slow.step(point).seconds * (1 + 1e-12)
