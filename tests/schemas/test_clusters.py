"""The forms in which a job names its cluster, and the catalogue behind them."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.hardware import table
from shardwright.schemas import InputError, catalogue, load_job
from shardwright.schemas.checks import shard_degrees
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.cluster_source import fill, resolve_cluster
from shardwright.schemas.nodes import Source
from shardwright.schemas.yaml_source import parse_yaml


def resolve(text: str, folder: Path = Path()) -> ClusterSpec:
    return resolve_cluster(parse_yaml(Source("job.yaml", f"cluster: {text}")), folder)[0]


def levels(cluster: ClusterSpec) -> list[tuple[str, int, float]]:
    return [(level.name, level.size, level.bandwidth) for level in cluster.levels]


def test_within_a_node() -> None:
    cluster = resolve("{devices: 8 x h100-sxm-80gb}")
    assert levels(cluster) == [("node", 8, 450e9)]
    assert cluster.device.memory == 81080 * 2**20
    assert cluster.device.peak["bf16"] == 989e12
    assert cluster.device.measured["bf16"] == 794.5e12
    assert cluster.device.memory_bandwidth == 3350e9
    assert cluster.host_memory == 2048 * 10**9
    assert cluster.devices_per_node == 8


def test_part_of_a_node_and_one_device() -> None:
    assert levels(resolve("{devices: 2 x h100-sxm-80gb}")) == [("node", 2, 450e9)]
    assert levels(resolve("{devices: 1 x a100-sxm-80gb}")) == [("node", 1, 300e9)]


def test_several_nodes() -> None:
    cluster = resolve("{devices: 64 x h100-sxm-80gb}")
    assert levels(cluster) == [("node", 8, 450e9), ("cluster", 8, 50e9)]
    assert cluster.devices_per_node == 8


def test_levels_inside_and_beyond_a_node() -> None:
    assert levels(resolve("{devices: 16 x mi250x-gcd-64gb}")) == [
        ("package", 2, 200e9),
        ("node", 4, 50e9),
        ("cluster", 2, 12.5e9),
    ]
    rack = resolve("2 x gb200-nvl72")
    assert [level.size for level in rack.levels] == [4, 18, 2]
    assert (rack.world_size, rack.devices_per_node) == (144, 4)


def test_levels_of_the_job() -> None:
    cluster = resolve(
        "{device: h100-sxm-80gb, levels: [{name: node, size: 8, link: nvlink4},"
        " {name: rail, size: 8, bandwidth: 50GB/s, latency: 5us}]}"
    )
    assert levels(cluster) == [("node", 8, 450e9), ("rail", 8, 50e9)]
    assert cluster.levels[1].latency == 5e-6
    assert cluster.host_memory == 2048 * 10**9  # of the machine that such devices stand in
    assert not [key for key in cluster.sources if key.startswith("levels.rail")]


def test_numbers_of_the_job_win_and_have_no_source() -> None:
    cluster = resolve(
        "{devices: 16 x h100-sxm-80gb, memory: 70GiB, host_memory: 1TiB, launcher: slurm, devices_per_node: 4,"
        " network: {bandwidth: 100Gb/s}}"
    )
    assert cluster.device.memory == 70 * 2**30
    assert (cluster.host_memory, cluster.launcher, cluster.devices_per_node) == (2**40, "slurm", 4)
    assert levels(cluster)[1] == ("cluster", 4, 12.5e9)
    assert not {"device.memory", "host_memory", "levels.cluster.bandwidth"} & set(cluster.sources)
    assert cluster.sources["levels.cluster.latency"].startswith("default: ")
    assert cluster.sources["device.memory_bandwidth"].startswith("catalogue: ")


def test_a_latency_beside_a_link() -> None:
    cluster = resolve("{device: cpu, levels: [{name: node, size: 2, link: loopback, latency: 1ms}]}")
    assert cluster.levels[0].latency == 1e-3
    assert "levels.node.latency" not in cluster.sources


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "cluster.yaml").write_text("devices: 4 x l4-24gb\n")
    assert resolve("ours/cluster.yaml", tmp_path).world_size == 4


def test_an_error_in_the_file_is_shown_there(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text("# ours\ndevices: 4 x l4-24g\nlauncher: slrum\n")
    with pytest.raises(InputError) as caught:
        resolve("ours.yaml", tmp_path)
    (only,) = caught.value.diagnostics
    assert (only.file, only.line, only.key) == (str(tmp_path / "ours.yaml"), 3, "cluster.launcher")
    assert only.suggestion == "did you mean `slurm`?"


def test_a_file_cannot_name_another(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("b.yaml\n")
    with pytest.raises(InputError, match="expected a machine, a file"):
        resolve("a.yaml", tmp_path)


@given(st.integers(1, 400), st.lists(st.integers(1, 9), max_size=3))
def test_fill_uses_every_device_and_whole_groups(count: int, sizes: list[int]) -> None:
    used = fill(count, sizes)
    whole = prod(sizes)
    assert (used is not None) or count % whole
    if used is not None:
        assert prod(used) == count
        assert all(part == size for part, size in zip(used[:-1], sizes, strict=False))


def test_shard_degrees() -> None:
    assert shard_degrees(resolve("{devices: 16 x mi250x-gcd-64gb}")) == (1, 2, 4, 8, 16)
    assert shard_degrees(resolve("{devices: 6 x cpu}")) == (1, 2, 3, 6)
    assert shard_degrees(resolve("{devices: 24 x h100-sxm-80gb}")) == (1, 2, 4, 8, 24)


@pytest.mark.parametrize("name", catalogue.device_names())
def test_every_device_makes_a_cluster(name: str) -> None:
    cluster = resolve(f"{{devices: 64 x {name}}}")
    assert cluster.world_size == 64
    device = cluster.device
    assert device.name == name
    for dtype, rate in device.measured.items():
        assert 0.3 * device.peak[dtype] < rate <= device.peak[dtype]
    bandwidths = [level.bandwidth for level in cluster.levels]
    assert bandwidths == sorted(bandwidths, reverse=True)
    assert "fp32" in device.peak
    facts = {"memory", "memory_bandwidth", *(f"peak.{dtype}" for dtype in device.peak)}
    assert {f"device.{fact}" for fact in facts} <= set(cluster.sources)
    assert all(source.startswith(("catalogue: ", "default: ")) for source in cluster.sources.values())


@pytest.mark.parametrize("name", catalogue.machine_names())
def test_every_machine_makes_a_cluster(name: str) -> None:
    one, three = resolve(name), resolve(f"3 x {name}")
    assert three.world_size == 3 * one.world_size
    assert three.levels[-1].name == "cluster"
    assert catalogue.title(name)


def test_every_source_of_the_catalogue_is_known_and_used() -> None:
    used: set[str] = set()

    def walk(value: object) -> None:
        if isinstance(value, dict):
            if set(value) == {"value", "source"}:
                used.add(value["source"])
            for below in value.values():
                walk(below)

    for name in ("devices", "links", "machines"):
        walk(table(name))
    assert used == set(table("sources"))


@pytest.mark.parametrize("name", catalogue.machine_names())
def test_every_machine_tells_what_a_host_is(name: str, workspace: Path) -> None:
    text = "model: {factory: model:build}\ndata: {bytes: corpus/a.txt}\n"
    cluster = resolve(f"2 x {name}")
    assert "node" in [level.name for level in cluster.levels]
    train = f"{{sequence_length: 8, global_batch: {cluster.world_size}, steps: 1}}"
    (workspace / "job.yaml").write_text(f"{text}cluster: 2 x {name}\ntrain: {train}\n")
    assert load_job(workspace / "job.yaml").job.cluster.devices_per_node < cluster.world_size


def test_a_single_level_is_one_host_whatever_its_name(workspace: Path) -> None:
    text = "model: {factory: model:build}\ndata: {bytes: corpus/a.txt}\n"
    text += "train: {sequence_length: 8, global_batch: 8, steps: 1}\n"
    (workspace / "job.yaml").write_text(text + "cluster: {device: cpu, levels: [{name: box, size: 4, link: loopback}]}")
    assert load_job(workspace / "job.yaml").job.cluster.devices_per_node == 4
