"""Bytes by phase and category: the toy worked out by hand, then what must hold for every model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.profiles import cpu_cluster, gpu_cluster, job, llama, toy
from shardwright.planner.memory import CATEGORIES, MemoryModel, Phase
from shardwright.planner.predict import Predictor
from shardwright.planner.space import Point, configurations
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import Affine, BackwardMoment, ModelProfile

PLAIN = Point(
    engine="single", world=1, shard=1, optimizer_degree=1, kept=None, gradient_degree=1,
    micro_batch=1, accumulation=1,
    checkpointed=0,
    precision="fp32",
)  # fmt: skip
SHARDED = replace(
    PLAIN, engine="fsdp2", world=2, shard=2, optimizer_degree=2, kept=False, gradient_degree=2, precision="bf16_mixed"
)

# What the toy holds all the time on one device: 1680 parameters, two moments and six step counters, 16 tokens' inputs.
WHOLE = {"parameters": 6720, "optimizer_states": 2 * 6720 + 6 * 4, "inputs": 256}
HALF = {"parameters": 3360, "optimizer_states": 6720 + 6 * 4, "inputs": 256}


def phases(point: Point, profile: ModelProfile | None = None, spec: JobSpec | None = None) -> dict[str, Phase]:
    spec = spec or job(cpu_cluster(point.world), batch=8 * point.world, sequence=16)
    found = Predictor(spec, profile or toy()).memory.phases(point)
    return {phase.name: phase for phase in found}


def test_one_device_by_hand() -> None:
    found = phases(PLAIN)
    assert found["block forward"].bytes == WHOLE | {
        "saved_activations": 10 + 3000 + 100,
        "activation_temporaries": 1000,
    }
    assert found["head and loss"].bytes == WHOLE | {"saved_activations": 10 + 4000 + 100, "head_and_loss": 500}
    assert found["loss backward"].bytes == WHOLE | {"saved_activations": 4010, "head_and_loss": 500 + 50}
    # The head's 640 gradients, and the last block's 100.
    assert found["block backward"].bytes == WHOLE | {
        "saved_activations": 4010,
        "activation_temporaries": 50 + 100,
        "gradients": 4 * 740,
    }
    assert found["optimizer step"].bytes == WHOLE | {"gradients": 6720}
    assert "gradient reduction" not in found


def test_accumulating_on_one_device_keeps_all_gradients() -> None:
    found = phases(replace(PLAIN, accumulation=4))
    assert found["block forward"].bytes["gradients"] == 6720
    assert found["block backward"].bytes["gradients"] == 6720 + 4 * 640  # the newest is one parameter's
    assert found["block forward"].bytes["inputs"] == 4 * 256


def test_checkpointing_by_hand() -> None:
    """The first block keeps 100 bytes of 1000, and its backward needs 1050."""
    found = phases(replace(PLAIN, checkpointed=1))
    assert found["head and loss"].bytes["saved_activations"] == 10 + 100 + 3000 + 100
    assert found["block backward"].bytes["saved_activations"] == 10 + 100 + 3000
    everything = phases(replace(PLAIN, checkpointed=4))["block backward"]
    assert everything.recomputes
    assert everything.bytes["saved_activations"] == 10 + 100  # the first block, when all gradients are there
    assert everything.bytes["activation_temporaries"] == 1050 + 100


def test_distributed_data_parallel_holds_its_buckets() -> None:
    point = replace(PLAIN, engine="ddp", world=2)
    found = phases(point)
    assert found["block forward"].bytes["communication_buffers"] == 6720
    assert "gradients" not in found["block forward"].bytes
    assert found["block backward"].bytes["gradients"] == 4 * 640
    assert found["optimizer step"].bytes == WHOLE | {"gradients": 6720}
    twice = phases(replace(point, accumulation=2))["block forward"].bytes
    assert twice["communication_buffers"] == twice["gradients"] == 6720


def test_fully_shard_by_hand() -> None:
    """Two devices, bf16: the root's 1280 elements and a block's 100 are gathered in 2 bytes each. The last block saves
    so much that its backward is the worst."""
    point = SHARDED
    found = phases(point, toy(saved=2000))
    assert found["initialise"].bytes == {"parameters": 3360 + 4 * 1280}
    assert found["embedding forward"].bytes == HALF | {"gathered_parameters": 2 * 2560, "activation_temporaries": 10}
    assert found["block forward"].bytes["gathered_parameters"] == 2560 + 200 + 200
    assert found["head and loss"].bytes["gathered_parameters"] == 2560  # the model has returned
    assert found["loss backward"].bytes["gathered_parameters"] == 2560
    assert found["head backward"].bytes["gathered_parameters"] == 2560 + 200  # the last block is prefetched
    assert found["head backward"].bytes["gradients"] == 2 * 640
    last = found["block backward"].bytes
    assert last["gathered_parameters"] == 2560 + 200 + 200  # root, this block, the one that is prefetched
    assert last["gradients"] == 2 * 640 + 2 * 100  # the head's and this block's, whole
    assert "communication_buffers" not in last
    assert found["gradient reduction"].bytes["communication_buffers"] == 400 + 200
    assert found["embedding backward"].bytes["gradients"] == 4 * 4 * 50 + 2 * 1280
    assert found["root gradient reduction"].bytes["communication_buffers"] == 4 * 1280 + 2 * 1280
    assert found["root gradient reduction"].bytes["gradients"] == 4 * 200 + 2 * 640  # foreach_reduce holds the last
    assert found["optimizer step"].bytes == HALF | {"gradients": 3360}


def test_a_gather_holds_two_buffers() -> None:
    """The root's, or that of the block before, goes when the block's parameters have been copied out of its own."""
    point = SHARDED
    found = phases(point, toy(saved=0))
    assert found["block gather"].bytes["gathered_parameters"] == 2560 + 200 + (2560 + 200)
    assert found["backward gather"].bytes["gathered_parameters"] == 2560 + 200 + 200  # the first block, its own buffer
    assert found["backward gather"].bytes["gradients"] == 2 * 640 + 3 * 200
    # Of two blocks the last is worse: the buffer that is prefetched is filled from a copy of the shard, 50 elements.
    last = phases(point, toy(blocks=2, saved=2000))["backward gather"].bytes
    assert last["gathered_parameters"] == 2560 + 200 + (200 + 100)
    assert "block gather" not in phases(
        replace(point, engine="single", world=1, shard=1, optimizer_degree=1, kept=None, precision="fp32")
    )


@pytest.mark.parametrize(("early", "expected"), [(250, (250, 0)), (150, (0, 200))])
def test_gradients_count_from_when_they_are_made(early: int, expected: tuple[int, int]) -> None:
    """Of a block's backward, a moment with activations and none of its 100 gradients, and one the other way round."""
    point = SHARDED
    moments = (BackwardMoment(Affine(0, early), 0, False), BackwardMoment(Affine(0, 0), 100, False))
    profile = toy(saved=2000)
    block = profile.units[1]
    costs = {dtype: replace(cost, backward_moments={"none": moments}) for dtype, cost in block.costs.items()}
    profile = replace(profile, units=(profile.units[0], replace(block, costs=costs), profile.units[2]))
    found = phases(point, profile)["block backward"].bytes
    assert (found["activation_temporaries"] - 100, found["gradients"] - 2 * 640) == expected


