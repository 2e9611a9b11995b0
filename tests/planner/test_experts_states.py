"""States of experts that several processes share: worked out by hand, and against what running processes count."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from support.launch import results_of

from planner.pipeline_points import pipe
from planner.pipeline_points import point as pipeline_point
from planner.profiles import cpu_cluster, cuttable, job, toy
from planner.test_memory import PLAIN
from shardwright.planner import at_rest_bytes, step_collectives
from shardwright.planner.divided import divided
from shardwright.planner.exchanges import Around
from shardwright.planner.groups import Groups
from shardwright.planner.memory import MemoryModel
from shardwright.planner.parallel import Parallel
from shardwright.planner.parts import parts_of
from shardwright.planner.pipelines.prediction import Pipelines
from shardwright.planner.space import Point, decide
from shardwright.planner.timing import TimeModel
from shardwright.schemas.job import JobSpec, TrainSpec
from shardwright.schemas.plan import Collective
from shardwright.schemas.profile import ExpertLayer, ModelProfile, Parameter

TWO = Parallel(ep=2)
ADAMW = TrainSpec.model_validate({"global_batch": 4, "steps": 1, "optimizer": {"name": "adamw"}})
AROUND = Around(links={"ep": ((cpu_cluster(2).levels[0], 2),)})


def with_experts(profile: ModelProfile, local: int = 3) -> ModelProfile:
    """So many local experts of 5 x 10 in every block but the first, behind its 10 x 10 others."""
    made: list[Parameter] = []
    for each in profile.parameters:
        made.append(each)
        path = each.name.removesuffix(".weight")
        if path in profile.block_paths[1:]:
            made.append(replace(each, name=f"{path}.experts.stack", shape=(local, 5, 10), experts=local))
    return replace(profile, parameters=tuple(made))


def fsdp2(shard: int = 4, world: int = 4, **changes: Any) -> Point:
    usual = {"engine": "fsdp2", "world": world, "shard": shard, "optimizer_degree": shard, "gradient_degree": shard}
    return replace(PLAIN, **{**usual, "kept": False, "parallel": TWO, **changes})  # type: ignore[arg-type]


def amsp(axes: tuple[int, ...], degrees: tuple[int, int, int], **changes: Any) -> Point:
    parameters, gradients, optimizer = degrees
    usual: dict[str, Any] = {"shard": parameters, "gradient_degree": gradients, "optimizer_degree": optimizer}
    world = 1
    for size in axes:
        world *= size
    return fsdp2(**{"engine": "amsp", "world": world, "axes": axes, **usual, **changes})


def calls(found: tuple[Collective, ...], *purposes: str) -> dict[tuple[str, str, int, int], int]:
    return {
        (each.kind, each.axis, each.group_size, each.bytes): each.count for each in found if each.purpose in purposes
    }


def spec(point: Point) -> JobSpec:
    batch = point.micro_batch * point.accumulation * point.copies
    return job(cpu_cluster(point.world), batch=batch, sequence=16)


def phases(point: Point, profile: ModelProfile) -> dict[str, dict[str, int]]:
    found = MemoryModel(spec(point), profile, Groups(profile), AROUND).phases(point)
    return {phase.name: phase.bytes for phase in found}


# --- the parts --------------------------------------------------------------------------------------------------------


def test_the_experts_part_of_a_point() -> None:
    dense, experts = parts_of(amsp((2, 2, 2), (4, 2, 8)))
    assert (dense.point.axes, dense.point.shard, dense.inner, dense.first_axis) == ((2, 2, 2), 4, 1, 0)
    assert (experts.point.axes, experts.inner, experts.first_axis, experts.point.world) == ((2, 2), 2, 1, 4)
    assert (experts.point.shard, experts.point.gradient_degree, experts.point.optimizer_degree) == (2, 1, 4)
    assert [experts.axis(axis) for axis in range(2)] == ["dp_2", "dp_3"]
    assert [experts.rank(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [part.name for part in parts_of(replace(fsdp2(), parallel=Parallel(tp=2, cp=2)))] == ["all"]


@pytest.mark.parametrize(
    "point",
    [fsdp2(6, 12, parallel=Parallel(ep=4)), amsp((4, 2), (1, 1, 4)), amsp((2, 3), (1, 1, 6), parallel=Parallel(ep=3))],
)
def test_what_does_not_divide_is_an_error(point: Point) -> None:
    with pytest.raises(ValueError, match="share experts"):
        parts_of(point)


# --- fsdp2 by hand ----------------------------------------------------------------------------------------------------


def test_fsdp2_at_rest_and_on_the_wire_by_hand() -> None:
    """Four processes. Dense: 640 of 64 x 10 over 4 are 160, twice, and three blocks of 10 x 10, of which 3 rows each.
    Experts: 3 x 5 x 10 over 2 are 2 x 50, twice; the second process of these has one row of them."""
    profile = with_experts(toy(blocks=3))
    groups, point = Groups(profile), fsdp2(accumulation=2)
    decision = decide(point, cpu_cluster(4), 3)
    dense, experts = 4 * (2 * 160 + 3 * 30), 4 * (2 * 100)
    first = at_rest_bytes(decision, groups, ADAMW, 0)
    last = at_rest_bytes(decision, groups, ADAMW, 3)
    assert first["parameters"] == first["gradients"] == dense + experts == last["parameters"]
    assert first["optimizer_states"] == 2 * (dense + experts) + 7 * 4
    # Of 10 rows over 4 the last has 1, and of 3 over 2 the second one.
    assert last["optimizer_states"] == 2 * 4 * (2 * 160 + 3 * 10 + 2 * 50) + 7 * 4
    found = step_collectives(point, groups)
    assert calls(found, "parameters") == {
        ("all_gather", "dp_shard", 4, 4 * 120): 2 * 3 * 2,
        ("all_gather", "dp_shard", 4, 4 * 1280): 2,
        ("all_gather", "expert_shard", 2, 4 * 200): 2 * 2 * 2,
    }
    assert calls(found, "gradients") == {
        ("reduce_scatter", "dp_shard", 4, 4 * 120): 3 * 2,
        ("reduce_scatter", "dp_shard", 4, 4 * 1280): 2,
        ("reduce_scatter", "expert_shard", 2, 4 * 200): 2 * 2,
    }
    assert calls(found, "grad_norm") == {("all_reduce", "world", 4, 4): 1}


def test_fsdp2_with_copies_by_hand() -> None:
    """Eight processes, states over two of them: experts whole on each, and four copies of them."""
    profile = with_experts(toy(blocks=3))
    point = fsdp2(2, 8)
    found = step_collectives(point, Groups(profile))
    assert calls(found, "gradients") == {
        ("reduce_scatter", "dp_shard", 2, 4 * 100): 3,
        ("reduce_scatter", "dp_shard", 2, 4 * 1280): 1,
        ("all_reduce", "dp_replicate", 4, 4 * 50): 3,
        ("all_reduce", "dp_replicate", 4, 4 * 640): 1,
        ("all_reduce", "expert_replicate", 4, 4 * 150): 2,
    }
    held = at_rest_bytes(decide(point, cpu_cluster(8), 3), Groups(profile), ADAMW, 5)
    assert held["parameters"] == 4 * (640 + 3 * 50 + 2 * 150)


def test_fsdp2_gathers_experts_beside_their_block() -> None:
    """In bf16 a block of 12 x 10 and its experts of 4 x 50, each with its buffer; the root of 1280 all the time."""
    profile = with_experts(toy(blocks=3))
    point = fsdp2(precision="bf16_mixed", micro_batch=1)
    found = phases(point, profile)
    assert found["block gather"]["gathered_parameters"] == 2 * (1280 + 2 * 120 + 2 * 200)
    assert found["block forward"]["gathered_parameters"] == 2 * (1280 + 2 * 120 + 2 * 200)
    # In backward the experts' buffer has gone, and the block before it is on its way.
    assert found["block backward"]["gathered_parameters"] == 2 * (1280 + 2 * 120 + 200)
    rest = MemoryModel(spec(point), profile, Groups(profile), AROUND).prediction(point).at_rest
    assert found["block forward"]["parameters"] == rest["parameters"]
    assert found["optimizer step"]["gradients"] == rest["gradients"]
    assert found["block forward"]["optimizer_states"] == rest["optimizer_states"]


# --- amsp by hand -----------------------------------------------------------------------------------------------------


def test_amsp_at_rest_and_on_the_wire_by_hand() -> None:
    """Eight processes on three axes of two, of which the first shares the experts: of these 3 x 5 x 10 are padded to
    160, a multiple of 8 x 4; the others' 100 to 128, a multiple of 8 x 8, and the root's 1280 are one."""
    profile = with_experts(toy(blocks=3))
    point = amsp((2, 2, 2), (4, 2, 8), precision="bf16_mixed", accumulation=2)
    groups = Groups(profile)
    held = at_rest_bytes(decide(point, cpu_cluster(8), 3), groups, ADAMW, 0)
    dense, experts = 3 * 128 + 1280, 2 * 160
    assert held["parameters"] == 2 * (dense // 4 + experts // 2)
    assert held["gradients"] == 4 * (dense // 8 + experts // 4)
    # Masters of all, moments of what is no padding: all that the first process has is none.
    assert held["optimizer_states"] == 3 * held["gradients"] + 4 * (3 + 1 + 2)
    last = at_rest_bytes(decide(point, cpu_cluster(8), 3), groups, ADAMW, 7)
    # Its 16 of each block's 128 are padding, all of the root's 160 are not, nor 30 of its 40 of the experts'.
    assert last["optimizer_states"] - 4 * (dense // 8 + experts // 4) == 2 * 4 * (160 + 2 * 30) + 4 * (1 + 2)
    found = step_collectives(point, groups)
    experts_only = {key: count for key, count in calls(found, "parameters", "gradients").items() if key[1] == "dp_3"}
    assert experts_only == {
        # Gradients of experts on to the optimizer, those of the others too, and the new values back.
        ("reduce_scatter", "dp_3", 2, 4 * 80): 2,
        ("reduce_scatter", "dp_3", 2, 4 * 32): 3,
        ("reduce_scatter", "dp_3", 2, 4 * 320): 1,
        ("all_gather", "dp_3", 2, 2 * 80): 2,
        ("all_gather", "dp_3", 2, 2 * 32): 3,
        ("all_gather", "dp_3", 2, 2 * 320): 1,
    }
    assert calls(found, "parameters")["all_gather", "dp_2", 2, 2 * 160] == 2 * 2 * 2  # forward and backward, twice
    # The experts' gradients accumulate whole, so that they are reduced over dp_2 once.
    assert calls(found, "gradients")["reduce_scatter", "dp_2", 2, 4 * 160] == 2
    assert not any(key[3] in (2 * 160, 4 * 160) for key in calls(found, "parameters", "gradients") if key[1] == "dp_1")
    assert calls(found, "grad_norm") == {("all_reduce", "world", 8, 4): 1}


def test_whole_experts_are_never_gathered() -> None:
    """Parameters over two processes that share experts: each has its own whole, and the optimizer states too."""
    profile = with_experts(toy(blocks=3))
    point = amsp((2, 2), (2, 2, 2))
    found = step_collectives(point, Groups(profile))
    assert ("all_gather", "dp_2", 2, 4 * 152) not in calls(found, "parameters")
    assert calls(found, "gradients")["all_reduce", "dp_2", 2, 4 * 152] == 2
    every, bare = phases(point, profile), phases(point, toy(blocks=3))
    for name in ("block forward", "block backward", "backward gather", "head and loss", "embedding backward"):
        assert every[name]["gathered_parameters"] == bare[name]["gathered_parameters"], name
    assert every["block forward"]["parameters"] - bare["block forward"]["parameters"] == 4 * 2 * 152


LAYOUTS = [
    amsp((2, 2), (4, 4, 4)),
    amsp((2, 2), (1, 1, 4), kept=None),
    amsp((2, 2, 2), (4, 2, 8), precision="bf16_mixed"),
    amsp((2, 2, 2), (8, 1, 8), kept=True),
    amsp((4,), (4, 1, 4), parallel=Parallel(ep=4)),
    fsdp2(),
    fsdp2(2, 8, precision="bf16_mixed"),
    fsdp2(8, 8, kept=True),
    fsdp2(4, 8, gradient_degree=1),
]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("point", LAYOUTS)
def test_bounds_hold_and_every_phase_holds_what_rests(point: Point, accumulation: int) -> None:
    point = replace(point, accumulation=accumulation)
    profile = with_experts(toy(blocks=5))
    memory = MemoryModel(spec(point), profile, Groups(profile), AROUND)
    peak, rest = memory.peak(point).total, memory.prediction(point).at_rest
    assert memory.at_rest_floor(point) <= peak
    assert sum(rest[state] for state in ("parameters", "optimizer_states")) < peak
    assert all(phase.bytes["parameters"] == rest["parameters"] for phase in memory.phases(point)[1:])
    time = TimeModel(spec(point), profile, Groups(profile), AROUND)
    step = time.step(point)
    assert 0 < time.least(point) <= step.seconds
    # Experts in fewer processes than the others take longer to reduce than were they not there.
    bare = TimeModel(spec(point), toy(blocks=5), Groups(toy(blocks=5)), AROUND).step(point)
    assert step.seconds > bare.seconds


# --- pipelines --------------------------------------------------------------------------------------------------------


def staged(**changes: Any) -> Point:
    usual: dict[str, Any] = {"world": 8, "axes": (2, 2), "shard": 4, "optimizer_degree": 4, "gradient_degree": 4}
    return replace(pipeline_point(pipe(), **{**usual, "kept": False, **changes}), parallel=TWO)


@pytest.mark.parametrize(
    "point",
    [
        staged(),
        staged(shard=2, optimizer_degree=2, gradient_degree=1),
        staged(gradient_degree=1, precision="bf16_mixed"),
    ],
)
def test_stages_hold_their_experts(point: Point) -> None:
    """Four blocks on two stages: the first has one block with experts, the second two."""
    profile = cuttable(with_experts(toy()))
    model = Pipelines(spec(point), profile, Groups(profile), AROUND)
    element = 4 if point.precision == "fp32" else 2
    degree, own = point.shard // 2, max(1, point.optimizer_degree // 2)
    padded = -(-150 // (8 * own)) * 8 * own
    bare = cuttable(toy())
    without = Pipelines(spec(point), bare, Groups(bare), AROUND)
    for rank, blocks in enumerate((1, 2)):
        more = model.memory.at_rest(point, rank).parameters - without.memory.at_rest(point, rank).parameters
        assert more == element * blocks * padded // degree
        rests = at_rest_bytes(decide(point, cpu_cluster(8), 4), Groups(profile), spec(point).train, 4 * rank)
        assert rests["parameters"] == model.memory.at_rest(point, rank).parameters
        named = calls(model.collectives(point, rank), "gradients")
        shrunk = {key: count for key, count in named.items() if key[1] == "dp_2" and key[3] == 4 * padded}
        assert sum(shrunk.values()) == blocks * (4 if point.gradient_degree > 2 else 1)
        assert model.memory.peaks(point)[rank].total >= without.memory.peaks(point)[rank].total + more
        allocated = model.memory.room(point, rank)
        assert allocated < without.memory.room(point, rank)
    assert model.memory.at_rest_floor(point) <= model.memory.peak(point).total
    assert model.time.least(point) <= model.time.step(point).seconds
    assert model.time.step(point).seconds > without.time.step(point).seconds


# --- against running processes ----------------------------------------------------------------------------------------

WORLD, SEQUENCES, LENGTH, WIDTH, CHOSEN = 4, 2, 6, 6, 2


def run(name: str, engine: str, ep: int, **changes: Any) -> dict[str, Any]:
    usual = {"experts": 6, "precision": "fp32", "accumulation": 1, "kept": False, "checkpointed": 0, "frozen": False}
    found = {"name": name, "engine": engine, "ep": ep, **usual, **changes}
    if engine == "fsdp2":
        found.setdefault("gradient_degree", found["shard"])
    return found


RUNS = [
    run("fsdp2", "fsdp2", 2, shard=4, accumulation=2),
    run("fsdp2 in bf16", "fsdp2", 2, shard=4, precision="bf16_mixed", frozen=True),
    run("fsdp2 recomputed", "fsdp2", 2, shard=4, checkpointed=2),
    run("fsdp2 kept", "fsdp2", 2, shard=4, kept=True, accumulation=3),
    run("fsdp2 with copies", "fsdp2", 2, shard=2, accumulation=2, frozen=True),
    run("fsdp2, whole gradients", "fsdp2", 2, shard=4, gradient_degree=1, accumulation=2),
    run("fsdp2, experts on all", "fsdp2", 4, shard=4, experts=4, precision="bf16_mixed", accumulation=2),
    run("amsp", "amsp", 2, axes=(2, 2), degrees=(4, 4, 4), accumulation=2),
    run("amsp in bf16", "amsp", 2, axes=(2, 2), degrees=(2, 1, 4), precision="bf16_mixed", accumulation=2, frozen=True),
    run("amsp recomputed", "amsp", 2, axes=(2, 2), degrees=(4, 2, 4), checkpointed=2),
    run("amsp kept", "amsp", 2, axes=(2, 2), degrees=(4, 4, 4), kept=True, accumulation=2),
    run("amsp, experts whole", "amsp", 2, axes=(2, 2), degrees=(2, 2, 2), accumulation=3),
    run("amsp, experts on all", "amsp", 4, axes=(4,), degrees=(4, 4, 4), experts=4),
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank counted."""
    folder = tmp_path_factory.mktemp("experts")
    return results_of([(WORLD, RUNS)], folder, "torch", "experts_states_worker")[0]  # type: ignore[return-value]


