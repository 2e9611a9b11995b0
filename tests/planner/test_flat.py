"""Flat buckets: who owns what, and bytes at rest of engine `amsp` by hand. Running processes repeat it
(tests/backends/test_states.py)."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from hypothesis import given
from hypothesis import strategies as st

from planner.profiles import cpu_cluster, toy
from shardwright.planner.at_rest import at_rest_bytes
from shardwright.planner.collectives import step_collectives
from shardwright.planner.flat import Chain, buckets
from shardwright.planner.groups import Groups
from shardwright.planner.quantized import BLOCK
from shardwright.planner.recipe import kind_of, kinds
from shardwright.planner.space import Point, decide
from shardwright.schemas.job import OptimizerSpec, TrainSpec
from shardwright.schemas.profile import Parameter

SIZES = st.lists(st.integers(2, 4), min_size=1, max_size=3).map(tuple)
SHAPES = st.lists(st.lists(st.integers(1, 40), max_size=2).map(tuple), min_size=1, max_size=6)
GROUPED = OptimizerSpec.model_validate({"name": "adamw", "groups": [{"match": ["*0", "*1"], "lr_scale": 0.1}]})


@given(SIZES, SHAPES, st.data())
def test_every_element_has_one_owner_a_copy(
    sizes: tuple[int, ...], shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    level = data.draw(st.integers(0, len(sizes)))
    layout = Chain(sizes, 0, 0, level, 0, alignment=data.draw(st.sampled_from([8, BLOCK])))
    group = [Parameter(name=f"p{index}", shape=shape, trainable=True, unit=-1) for index, shape in enumerate(shapes)]
    (bucket,) = buckets(group, layout, GROUPED)
    assert bucket.padded % (layout.alignment * layout.degree(level)) == 0
    assert 0 <= bucket.padded - bucket.numel < layout.alignment * layout.degree(level)
    owned = [bucket.own(layout, rank) for rank in range(prod(sizes))]
    copies = prod(sizes[level:])
    assert [sum(column) for column in zip(*owned, strict=True)] == [copies * size for size in bucket.kinds]
    of_kind = [
        sum(each.numel for each in group if kind_of(GROUPED, each) == kind) for kind in range(len(kinds(GROUPED)))
    ]
    assert bucket.kinds == tuple(size for size in of_kind if size)
    assert all(max(map(sum, owned)) == sum(owned[0]) >= sum(own) for own in owned), "rank 0 is the fullest"


def point(parameters: int, gradients: int, optimizer: int, **others: object) -> Point:
    ends = sorted({1, parameters, gradients, optimizer, 8})
    fields = {"precision": "bf16_mixed", "kept": False, "accumulation": 1, **others}
    return Point(
        engine="amsp", world=8, shard=parameters, gradient_degree=gradients, optimizer_degree=optimizer,
        axes=tuple(wide // narrow for narrow, wide in pairwise(ends)), micro_batch=1, checkpointed=0, **fields,
    )  # fmt: skip


def at_rest(where: Point, rank: int, trainable: bool = True) -> dict[str, int]:
    train = TrainSpec.model_validate({"global_batch": 8, "steps": 1, "optimizer": {"name": "adamw"}})
    groups = Groups(toy(trainable=trainable))
    return dict(at_rest_bytes(decide(where, cpu_cluster(8), 4), groups, train, rank))


def test_at_rest_by_hand() -> None:
    """Blocks of 100 elements are padded to 128, four times; the root's 1280 are not. The last of eight owns 16 of each
    block's 128, of which 112 to 127 are padding, so it has neither gradients nor states of them."""
    assert at_rest(point(2, 2, 8), 0) == {
        "parameters": 2 * 1792 // 2,
        "gradients": 4 * 1792 // 8,
        "optimizer_states": 4 * 1792 // 8 + 8 * (160 + 4 * 16) + 4 * 5,
    }
    assert at_rest(point(2, 2, 8), 7) == {
        "parameters": 2 * 1792 // 2,
        "gradients": 4 * 160,
        "optimizer_states": 4 * 1792 // 8 + 8 * 160 + 4,
    }
    assert at_rest(point(2, 2, 8, precision="fp32"), 0) == {
        "parameters": 4 * 1792 // 2,
        "gradients": 4 * 1792 // 8,
        "optimizer_states": 8 * (160 + 4 * 16) + 4 * 5,
    }


def test_frozen_blocks_have_a_master_only() -> None:
    assert at_rest(point(2, 2, 8), 0, trainable=False) == {
        "parameters": 2 * 1792 // 2,
        "gradients": 4 * 1280 // 8,
        "optimizer_states": 4 * 1792 // 8 + 8 * 160 + 4,
    }


def test_collectives_by_hand() -> None:
    """Parameters over two, gradients over two, optimizer states over four of eight: three axes of two."""
    found = {
        (each.kind, each.axis, each.bytes, each.purpose): each.count
        for each in step_collectives(point(2, 2, 4, accumulation=3), Groups(toy()))
    }
    assert found == {
        ("all_gather", "dp_1", 2 * 128, "parameters"): 4 * 3 * 2,
        ("all_gather", "dp_1", 2 * 1280, "parameters"): 3,
        ("reduce_scatter", "dp_1", 4 * 128, "gradients"): 4 * 3,
        ("reduce_scatter", "dp_1", 4 * 1280, "gradients"): 3,
        ("reduce_scatter", "dp_2", 2 * 128, "gradients"): 4,
        ("reduce_scatter", "dp_2", 2 * 1280, "gradients"): 1,
        ("all_reduce", "dp_3", 128, "gradients"): 4,
        ("all_reduce", "dp_3", 1280, "gradients"): 1,
        ("all_gather", "dp_2", 128, "parameters"): 4,
        ("all_gather", "dp_2", 1280, "parameters"): 1,
        ("all_reduce", "dp_1", 4, "grad_norm"): 1,
        ("all_reduce", "dp_2", 4, "grad_norm"): 1,
        ("all_reduce", "world", 24, "metrics"): 1,
        ("all_reduce", "world", 8, "metrics"): 1,
    }