def test_micro_batches_differ() -> None:
    """Of three, the second has kept parameters from the first and keeps them for the third."""
    point = replace(SHARDED, kept=True)
    for accumulation, blocks in ((2, 3), (3, 4)):
        found = phases(replace(point, accumulation=accumulation), toy(saved=0))["gradient reduction"].bytes
        assert found["gathered_parameters"] == 2560 + blocks * 200
        assert found["gradients"] == 3360 + 2 * 640 + 200  # all of them from before, the head's and the block's anew


def test_the_first_block_may_be_the_worst_of_backward() -> None:
    """With nothing saved, the sharded gradients of the blocks behind count more: 3 x 200 and a reduction of 400."""
    point = SHARDED
    first = phases(point, toy(saved=0))["block backward"].bytes
    assert first["gathered_parameters"] == 2560 + 200
    assert first["gradients"] == 3 * 200 + 2 * 640 + 2 * 100
    assert first["communication_buffers"] == 400


def test_kept_parameters_stay() -> None:
    point = replace(SHARDED, kept=True)
    assert phases(point)["block backward"].bytes["gathered_parameters"] == 2560 + 4 * 200
    stays = phases(replace(point, accumulation=2))
    assert stays["embedding forward"].bytes["gathered_parameters"] == 2560 + 4 * 200  # of the second micro-batch
    assert stays["root gradient reduction"].bytes["gathered_parameters"] == 2560 + 4 * 200


def test_whole_gradients_that_wait_are_float32() -> None:
    point = replace(SHARDED, gradient_degree=1)
    waits = phases(replace(point, accumulation=2))
    assert waits["block forward"].bytes["gradients"] == 6720
    assert waits["block backward"].bytes["gradients"] == 6720 + 2 * 640 + 2 * 100
    shards = phases(replace(point, accumulation=2, gradient_degree=2))
    assert shards["block forward"].bytes["gradients"] == 3360


def test_replicas_are_copied_without_a_gather_buffer() -> None:
    point = replace(SHARDED, shard=1, optimizer_degree=1, gradient_degree=1)
    found = phases(point)
    assert found["block forward"].bytes["gathered_parameters"] == 2560 + 200
    assert found["embedding forward"].bytes["gathered_parameters"] == 2560


