from dataclasses import replace

import pytest
from planner.pipeline_points import pipe, pipe_of_family, point
from planner.profiles import cpu_cluster, gpu_cluster, job, llama, toy

from shardwright.planner.at_rest import at_rest_bytes
from shardwright.planner.flat import Chain
from shardwright.planner.pipelines.buffers import Gradients, UnitSizes
from shardwright.planner.pipelines.memory import PipelineMemory
from shardwright.planner.pipelines.prediction import Pipelines
from shardwright.planner.predict import Predictor
from shardwright.planner.schedules.lowering import Step
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.space import Point, decide
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ModelProfile

FAMILIES = ("gpipe", "1f1b", "zb-h1", "zb-h2", "zb-1p", "zeropp", "zb-auto")


def a_job(processes: int = 2) -> JobSpec:
    return job(cpu_cluster(processes), batch=16, sequence=16)


def pipelines(profile: ModelProfile, processes: int = 2) -> Pipelines:
    return Predictor(a_job(processes), profile).pipelines


def saved(memory: PipelineMemory, where: Point, rank: int) -> int:
    return max(phase.bytes.get("saved_activations", 0) for phase in memory.phases(where, rank))


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_what_the_simulator_counts(name: str) -> None:
    made = pipelines(toy())
    where = point(pipe(schedule=name), accumulation=6)
    peaks = made.schedules.made(where).simulation.peak_memory
    assert [saved(made.memory, where, rank) for rank in (0, 1)] == list(peaks)


def test_what_a_late_step_keeps_by_hand() -> None:
    made = pipelines(toy())
    waits, late = point(pipe()), point(pipe(late_step=True))
    before, after = ({phase.name: phase for phase in made.memory.phases(where, 0)} for where in (waits, late))
    # Values, two moments and a counter for each of three flat parameters; the gradients are padded.
    numel, kept = 640 + 2 * 104, 12 * (640 + 2 * 100) + 3 * 4
    assert made.memory.kept(late)[0] == kept + 4 * numel
    assert made.memory.kept(waits) == (0, 0)
    # Two forwards come before the first backward, the second one with as much in flight as any.
    head = after["forward"]
    assert head.bytes["optimizer_states"] == before["forward"].bytes["optimizer_states"] + kept
    assert head.bytes["gradients"] == 4 * numel
    assert head.bytes["saved_activations"] == 2 * 4020
    assert after["backward"] == before["backward"]
    assert after["optimizer step"].total == before["optimizer step"].total + kept
    assert made.memory.room(late, 0) <= made.memory.room(waits, 0)
    unclipped = Predictor(
        job(cpu_cluster(2), batch=16, sequence=16, train={"optimizer": {"lr": 1e-3, "clip_grad_norm": None}}), toy()
    ).pipelines.memory
    assert unclipped.kept(late) == (0, 0)


def test_the_peak_of_1f1b_by_hand() -> None:
    made = pipelines(toy())
    where = point(pipe())
    phases = {phase.name: phase for phase in made.memory.phases(where, 0)}
    # The embedding and two blocks; AdamW. Everything is padded to 8 elements.
    numel = 640 + 2 * 104
    forward = phases["forward"].bytes
    assert forward["parameters"] == 4 * numel
    assert forward["optimizer_states"] == 8 * (640 + 2 * 100) + 3 * 4
    assert forward["inputs"] == 4 * 2 * 16 * 16
    # Two micro-batches are in flight: 20 of the embedding and 2000 of each block. A block's forward takes 2000 and its
    # input 200, at the last block all but the 2000 that it will keep.
    assert forward["saved_activations"] == 2 * 4020
    assert forward["activation_temporaries"] == 200
    # Gradients of the one before are there as whole buffers, its own received and sent messages of 200 each.
    assert phases["backward"].bytes["gradients"] == 4 * numel
    assert phases["optimizer step"].bytes["gradients"] == 4 * numel
    assert "gathered_parameters" not in forward


