"""The points of the space, and how a plan states them."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from planner.profiles import cpu_cluster, gpu_cluster, job, llama, toy
from shardwright.planner.space import (
    Point,
    configurations,
    decide,
    micro_batches,
    permitted_blocks,
    point_of,
    spanned_levels,
    unshardable,
)
from shardwright.schemas.checks import level_degree, shard_degrees
from shardwright.schemas.cluster import ClusterSpec


def three_levels() -> ClusterSpec:
    """Pairs of dies, four pairs a node, six nodes."""
    cluster = gpu_cluster()
    node = cluster.levels[0]
    levels = [("pair", 2), ("node", 4), ("rail", 6)]
    return cluster.model_copy(
        update={"levels": tuple(node.model_copy(update={"name": name, "size": size}) for name, size in levels)}
    )


def test_degrees_fill_the_fastest_levels_first() -> None:
    assert shard_degrees(gpu_cluster(4)) == (1, 2, 4, 8, 16, 32)
    assert shard_degrees(three_levels()) == (1, 2, 4, 8, 16, 24, 48)


@pytest.mark.parametrize(
    ("inner", "size", "spanned"),
    [
        (1, 1, {}),
        (1, 2, {"pair": 2}),
        (1, 4, {"pair": 2, "node": 2}),
        (1, 16, {"pair": 2, "node": 4, "rail": 2}),
        (2, 24, {"node": 4, "rail": 6}),
        (4, 12, {"node": 2, "rail": 6}),
        (8, 6, {"rail": 6}),
        (16, 3, {"rail": 3}),
        (48, 1, {}),
    ],
)
def test_levels_that_an_axis_spans(inner: int, size: int, spanned: dict[str, int]) -> None:
    found = {level.name: part for level, part in spanned_levels(three_levels(), inner, size)}
    assert found == spanned
    assert prod(found.values()) == size


def test_names_of_degrees() -> None:
    cluster = three_levels()
    assert [level_degree(cluster, each) for each in ("pair", "node", "rail", "all", 4)] == [2, 8, 48, 48, 4]
    assert level_degree(cluster, "rack") is None


def test_strategy_restricts_the_space() -> None:
    strategy = {
        "states": {"parameters": "node", "gradients": [8]},
        "reshard_after_forward": True,
        "micro_batch": [1, 4],
        "precision": "bf16_mixed",
    }
    spec = job(gpu_cluster(2), batch=64, strategy={**strategy, "engine": "stock"})
    points = list(configurations(spec, llama(layers=2)))
    assert points
    for point in points:
        assert (point.engine, point.shard, point.gradient_degree, point.kept) == ("fsdp2", 8, 8, False)
        assert point.micro_batch in (1, 4)
    assert {point.micro_batch for point in points} == {1, 4}


def test_every_point_trains_on_the_global_batch_once() -> None:
    for point in configurations(job(gpu_cluster(2), batch=96), llama(layers=2)):
        assert point.world * point.micro_batch * point.accumulation == 96
        assert point.replicas * point.shard == point.world
        assert point.optimizer_degree >= max(point.shard, point.gradient_degree)
        assert point.engine == "amsp" or point.gradient_degree in (1, point.shard)
        assert point.accumulation > 1 or point.gradient_degree == point.optimizer_degree


def test_points_are_distinct() -> None:
    points = list(configurations(job(gpu_cluster(2), batch=96), llama(layers=2)))
    assert len(points) == len(set(points))


def test_only_what_was_profiled_is_considered() -> None:
    points = configurations(job(gpu_cluster(2), batch=64), llama(layers=2, dtypes=("fp32",)))
    assert {point.precision for point in points} == {"fp32"}


def test_micro_batches_are_divisors() -> None:
    assert micro_batches(job(gpu_cluster(), batch=96), 8) == (1, 2, 3, 4, 6, 12)
    assert micro_batches(job(gpu_cluster(), batch=12), 8) == ()


def test_numbers_of_checkpointed_blocks() -> None:
    assert permitted_blocks(job(gpu_cluster()), 3) == (0, 1, 2, 3)
    assert permitted_blocks(job(gpu_cluster(), strategy={"checkpointing": ["none", "full", 2, 9]}), 4) == (0, 2, 4)


@pytest.mark.parametrize(
    ("point", "axes", "levels"),
    [
        ({"engine": "single", "world": 1, "kept": None}, {}, ()),
        ({"engine": "fsdp2", "world": 1}, {"dp_shard": 1}, ()),
        ({"engine": "ddp", "world": 16, "kept": None}, {"dp_replicate": 16}, ()),
        ({"engine": "fsdp2", "world": 16, "shard": 16}, {"dp_shard": 16}, ("node", "rail")),
        ({"engine": "fsdp2", "world": 16, "shard": 8}, {"dp_replicate": 2, "dp_shard": 8}, ("node",)),
        ({"engine": "fsdp2", "world": 16, "shard": 1}, {"dp_replicate": 16, "dp_shard": 1}, ()),
    ],
)
def test_decisions_state_points(point: dict[str, object], axes: dict[str, int], levels: tuple[str, ...]) -> None:
    plain = Point(
        engine="fsdp2", world=1, shard=1, optimizer_degree=1, kept=True, gradient_degree=1,
        micro_batch=2, accumulation=3,
        checkpointed=2,
        precision="bf16_mixed",
    )  # fmt: skip
    stated = replace(plain, **point)  # type: ignore[arg-type]
    decision = decide(stated, gpu_cluster(max(1, stated.world // 8), per_node=min(8, stated.world)), 4)
    assert {axis.name: axis.size for axis in decision.mesh.axes} == axes
    assert decision.states.parameters.levels == levels
    assert point_of(decision) == stated


def test_models_that_fully_shard_refuses() -> None:
    profile = toy()
    scalar = replace(profile.parameters[0], name="scale", shape=())
    with_scalar = replace(profile, parameters=(*profile.parameters, scalar))
    assert "scale is a scalar" in unshardable(with_scalar, "fsdp2")
    assert unshardable(with_scalar, "amsp") == unshardable(with_scalar, "ddp") == ""
    tied = replace(profile.parameters[1], also=("head.weight",))
    with_tied = replace(profile, parameters=(*profile.parameters[:1], tied))
    assert all("several groups" in unshardable(with_tied, engine) for engine in ("fsdp2", "amsp"))
    assert unshardable(llama(layers=2, tied=True), "fsdp2") == ""
    spec = job(cpu_cluster(2), batch=4, sequence=16)
    assert {point.engine for point in configurations(spec, with_scalar)} == {"ddp", "amsp"}
    assert {point.engine for point in configurations(spec, with_tied)} == {"ddp"}
