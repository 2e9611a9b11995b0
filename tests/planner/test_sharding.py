"""Dimension-0 shards against a restatement of `torch.chunk`, and sums over ranks."""

from __future__ import annotations

from math import ceil, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.profiles import cpu_cluster, gpu_cluster, toy
from shardwright.planner.at_rest import at_rest_bytes
from shardwright.planner.groups import Groups
from shardwright.planner.sharding import own_shard, padded_numel, padded_shard
from shardwright.planner.space import Point, decide
from shardwright.schemas.job import OptimizerSpec, TrainSpec

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)


def recipe(name: str = "adamw", ema: float | None = None) -> TrainSpec:
    fields = {"global_batch": 8, "steps": 1, "optimizer": OptimizerSpec(name=name), "ema": ema}
    return TrainSpec.model_validate(fields)


def chunks(rows: int, degree: int) -> list[int]:
    """Rows of each rank: pieces of ceil(rows / degree) until none is left."""
    pieces = []
    for _ in range(degree):
        pieces.append(min(ceil(sum([rows]) / degree), rows - sum(pieces)))
    return pieces


@given(SHAPES, st.integers(1, 17))
def test_shards_are_those_of_chunk(shape: tuple[int, ...], degree: int) -> None:
    pieces = [own_shard(shape, degree, rank) for rank in range(degree)]
    assert pieces == [rows * prod(shape[1:]) for rows in chunks(shape[0], degree)]
    assert sum(pieces) == prod(shape)
    assert padded_shard(shape, degree) == max(pieces)
    assert padded_numel(shape, degree) == degree * max(pieces) >= prod(shape)


def test_fewer_rows_than_shards_leave_ranks_empty_but_padded() -> None:
    assert [own_shard((2, 3), 4, rank) for rank in range(4)] == [3, 3, 0, 0]
    assert padded_shard((2, 3), 4) == 3


def test_at_rest_by_hand() -> None:
    """64 rows over 2: 320 elements twice; 10 rows over 2: 50, four times; 840 of 1680 elements."""
    point = Point(
        engine="fsdp2", world=4, shard=2, optimizer_degree=2, kept=False, gradient_degree=2,
        micro_batch=1, accumulation=1,
        checkpointed=0,
        precision="fp32",
    )  # fmt: skip
    decision = decide(point, cpu_cluster(4), 4)
    for rank in range(4):
        assert at_rest_bytes(decision, Groups(toy()), recipe(), rank) == {
            "parameters": 840 * 4,
            "gradients": 840 * 4,
            "optimizer_states": 840 * 8 + 6 * 4,
        }
        averaged = at_rest_bytes(decision, Groups(toy()), recipe(ema=0.9), rank)
        assert averaged["optimizer_states"] == 840 * 12 + 6 * 4


def test_frozen_parameters_have_neither_gradients_nor_states() -> None:
    point = Point(
        engine="single", world=1, shard=1, optimizer_degree=1, kept=None, gradient_degree=1,
        micro_batch=1, accumulation=1,
        checkpointed=0,
        precision="fp32",
    )  # fmt: skip
    decision = decide(point, cpu_cluster(1), 4)
    held = at_rest_bytes(decision, Groups(toy(trainable=False)), recipe("sgd"), 0)
    assert held == {"parameters": 1680 * 4, "gradients": 1280 * 4, "optimizer_states": 1280 * 4}


def test_a_rank_outside_the_mesh_is_refused() -> None:
    point = Point(
        engine="ddp", world=8, shard=1, optimizer_degree=1, kept=None, gradient_degree=1,
        micro_batch=1, accumulation=1,
        checkpointed=0,
        precision="fp32",
    )  # fmt: skip
    with pytest.raises(ValueError, match="rank 8"):
        at_rest_bytes(decide(point, gpu_cluster(), 4), Groups(toy()), recipe(), 8)