def planned(case: dict[str, Any], parameters: list[dict[str, Any]]) -> tuple[Point, Groups]:
    """The point of a run, and the groups of what one of its processes has."""
    usual: dict[str, Any] = {"parallel": Parallel(ep=case["ep"]), "micro_batch": SEQUENCES}
    usual |= {name: case[name] for name in ("precision", "accumulation", "kept", "checkpointed")}
    if case["engine"] == "fsdp2":
        point = fsdp2(case["shard"], WORLD, gradient_degree=case["gradient_degree"], **usual)
    else:
        point = amsp(tuple(case["axes"]), tuple(case["degrees"]), **usual)
    made = tuple(
        Parameter(
            name=each["name"],
            shape=tuple(each["shape"]),
            trainable=each["trainable"],
            unit=-1,
            experts=case["experts"] if ".experts." in each["name"] else 0,
        )
        for each in parameters
    )
    layers = tuple(
        ExpertLayer(path=f"blocks.{index}.experts", experts=case["experts"], chosen=CHOSEN, features=WIDTH)
        for index in range(3)
    )
    whole = replace(toy(blocks=3), parameters=made, expert_layers=layers, sequence_length=LENGTH)
    _, profile = divided(job(cpu_cluster(WORLD), batch=16, sequence=LENGTH), whole, point.parallel)
    return point, Groups(profile)


