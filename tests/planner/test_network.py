"""Collectives over levels, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.profiles import gpu_cluster
from shardwright.planner.network import CollectiveKind, collective_seconds
from shardwright.planner.space import spanned_levels
from shardwright.schemas.cluster import LevelSpec

NODE = LevelSpec.model_validate({"name": "node", "size": 8, "bandwidth": "100GB/s", "latency": "1us"})
RAIL = LevelSpec.model_validate({"name": "rail", "size": 4, "bandwidth": "10GB/s", "latency": "5us"})


def test_one_level() -> None:
    """Seven eighths of 800 MB over 100 GB/s, and seven hops."""
    assert collective_seconds("all_gather", [(NODE, 8)], 8 * 10**8, 1.0) == pytest.approx(7e-3 + 7e-6)
    assert collective_seconds("reduce_scatter", [(NODE, 8)], 8 * 10**8, 0.5) == pytest.approx(14e-3 + 7e-6)


def test_two_levels_share_the_adapters_of_a_node() -> None:
    """Each node receives three quarters of 3.2 GB over eight adapters: 30 ms; inside, 31/32 over 100 GB/s: 31 ms. 28
    hops inside nodes and 3 between them."""
    seconds = collective_seconds("all_gather", [(NODE, 8), (RAIL, 4)], 32 * 10**8, 1.0)
    assert seconds == pytest.approx(31e-3 + 28e-6 + 15e-6)
    slow_inside = NODE.model_copy(update={"bandwidth": 1e12})
    seconds = collective_seconds("all_gather", [(slow_inside, 8), (RAIL, 4)], 32 * 10**8, 1.0)
    assert seconds == pytest.approx(30e-3 + 43e-6)


def test_a_group_across_nodes_with_one_device_in_each_has_one_adapter() -> None:
    """Three quarters of 40 MB over one adapter of 10 GB/s: 3 ms, twice; up and down a tree of two hops."""
    assert collective_seconds("all_reduce", [(RAIL, 4)], 4 * 10**7, 1.0) == pytest.approx(2 * (3e-3 + 2 * 5e-6))


def test_groups_of_one_cost_nothing() -> None:
    assert collective_seconds("all_reduce", [], 10**9, 1.0) == 0.0
    assert collective_seconds("all_gather", [(NODE, 8)], 0, 1.0) == 0.0


@given(
    st.sampled_from(["all_gather", "reduce_scatter", "all_reduce"]),
    st.sampled_from([2, 4, 8, 16, 32]),
    st.integers(1, 10**10),
)
def test_faster_links_are_never_slower(kind: CollectiveKind, devices: int, size: int) -> None:
    cluster = gpu_cluster(4)
    links = spanned_levels(cluster, 1, devices)
    for index, (level, part) in enumerate(links):
        faster = level.model_copy(update={"bandwidth": 1.3 * level.bandwidth, "latency": level.latency / 2})
        better = [*links[:index], (faster, part), *links[index + 1 :]]
        assert collective_seconds(kind, better, size, 0.9) <= collective_seconds(kind, links, size, 0.9)