def test_recomputation_trades_what_is_kept_for_what_backward_needs() -> None:
    made = pipelines(toy())
    plain, again = point(pipe()), point(pipe(checkpointed=(2, 0)))
    one, other = ({phase.name: phase for phase in made.memory.phases(where, 0)}["backward"] for where in (plain, again))
    assert one.bytes["saved_activations"] - other.bytes["saved_activations"] == 2 * 2 * (2000 - 200)
    # A block's backward recomputes 2000 bytes a block, one block at a time.
    assert other.bytes["activation_temporaries"] - one.bytes["activation_temporaries"] == 2000
    assert other.recomputes
    assert not one.recomputes


@pytest.mark.parametrize("degrees", [(1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 4), (4, 4, 4)])
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
@pytest.mark.parametrize("tied", [False, True])
def test_states_at_rest_are_those_of_all_parameters_of_the_stages(
    degrees: tuple[int, int, int], precision: str, tied: bool
) -> None:
    p, g, o = degrees
    profile = llama(layers=4, hidden=64, heads=4, kv_heads=2, ffn=96, vocabulary=100, sequence=16, tied=tied)
    predictor = Predictor(a_job(8), profile)
    axes = (2, 2) if p not in (1, 4) or o == 2 else (4,)
    where = point(
        pipe(),
        world=8,
        axes=axes,
        shard=p,
        gradient_degree=g,
        optimizer_degree=o,
        precision=precision,
        accumulation=2,
        micro_batch=1,
    )
    decision = decide(where, predictor.job.cluster, 4)
    held = [at_rest_bytes(decision, predictor.groups, predictor.job.train, rank) for rank in range(8)]

    def count(names: set[str]) -> int:
        """Elements of a unit, padded."""
        numel = sum(each.numel for each in profile.parameters if each.name in names)
        return -(-numel // (8 * o)) * 8 * o

    def block(index: int) -> set[str]:
        return {each.name for each in profile.parameters if each.name.startswith(f"model.layers.{index}.")}

    head = {"model.norm.weight"} if tied else {"model.norm.weight", "lm_head.weight"}
    embedding = {"model.embed_tokens.weight"}
    units = [[block(0), block(1), embedding], [block(2), block(3), head, *([embedding] if tied else [])]]
    element = 4 if precision == "fp32" else 2
    for rank, bytes_ in enumerate(held):
        padded = sum(count(unit) for unit in units[rank // 4])
        assert bytes_["parameters"] == element * padded // p
        assert bytes_["gradients"] <= 4 * padded // o
    for rank in (0, 1):
        # Over one copy of the states AdamW's moments are those of all parameters, each once.
        names = {name for unit in units[rank] for name in unit}
        numel = sum(each.numel for each in profile.parameters if each.name in names)
        padded = sum(count(unit) for unit in units[rank])
        master = 0 if element == 4 else 4 * padded
        moments = sum(bytes_["optimizer_states"] for bytes_ in held[4 * rank : 4 * rank + o])
        steps = moments - 8 * numel - master
        assert 0 <= steps <= 4 * o * 2 * len(units[rank])
        at = predictor.pipelines.memory.at_rest(where, rank)
        assert held[4 * rank]["parameters"] == at.parameters
        assert held[4 * rank]["gradients"] == at.gradients


def test_gradients_wait_whole_or_sharded() -> None:
    sizes = UnitSizes([(0,), (0,)], [], 4)
    sizes.trained, sizes.gradients = [16, 32], [64, 128]
    layout = Chain.of((2, 2), 1, 2, 4)
    program = tuple(Step("REDUCE", 0, micro_batch) for micro_batch in range(2))
    gradients = Gradients(sizes, layout, (), program)
    assert gradients.fresh(0)
    gradients.make(0)
    assert (gradients.bytes, gradients.sending) == (192, 0)
    # The first hop reads a whole buffer and writes half of it; the second unit's begins when the first one's has ended.
    assert gradients.reduce(0) == max(128 + 96, 32 + 192)
    assert (gradients.bytes, gradients.sending) == (32, 192)
    assert gradients.fresh(0)
    gradients.make(0)
    # The last time on to level o: the first unit's second hop holds half and a quarter.
    gradients.reduce(0)
    assert gradients.sending == 64 // 2 + 64 // 4 + 128 + 64


def test_sharded_gradients_take_less_while_they_wait() -> None:
    profile = llama(layers=8)
    predictor = Predictor(job(gpu_cluster(2), batch=64), profile)
    memory = predictor.pipelines.memory
    wide: dict[str, object] = {"world": 16, "axes": (4,), "micro_batch": 1, "accumulation": 16}
    of = pipe(ranks=4, cuts=(2, 4, 6), checkpointed=(0,) * 4)
    whole = point(of, **wide, optimizer_degree=4, precision="bf16_mixed")
    sharded = replace(whole, gradient_degree=4)
    gathered = replace(sharded, shard=4)
    forward = [
        {phase.name: phase.bytes for phase in memory.phases(each, 0)}["forward"] for each in (whole, sharded, gathered)
    ]
    assert forward[1]["gradients"] * 4 == forward[0]["gradients"]
    assert forward[2]["parameters"] * 4 == forward[1]["parameters"] == forward[2]["gathered_parameters"]


def test_the_room_by_hand() -> None:
    predictor = Predictor(a_job(), toy())
    memory = predictor.pipelines.memory
    where = point(pipe())
    parameters, states = 4 * (640 + 2 * 104), 8 * (640 + 2 * 100) + 3 * 4
    batches, messages = 4 * 2 * 16 * 16, (2 + 4) * 200
    # Backward of a block: its 100 bytes, the gradient of what it makes and of its 100 parameters.
    needs = 100 + 200 + 4 * 100
    allocated = int(predictor.device_budget / (memory.reserved(10**9) / 10**9))
    room = memory.room(where, 0)
    assert room == pytest.approx(allocated - 2 * parameters - states - batches - messages - needs, abs=64)
    cut = replace(where, pipe=pipe(schedule="zb-h1"))
    # Blocks have let go of nothing when the embedding's backward makes the gradient of its 640 parameters; what its own
    # W is to find, 20, is there by then.
    assert memory.room(cut, 0) == room + needs - (100 + 200 + 20 + 4 * 640)


def room_holds(predictor: Predictor, where: Point) -> None:
    made, of = predictor.pipelines, where.pipe
    assert of is not None
    limits = tuple(made.memory.room(where, rank) for rank in range(of.ranks))
    assert min(limits) > 0
    bounded = replace(where, pipe=replace(of, activation_limits=limits))
    peaks = [made.memory.reserved(phase.total) for phase in made.memory.peaks(bounded)]
    assert max(peaks) <= predictor.device_budget


@pytest.mark.parametrize("degree", [1, 4])
@pytest.mark.parametrize("recomputed", [0, 2])
def test_a_schedule_within_the_room_fits(degree: int, recomputed: int) -> None:
    predictor = Predictor(job(gpu_cluster(2), batch=64), llama(layers=8))
    of = pipe(ranks=4, schedule="zb-auto", cuts=(2, 4, 6), checkpointed=(recomputed,) * 4)
    wide: dict[str, object] = {"world": 16, "axes": (4,), "micro_batch": 1, "accumulation": 16}
    room_holds(
        predictor,
        point(of, **wide, shard=degree, gradient_degree=degree, optimizer_degree=4, precision="bf16_mixed"),
    )


def test_every_family_is_predicted() -> None:
    made = pipelines(toy(blocks=8))
    for name in SCHEDULES:
        of = pipe_of_family(name)
        where = point(of, accumulation=8)
        if name == "zb-auto":
            where = replace(where, pipe=replace(of, placement="wave"))
        memory = made.memory.prediction(where)
        assert len(memory.stages) == 2
        assert memory.peak_allocated_bytes == max(stage.peak_allocated_bytes for stage in memory.stages)
        assert made.memory.at_rest_floor(where) <= made.memory.peak(where).total