def test_foreach_sgd_with_weight_decay_copies_sharded_gradients() -> None:
    point = replace(SHARDED, precision="fp32")

    def gradients(point: Point, **optimizer: Any) -> int:
        train = {"optimizer": {"name": "sgd", **optimizer}}
        spec = job(cpu_cluster(point.world), batch=8 * point.world, sequence=16, train=train)
        return phases(point, spec=spec)["optimizer step"].bytes["gradients"]

    assert gradients(point, weight_decay=0.1) == 2 * 3360
    assert gradients(point, weight_decay=0) == 3360
    assert gradients(PLAIN, weight_decay=0.1) == 6720  # fused


def test_a_constructor_holds_the_model_on_the_host_of_gpus_and_on_cpu_devices() -> None:
    built = replace(toy(), init="constructor")
    point = replace(SHARDED, precision="fp32")
    assert phases(point, built)["initialise"].bytes == {"parameters": 3360 + 6720}
    gpus = job(gpu_cluster(per_node=2), batch=2, sequence=16)
    assert phases(point, built, gpus)["initialise"].bytes == {"parameters": 3360 + 4 * 1280}
    host = [Predictor(gpus, profile).memory.host_bytes(point, 1000) for profile in (toy(), built)]
    assert host[1] - host[0] == 2 * 6720
    processes = Predictor(job(cpu_cluster(2), batch=2, sequence=16), toy()).memory
    assert processes.host_bytes(point, 1000) - processes.host_bytes(point, 0) == 2 * 1000


def test_reserved_is_allocated_and_fragmentation() -> None:
    gpus, cpus = (Predictor(job(cluster, batch=8), toy()).memory for cluster in (gpu_cluster(), cpu_cluster(8)))
    assert gpus.reserved(1000) == 1150
    assert cpus.reserved(1000) == 1000


def test_a_frozen_block_has_no_gradients() -> None:
    point = replace(SHARDED, precision="fp32")
    frozen = phases(point, toy(trainable=False))["block backward"].bytes
    assert frozen["gradients"] == 4 * 640