def ranks_of(point: Point, axis: str, rank: int) -> tuple[int, ...]:
    """The processes of a group: neighbours but for those inside of its axis, which differ in nothing else."""
    experts = parts_of(point)[1]
    inner, size = {
        "world": (1, WORLD),
        "ep": (1, point.parallel.ep),
        "dp_shard": (1, point.shard),
        "dp_replicate": (point.shard, point.replicas),
        "expert_shard": (point.parallel.ep, experts.point.shard),
        "expert_replicate": (point.parallel.ep * experts.point.shard, experts.point.replicas),
        "dp_1": (1, point.axes[0] if point.axes else 1),
        "dp_2": (2, 2),
    }[axis]
    first = rank // (inner * size) * inner * size + rank % inner
    return tuple(first + index * inner for index in range(size))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("case", RUNS, ids=[each["name"] for each in RUNS])
def test_bytes_at_rest_are_those_of_processes(case: dict[str, Any], counted: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(counted):
        point, groups = planned(case, found[case["name"]]["parameters"])
        decision = decide(point, cpu_cluster(WORLD), 3)
        assert found[case["name"]]["at_rest"] == at_rest_bytes(decision, groups, ADAMW, rank), rank


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("case", RUNS, ids=[each["name"] for each in RUNS])
def test_collectives_are_those_of_processes(case: dict[str, Any], counted: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(counted):
        point, groups = planned(case, found[case["name"]]["parameters"])
        expected: Counter[tuple[str, tuple[int, ...], int]] = Counter()
        for each in step_collectives(point, groups):
            if each.purpose != "metrics":
                expected[each.kind, ranks_of(point, each.axis, rank), each.bytes] += each.count
        rows = found[case["name"]]["collectives"]
        assert {(kind, tuple(ranks), size): count for kind, ranks, size, count in rows} == expected
