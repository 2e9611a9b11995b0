"""Step time: the toy by hand, what must hold for every model, and collectives as they are listed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.profiles import cpu_cluster, gpu_cluster, job, llama, toy
from planner.test_memory import MODELS, PLAIN
from shardwright.planner import ddp_buckets
from shardwright.planner.compute import matmul_rate, model_work
from shardwright.planner.constants import attention_efficiency
from shardwright.planner.groups import Groups
from shardwright.planner.predict import Predictor
from shardwright.planner.space import Point, configurations
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.profile import ModelProfile, Parameter

FSDP = replace(
    PLAIN, engine="fsdp2", world=8, shard=8, optimizer_degree=8, kept=False, gradient_degree=8, precision="bf16_mixed"
)


def seconds(point: Point, cluster: ClusterSpec, profile: ModelProfile | None = None) -> float:
    batch = point.world * point.micro_batch * point.accumulation
    return Predictor(job(cluster, batch=batch), profile or toy()).time.step(point).seconds


def test_one_device_by_hand() -> None:
    """1 GFLOP/s, of which 0.8 are expected and 0.7 reached; 16 operators of 8 us; 10 GB/s, of which 0.6 are reached."""
    step = Predictor(job(cpu_cluster(1), batch=1, sequence=16), toy()).time.step(PLAIN)
    parts = {part.name: part.seconds for part in step.parts}
    rate = 1e9 * 0.8 * 0.7
    assert parts["forward matmul"] == pytest.approx(6e6 / rate)
    assert parts["backward matmul"] == pytest.approx(12e6 / rate)
    assert parts["forward launch"] == pytest.approx(6 * 8e-6)
    assert parts["backward launch"] == pytest.approx(12 * 8e-6)
    assert parts["optimizer"] == pytest.approx(28 * 1680 / 6e9)
    assert parts["gradient norm"] == pytest.approx(12 * 1680 / 6e9)
    assert set(parts) == {
        "forward matmul", "forward launch", "backward matmul", "backward launch", "optimizer", "gradient norm",
        "host overhead",
    }  # fmt: skip
    assert step.seconds == sum(parts.values())


def test_two_micro_batches_take_compute_twice() -> None:
    once, twice = (seconds(replace(PLAIN, accumulation=count), cpu_cluster(1)) for count in (1, 2))
    assert twice - once == pytest.approx(18e6 / 5.6e8 + 18 * 8e-6)


def test_recomputing_costs_the_forward_again() -> None:
    none, two = (seconds(replace(PLAIN, checkpointed=count), cpu_cluster(1)) for count in (0, 2))
    assert two - none == pytest.approx(2 * (1e6 / 5.6e8 + 8e-6))


def test_hosts_and_kernels_run_side_by_side_on_gpus() -> None:
    """Short kernels are bound by their launch, long ones are not; neither is faster than the slower of the two."""
    device = gpu_cluster().device
    tiny = llama(layers=2, hidden=64, heads=2, kv_heads=1, ffn=128, sequence=16)
    short, long = (model_work(profile, "bf16", 1, device, hooked=False) for profile in (tiny, llama(layers=2)))
    assert short[1].forward.launch > 100 * sum(short[1].forward.kinds)
    assert long[1].forward.launch < 1e-3 * sum(long[1].forward.kinds)


def test_hooks_of_fully_shard_cost_short_blocks() -> None:
    """Half a millisecond a pass and group: four blocks and the root, forward and backward."""
    profile, device = toy(), cpu_cluster(2).device
    bare, hooked = (model_work(profile, "fp32", 1, device, hooked=each) for each in (False, True))
    extra = [
        unit.count * (more.forward.seconds + more.backward.seconds - unit.forward.seconds - unit.backward.seconds)
        for unit, more in zip(bare, hooked, strict=True)
    ]
    assert extra == pytest.approx([0, 4e-3, 1e-3])


def test_attention_efficiency_is_the_devices_own() -> None:
    assert attention_efficiency(gpu_cluster().device).value == 0.34
    assert attention_efficiency(gpu_cluster(device="a100-sxm-80gb").device).value == 0.55
    assert attention_efficiency(gpu_cluster(device="b200-sxm").device).origin == "default"


@settings(max_examples=25, deadline=None)
@given(MODELS, st.data())
def test_what_holds_at_every_point(profile: ModelProfile, data: st.DataObject) -> None:
    cluster = gpu_cluster(2)
    spec = job(cluster, batch=64)
    predictor = Predictor(spec, profile)
    point = data.draw(st.sampled_from(list(configurations(spec, profile))))
    step = predictor.time.step(point)
    assert step.seconds == sum(part.seconds for part in step.parts)
    assert all(part.seconds > 0 for part in step.parts)
    blocks = len(profile.block_paths)
    times = [predictor.time.step(replace(point, checkpointed=count)).seconds for count in range(blocks + 1)]
    assert times == sorted(times)
    for index, level in enumerate(cluster.levels):
        faster = level.model_copy(update={"bandwidth": 2 * level.bandwidth})
        levels = (*cluster.levels[:index], faster, *cluster.levels[index + 1 :])
        better = Predictor(job(cluster.model_copy(update={"levels": levels}), batch=64), profile)
        assert better.time.step(point).seconds <= step.seconds * (1 + 1e-12)


def test_prediction_adds_up() -> None:
    prediction = Predictor(job(gpu_cluster(), batch=16), llama()).prediction(replace(FSDP, accumulation=2))
    assert prediction.tokens_per_s == pytest.approx(16 * 8192 / prediction.step_time_s)
    per_token = prediction.model_flops_per_step / (16 * 8192)
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    attention = 3 * 2 * 8192 * 4096  # causal; PaLM (arXiv 2204.02311), appendix B, counts both halves
    assert per_token == pytest.approx(6 * (32 * layer + 4096 * 128256) + 32 * attention)
    assert prediction.mfu == pytest.approx(prediction.model_flops_per_step / (8 * 989e12 * prediction.step_time_s))


def test_published_llama_3_8b_on_64_a100() -> None:
    """torchtitan, docs/performance.md at 3faaa1a: 2904 tokens/s a GPU, every second layer recomputed. The profile is
    from formulas, so a fifth is allowed."""
    point = replace(FSDP, world=64, shard=64, gradient_degree=64, checkpointed=16)
    cluster = gpu_cluster(8, device="a100-sxm-80gb")
    assert 8192 / seconds(point, cluster, llama()) == pytest.approx(2904, rel=0.2)


def test_published_llama_3_70b_on_64_a100() -> None:
    """torchtitan, docs/performance.md at 3faaa1a: 331 tokens/s a GPU, every layer recomputed."""
    point = replace(FSDP, world=64, shard=64, gradient_degree=64, checkpointed=80)
    profile = llama(layers=80, hidden=8192, heads=64, ffn=28672)
    cluster = gpu_cluster(8, device="a100-sxm-80gb")
    assert 8192 / seconds(point, cluster, profile) == pytest.approx(331, rel=0.2)


def test_collectives_of_a_plan() -> None:
    collectives = Predictor(job(gpu_cluster(2), batch=32), llama(layers=2)).prediction(
        replace(FSDP, world=16, accumulation=2)
    )
    listed = {(each.kind, each.axis, each.purpose): 0 for each in collectives.collectives}
    for each in collectives.collectives:
        listed[each.kind, each.axis, each.purpose] += each.count
    assert listed == {
        ("all_gather", "dp_shard", "parameters"): 2 * 2 * 2 + 2,
        ("reduce_scatter", "dp_shard", "gradients"): 3 * 2,
        ("all_reduce", "dp_replicate", "gradients"): 3,
        ("all_reduce", "dp_shard", "grad_norm"): 1,
        ("all_reduce", "world", "metrics"): 2,
    }


def test_buckets_close_at_the_cap() -> None:
    def parameter(numel: int, trainable: bool = True) -> Parameter:
        return Parameter(name=str(numel), shape=(numel,), trainable=trainable, unit=-1)

    parameters = [parameter(10), parameter(5), parameter(30), parameter(100, trainable=False), parameter(3)]
    assert ddp_buckets(parameters, 1000) == [4 * 48]
    assert ddp_buckets(parameters, 4 * 33) == [4 * 33, 4 * 15]
    assert ddp_buckets(parameters, 1) == [12, 120, 20, 40]


def test_groups_of_a_tied_model() -> None:
    sizes = Groups(llama(layers=2, tied=True)).sizes(8)
    table = 128256 * 4096
    assert (sizes.embedding_numel, sizes.head_numel, sizes.root_numel) == (table, table + 4096, table + 4096)


def test_the_tail_that_nothing_needs_is_not_recomputed() -> None:
    """Checkpointing stops early: a block whose whole forward is such a tail costs nothing to recompute."""
    units = tuple(
        replace(
            unit,
            costs={
                dtype: replace(cost, not_recomputed=tuple(op for op in cost.operators if op.phase == "forward"))
                for dtype, cost in unit.costs.items()
            },
        )
        for unit in toy().units
    )
    profile = replace(toy(), units=units)
    work = model_work(profile, "fp32", 1, cpu_cluster(1).device, hooked=True)
    assert [unit.recompute for unit in work] == [0.0] * len(units)
    assert all(unit.recompute > 0 for unit in model_work(toy(), "fp32", 1, cpu_cluster(1).device, hooked=True)[1:-1])


def test_operands_of_a_type_without_a_rate_take_the_slowest_that_is_listed() -> None:
    device = gpu_cluster(1).device.model_copy(update={"peak": {"bf16": 8e14}, "measured": {}})
    assert matmul_rate(device, "fp32") == matmul_rate(device, "bf16")