MODELS = st.builds(
    llama,
    layers=st.integers(1, 6),
    hidden=st.sampled_from([64, 96]),
    heads=st.just(4),
    kv_heads=st.just(2),
    ffn=st.sampled_from([130, 256]),
    vocabulary=st.sampled_from([101, 1000]),
    sequence=st.sampled_from([16, 128]),
    tied=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(MODELS, st.data())
def test_what_holds_at_every_point(profile: ModelProfile, data: st.DataObject) -> None:
    spec = job(gpu_cluster(2), batch=64)
    memory = Predictor(spec, profile).memory
    point = data.draw(st.sampled_from(list(configurations(spec, profile))))
    blocks = len(profile.block_paths)
    point = replace(point, checkpointed=data.draw(st.integers(0, blocks)))
    for phase in memory.phases(point):
        assert phase.total == sum(phase.bytes.values())
        assert set(phase.bytes) <= set(CATEGORIES)
        assert all(size > 0 for size in phase.bytes.values())
    prediction = memory.prediction(point)
    peak = max(prediction.stages[0].phases, key=lambda phase: phase.total_bytes)
    assert prediction.peak_allocated_bytes == peak.total_bytes
    assert prediction.stages[0].peak_phase == peak.name
    _grows_with_the_micro_batch(memory, point)
    _shrinks_with_checkpointing(memory, point, blocks)


def _grows_with_the_micro_batch(memory: MemoryModel, point: Point) -> None:
    larger = replace(point, micro_batch=point.micro_batch * 2)
    assert memory.peak(larger).total > memory.peak(point).total


def _shrinks_with_checkpointing(memory: MemoryModel, point: Point, blocks: int) -> None:
    """But for the backward of recomputed blocks themselves."""
    before = memory.peak(replace(point, checkpointed=0))
    for count in range(1, blocks + 1):
        peak = memory.peak(replace(point, checkpointed=count))
        assert peak.total <= before.total or peak.recomputes
        if not before.recomputes:
            before = peak
        elif peak.recomputes:
            assert peak.total >= before.total


def test_sharding_wider_never_takes_more() -> None:
    memory = Predictor(job(gpu_cluster(), batch=8), llama(layers=4)).memory
    point = replace(SHARDED, world=8, shard=1, optimizer_degree=1, gradient_degree=1)
    # From two on: a group of one needs no gather buffer.
    peaks = [memory.peak(replace(point, shard=shard, gradient_degree=shard)).total for shard in (2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_keeping_parameters_never_takes_less(accumulation: int) -> None:
    memory = Predictor(job(gpu_cluster(), batch=8 * accumulation), llama(layers=4)).memory
    point = replace(
        PLAIN,
        engine="fsdp2",
        world=8,
        shard=8,
        optimizer_degree=8,
        gradient_degree=8,
        accumulation=accumulation,
        precision="bf16_mixed",
    )
    assert memory.peak(replace(point, kept=True)).total >= memory.peak(replace(point, kept=False)).total


def test_llama_3_8b_states_as_zero_counts_them() -> None:
    """4 + 8 bytes a parameter of parameters and optimizer states over eight devices (ZeRO, arXiv 1910.02054, table 1,
    with float32 masters as the only parameters at rest)."""
    point = replace(SHARDED, world=8, shard=8, optimizer_degree=8, gradient_degree=8)
    at_rest = Predictor(job(gpu_cluster(), batch=8), llama()).memory.prediction(point).at_rest
    assert at_rest["parameters"] == 4 * 8030261248 / 8
    assert at_rest["gradients"] == 4 * 8030261248 / 8
    assert at_rest["optimizer_states"] == 8 * 8030261248 / 8 + 4 * 291


@settings(max_examples=40, deadline=None)
@given(MODELS, st.data())
def test_the_floor_is_below_every_peak(profile: ModelProfile, data: st.DataObject) -> None:
    spec = job(gpu_cluster(2), batch=32, quality=data.draw(st.sampled_from(["standard", "lossy"])))
    memory = Predictor(spec, profile).memory
    engine = data.draw(st.sampled_from(sorted({point.engine for point in configurations(spec, profile)})))
    points = [point for point in configurations(spec, profile) if point.engine == engine]
    blocks = data.draw(st.integers(0, len(profile.block_paths)))
    point = replace(data.draw(st.sampled_from(points)), checkpointed=blocks)
    assert memory.at_rest_floor(point) <= memory.peak(point).total
    at_rest = memory.prediction(point).at_rest
    assert memory.at_rest_floor(point) >= at_rest["parameters"] + at_rest["optimizer_states"] + at_rest["gradients"]


def flat(parameters: int, gradients: int, optimizer: int, **others: Any) -> Point:
    """Engine amsp on eight devices in bf16; the axes are those between the degrees."""
    ends = sorted({1, parameters, gradients, optimizer, others.get("secondary", 1), 8})
    axes = tuple(wide // narrow for narrow, wide in pairwise(ends))
    kept = None if parameters == 1 else others.pop("kept", False)
    return replace(
        PLAIN, engine="amsp", world=8, shard=parameters, gradient_degree=gradients, optimizer_degree=optimizer,
        axes=axes, precision="bf16_mixed", kept=kept, **others
    )  # fmt: skip


def test_sharded_states_by_hand() -> None:
    """Two, two, four of eight devices. A block's 100 elements are padded to 128, the root's 1280 are none more."""
    found = phases(flat(2, 2, 4), toy(saved=2000))
    fixed = {"parameters": 2 * 896, "optimizer_states": 4 * 448 + 8 * 448 + 5 * 4, "inputs": 256}
    assert found["optimizer step"].bytes == fixed | {"gradients": 4 * 448}
    # The root first: 2560 whole; the first block is on its way. New values of the blocks behind it: 2 x 32 each.
    assert found["embedding forward"].bytes == fixed | {
        "gathered_parameters": 2560 + 256,
        "communication_buffers": 3 * 64,
        "activation_temporaries": 10,
    }
    assert found["head and loss"].bytes["gathered_parameters"] == 2560
    assert "communication_buffers" not in found["head and loss"].bytes
    last = found["block backward"].bytes  # of the last block, the one before it on its way
    assert last["gathered_parameters"] == 2560 + 256 + 256
    assert last["gradients"] == 4 * 1280 + 4 * 128 + 2 * 100  # the root's buffer and its own, whole; the newest
    reduction = found["root gradient reduction"].bytes
    # Of three hops the root's first reads 5120 and writes 2560, the first block's second 256 and 128; that of the block
    # behind it is summed in place, 128. Two have ended.
    assert reduction["communication_buffers"] == 5120 + 2560 + 256 + 128 + 128
    assert reduction["gradients"] == 2 * 128
    assert found["publication"].bytes["communication_buffers"] >= 2 * 448


def test_the_second_copy_by_hand() -> None:
    """128 elements of a block over two devices: 128 bytes each, from its forward to its backward."""
    found = phases(flat(8, 8, 8, secondary=2), toy(saved=2000))
    without = phases(flat(8, 8, 8), toy(saved=2000))
    differ = found["head and loss"].bytes["gathered_parameters"] - without["head and loss"].bytes["gathered_parameters"]
    assert differ == 4 * 128
    assert "second copy" not in without
