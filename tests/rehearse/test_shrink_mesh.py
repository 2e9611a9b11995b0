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
    small = shrink_mesh(decision(*axes).mesh, NODES, processes)
    assert small.axes == sizes
    assert {level.name: level.size for level in small.levels} == levels


def test_one_level_grows_to_four() -> None:
    small = shrink_mesh(decision(("dp_shard", 8)).mesh, cluster(("node", 8)), 8)
    assert small.axes == {"dp_shard": 4}
    assert [level.size for level in small.levels] == [4]


def test_one_device_stays_one() -> None:
    small = shrink_mesh(decision(("dp_shard", 1)).mesh, cluster(("node", 1)), 8)
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
    mesh = decision(("dp_replicate", world // shard), ("dp_shard", shard)).mesh
    small = shrink_mesh(mesh, on, processes)
    wide = [axis.name for axis in mesh.axes if axis.size > 1]
    assert prod(factor.size for factor in factors(mesh, on)) == world
    assert small.world_size == prod(level.size for level in small.levels) <= processes
    assert all(small.axes[axis.name] <= axis.size for axis in mesh.axes)
    if 2 ** len(wide) <= processes:
        assert all(small.axes[name] > 1 for name in wide)
