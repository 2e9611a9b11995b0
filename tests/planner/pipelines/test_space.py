"""Which pipelines there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner.profiles import cpu_cluster, cuttable, gpu_cluster, job, toy

from shardwright.planner.pipelines.space import copies_cluster, numbers_of_ranks, permitted_cuts, pipelines
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.space import Point, decide, point_of
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ModelProfile


def toy_job(cluster: ClusterSpec, batch: int = 32, **sections: object) -> JobSpec:
    return job(cluster, batch=batch, sequence=16, **sections)


def points(spec: JobSpec, profile: ModelProfile | None = None) -> list[Point]:
    return list(pipelines(spec, cuttable(toy()) if profile is None else profile))


def test_stages_lie_on_the_slowest_axis() -> None:
    spec = toy_job(gpu_cluster(3, per_node=4), batch=96)
    profile = cuttable(toy(blocks=16))
    assert numbers_of_ranks(spec, profile) == (3, 6, 12)
    for point in points(spec, profile)[::50]:
        decision = decide(point, spec.cluster, 16)
        assert decision.mesh.axes[0].name == "pp"
        assert point_of(decision) == point


def test_the_cluster_of_the_copies() -> None:
    cluster = gpu_cluster(8)
    sizes = {copies: [level.size for level in copies_cluster(cluster, copies).levels] for copies in (1, 4, 8, 16)}
    assert sizes == {1: [1], 4: [4], 8: [8], 16: [8, 2]}


def test_every_point_shares_the_batch_and_suits_its_schedule() -> None:
    found = points(toy_job(gpu_cluster(2, per_node=2)))
    assert found
    assert len(set(found)) == len(found)
    for point in found:
        assert point.pipe is not None
        family = SCHEDULES[point.pipe.schedule]
        assert point.micro_batch * point.accumulation * point.copies == 32
        assert family.allowed_chunks(point.pipe.chunks)
        assert not family.refuses(point.pipe.layout, point.accumulation)
        assert point.shard == 1
        assert point.gradient_degree in (1, point.optimizer_degree)
        assert point.secondary is None


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ({"pp": 2}, lambda point: point.pipe.ranks == 2),
        ({"schedule": "v-half"}, lambda point: point.pipe.schedule == "v-half"),
        ({"schedule": "hanayo", "chunks": 4, "pp": [2, 4]}, lambda point: point.pipe.chunks == 4),
        ({"schedule": "interleaved-1f1b", "chunks": 3}, lambda point: point.pipe.chunks == 3),
        ({"micro_batch": 2}, lambda point: point.micro_batch == 2),
        ({"states": {"optimizer_states": "all"}}, lambda point: point.optimizer_degree == point.copies),
        ({"states": {"parameters": 2}, "pp": 2}, lambda point: point.shard == 2 and not point.kept),
    ],
)
def test_what_the_job_pins(strategy: dict[str, object], says: object) -> None:
    assert callable(says)
    found = points(toy_job(gpu_cluster(2, per_node=2), strategy=strategy), cuttable(toy(blocks=12)))
    assert found
    assert all(map(says, found))


@pytest.mark.parametrize(
    "strategy",
    [
        {"pp": 1},
        {"engine": "stock"},
        {"schedule": "1f1b", "chunks": 2},
        {"states": {"secondary": "node", "parameters": "all"}},
    ],
)
def test_what_excludes_pipelines(strategy: dict[str, object]) -> None:
    assert points(toy_job(gpu_cluster(2, per_node=2), strategy=strategy)) == []


def test_models_that_cannot_be_cut() -> None:
    spec, profile = toy_job(cpu_cluster(2)), cuttable(toy())
    assert points(spec, replace(profile, cuts=())) == []
    assert points(spec, cuttable(toy(blocks=0))) == []
    refused = tuple(replace(cut, refused="in place") for cut in profile.cuts[:3])
    some = replace(profile, cuts=(*refused, *profile.cuts[3:]))
    assert permitted_cuts(some) == (3, 4)
    assert {point.pipe.layout.stages for point in points(spec, some) if point.pipe} == {2}


def test_one_device_has_no_pipeline() -> None:
    assert points(toy_job(cpu_cluster(1))) == []


def test_a_batch_that_only_copies_can_share_leaves_pipelines() -> None:
    found = points(toy_job(gpu_cluster(2, per_node=2), batch=6))
    assert {point.copies for point in found} == {1, 2}
