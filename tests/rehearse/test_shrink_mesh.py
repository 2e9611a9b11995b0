from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearse.samples import cluster, decision
from shardwright.rehearse.shrink_mesh import factors, shrink_mesh

NODES = cluster(("node", 8), ("rail", 8))


@pytest.mark.parametrize(
    ("axes", "processes", "sizes", "levels"),
    [
        ((("dp_shard", 64),), 8, {"dp_shard": 4}, {"node": 2, "rail": 2}),
        ((("dp_replicate", 8), ("dp_shard", 8)), 8, {"dp_replicate": 2, "dp_shard": 2}, {"node": 2, "rail": 2}),
        ((("dp_replicate", 16), ("dp_shard", 4)), 8, {"dp_replicate": 4, "dp_shard": 2}, {"node": 4, "rail": 2}),
        ((("dp_replicate", 16), ("dp_shard", 4)), 4, {"dp_replicate": 2, "dp_shard": 2}, {"node": 4}),
        ((("dp_replicate", 64), ("dp_shard", 1)), 8, {"dp_replicate": 4, "dp_shard": 1}, {"node": 2, "rail": 2}),
        ((("dp_replicate", 8), ("dp_shard", 8)), 2, {"dp_replicate": 1, "dp_shard": 2}, {"node": 2}),
        ((("dp_shard", 64),), 2, {"dp_shard": 2}, {"node": 2}),
    ],
)
def test_every_axis_keeps_its_structure(
    axes: tuple[tuple[str, int], ...], processes: int, sizes: dict[str, int], levels: dict[str, int]
) -> None:
    small = shrink_mesh(decision(*axes), NODES, processes)
    assert small.axes == sizes
    assert {level.name: level.size for level in small.levels} == levels


CHAIN = (("dp_4", 8), ("dp_3", 16), ("dp_2", 4), ("dp_1", 2))
"""2 / 8 / 128 of 1024."""
DEEP = cluster(("pair", 2), ("node", 4), ("rail", 8), ("leaf", 16))


@pytest.mark.parametrize(
    ("axes", "degrees", "processes", "sizes", "small"),
    [
        (CHAIN, (2, 8, 128), 16, (2, 2, 2, 2), (2, 4, 8)),
        (CHAIN, (2, 8, 128), 8, (1, 2, 2, 2), (2, 4, 8)),  # no copies of the optimizer states any more
        (CHAIN, (2, 8, 128), 4, (1, 1, 2, 2), (2, 4, 4)),
        (CHAIN, (2, 8, 128), 2, (1, 1, 1, 2), (2, 2, 2)),
        (CHAIN, (1, 1, 1024), 8, (1, 2, 2, 2), (1, 1, 8)),  # cut at the levels of the cluster alone
        (CHAIN, (1, 8, 8), 4, (1, 2, 1, 2), (1, 2, 2)),  # one axis is left for the shards, one for their copies
        ((("dp_2", 8), ("dp_1", 128)), (1, 1, 128), 4, (2, 2), (1, 1, 2)),
        ((("dp_1", 1024),), (1, 1024, 1024), 8, (8,), (1, 8, 8)),  # one axis over several levels stays one
    ],
)
def test_shard_degrees_stay_apart(
    axes: tuple[tuple[str, int], ...],
    degrees: tuple[int, int, int],
    processes: int,
    sizes: tuple[int, ...],
    small: tuple[int, int, int],
) -> None:
    parameters, gradients, optimizer = degrees
    chosen = decision(*axes, engine="amsp", parameters=parameters, gradients=gradients, optimizer=optimizer)
    mesh = shrink_mesh(chosen, DEEP, processes)
    assert tuple(mesh.axes.values()) == sizes
    assert tuple(map(mesh.degree, degrees)) == small


def test_a_second_copy_within_an_axis_stays_narrower() -> None:
    chosen = decision(("dp_shard", 64), secondary=8)
    small = shrink_mesh(chosen, NODES, 8)
    assert (small.axes, small.degree(8), small.degree(64)) == ({"dp_shard": 4}, 2, 4)
    assert shrink_mesh(chosen, NODES, 2).degree(8) == 2


def test_one_level_grows_to_four() -> None:
    small = shrink_mesh(decision(("dp_shard", 8)), cluster(("node", 8)), 8)
    assert small.axes == {"dp_shard": 4}
    assert [level.size for level in small.levels] == [4]


def test_one_device_stays_one() -> None:
    small = shrink_mesh(decision(("dp_shard", 1)), cluster(("node", 1)), 8)
    assert small.world_size == 1
    assert [(level.name, level.size) for level in small.levels] == [("node", 1)]


@given(
    node=st.sampled_from([1, 2, 3, 4, 6, 8]),
    rails=st.sampled_from([1, 2, 3, 5, 8]),
    shard=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    processes=st.integers(2, 16),
)
def test_axes_that_fit_stay_wider_than_one(node: int, rails: int, shard: int, processes: int) -> None:
    world = node * rails
    if world % shard:
        return
    on = cluster(("node", node), ("rail", rails))
    chosen = decision(("dp_replicate", world // shard), ("dp_shard", shard))
    mesh = chosen.mesh
    small = shrink_mesh(chosen, on, processes)
    wide = [axis.name for axis in mesh.axes if axis.size > 1]
    assert prod(factor.size for factor in factors(chosen, on)) == world
    assert small.world_size == prod(level.size for level in small.levels) <= processes
    assert all(small.axes[axis.name] <= axis.size for axis in mesh.axes)
    if 2 ** len(wide) <= processes:
        assert all(small.axes[name] > 1 for name in wide)
