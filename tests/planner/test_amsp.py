"""AMSP's own cost model (arXiv 2311.00257v2)."""

from __future__ import annotations

import pytest

from shardwright.planner.amsp import Operation, Shards, Spread, communication_seconds, points, spreads, state_bytes

CLUSTER = Spread(nodes=128, per_node=8)
ONE, NODE, ALL = Spread(1, 1), Spread(1, 8), CLUSTER


def one_each(operation: Operation, size: float, spread: Spread) -> float:
    """Every collective takes a second, on more than one device."""
    return 1.0 if spread.size > 1 else 0.0


def test_the_space_of_1024_devices_is_small_enough_to_be_searched_whole() -> None:
    assert len(spreads(CLUSTER)) == 11
    found = list(points(CLUSTER))
    assert len(found) == len(set(found)) == 121
    assert all(point.optimizer_states.contains(point.gradients) for point in found)
    assert all(point.gradients.contains(point.parameters) for point in found)


@pytest.mark.parametrize(
    ("point", "per_parameter"),
    [
        (Shards(ONE, ONE, ONE), 16),
        (Shards(ONE, ONE, ALL), 4 + 12 / 1024),
        (Shards(ONE, ALL, ALL), 2 + 14 / 1024),
        (Shards(ALL, ALL, ALL), 16 / 1024),
        (Shards(NODE, NODE, NODE), 2),
    ],
    ids=["replicated", "ZeRO-1", "ZeRO-2", "ZeRO-3", "MiCS"],
)
def test_named_systems_hold_what_their_papers_say(point: Shards, per_parameter: float) -> None:
    assert point in points(CLUSTER)
    assert state_bytes(1000, point) == pytest.approx(1000 * per_parameter)


def count(point: Shards, micro_batches: int) -> float:
    return communication_seconds(
        [600, 400], point, CLUSTER, micro_batches=micro_batches, bucket=200.0, seconds=one_each
    )


def test_collectives_are_those_of_the_four_terms() -> None:
    whole, sharded = 2 * 1000 / 200, 2 * 1000 / (200 * 8)
    assert count(Shards(ONE, ONE, ONE), 4) == whole  # one all-reduce a bucket, on the last micro-batch
    assert count(Shards(ONE, ONE, NODE), 4) == whole + 8  # and a broadcast from each owner of optimizer states
    assert count(Shards(ONE, NODE, NODE), 4) == (4 - 1) * whole + whole + 8  # and one a bucket before it
    assert count(Shards(NODE, NODE, NODE), 4) == 4 * 2 * 3 + sharded  # two gathers and a reduce-scatter a module
    assert count(Shards(ALL, ALL, ALL), 4) == 4 * 2 * 3  # nothing is left to reduce


def test_more_bandwidth_never_costs_more() -> None:
    def slow(operation: Operation, size: float, spread: Spread) -> float:
        return size / 1e9 * (1 + (spread.nodes > 1))

    for point in points(CLUSTER):
        times = [
            communication_seconds(
                [600, 400],
                point,
                CLUSTER,
                micro_batches=2,
                bucket=200.0,
                seconds=lambda operation, size, spread, by=by: slow(operation, size, spread) / by,
            )
            for by in (1, 2)
        ]
        assert times[1] == pytest.approx(times[0] / 2)
