"""Plans with tensor, context and expert parallelism: how they are shrunk, and whose collectives are whose."""

from __future__ import annotations

import pytest
from support.parallel_plans import LLAMA_DIVISIONS, MIXTRAL_EXPERTS, parallel_plan
from support.pipeline_plans import pipeline_plan
from support.plans import make_plan

from shardwright.planner.space import parallel_of
from shardwright.rehearse.compare_layout import Processes, compare_collectives
from shardwright.rehearse.shrink import small_parallel
from shardwright.rehearse.shrink_mesh import shrink_mesh
from shardwright.schemas.plan import Collective, Plan


def processes(plan: Plan) -> Processes:
    return Processes(plan.decision.mesh, parallel_of(plan.decision))


def test_neighbours_among_the_processes_with_the_same_parts_share_sequences_and_experts() -> None:
    plan = parallel_plan(
        make_plan(world=8, engine="fsdp2", shard=4), tp=2, cp=2, ep=2, divisions=LLAMA_DIVISIONS,
        expert_modules=MIXTRAL_EXPERTS,
    )  # fmt: skip
    of = processes(plan)
    assert of.groups("tp", 5, 2) == [(4, 5)]
    assert of.groups("cp", 5, 2) == [(5, 7)]
    assert of.groups("ep", 8, 2) == [(8, 10)]
    # dp_shard 4 holds two processes with the same experts, and dp_replicate 2 as many copies of these.
    assert of.groups("expert_shard", 3, 2) == [(3, 7)]
    assert of.groups("expert_replicate", 3, 2) == [(3, 11)]
    assert of.groups("dp_shard", 3, 4) == [(1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("allowed", "sizes", "shared"),
    [(8, {"dp_shard": 4, "tp": 2}, (2, 2, 2)), (4, {"dp_shard": 2, "tp": 2}, (2, 2, 2)), (2, {"tp": 2}, (2, 1, 1))],
)
def test_each_kind_stays_with_two_processes_while_there_is_room(
    allowed: int, sizes: dict[str, int], shared: tuple[int, int, int]
) -> None:
    plan = parallel_plan(
        make_plan(world=16, engine="fsdp2", shard=16, train={"global_batch": 16}), tp=8, cp=4, ep=4,
        divisions=LLAMA_DIVISIONS, expert_modules=MIXTRAL_EXPERTS,
    )  # fmt: skip
    mesh = shrink_mesh(plan.decision, plan.job.cluster, allowed)
    small = small_parallel(plan.decision, mesh)
    assert {name: size for name, size in mesh.axes.items() if size > 1} == sizes
    assert (small.tp, small.cp, small.ep) == shared
    assert mesh.world_size <= allowed


def test_a_pipeline_keeps_its_ranks_beside_divided_layers() -> None:
    staged = pipeline_plan(make_plan(world=4, engine="amsp", axes=(2,)), ranks=2, copies=2, micro_batches=3)
    plan = parallel_plan(staged, tp=4, divisions=LLAMA_DIVISIONS)
    for allowed, sizes in ((8, (2, 2, 2)), (4, (2, 1, 2)), (2, (2, 1, 1))):
        mesh = shrink_mesh(plan.decision, plan.job.cluster, allowed)
        assert (mesh.ranks, mesh.copies, mesh.tensor_ranks) == sizes


def test_of_tokens_on_their_way_to_experts_only_the_calls_are_compared() -> None:
    plan = parallel_plan(make_plan(world=2, engine="fsdp2", shard=2), ep=2, expert_modules=MIXTRAL_EXPERTS)
    call = Collective(kind="all_to_all", axis="ep", group_size=2, bytes=64, count=2, purpose="activations")

    def passed(*found: tuple[int, int]) -> list[bool]:
        calls = [["all_to_all", [0, 1], size, count] for size, count in found]
        findings = [{"collectives": calls, "unseen_collectives": 0}] * 2
        return [check.passed for check in compare_collectives("run", processes(plan), [[call]] * 2, findings)]

    assert passed((48, 1), (80, 1)) == [True]
    assert passed((64, 2)) == [True]
    assert passed((64, 3)) == [False]
    assert passed((64, 1)) == [False]
