"""Plans with pipeline stages: how they are shrunk, that they hold when they are run, and that faults in them are found.

One launch for all faults of a plan, and one rehearsal as the command line does it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from rehearse.samples import cluster, decision, plan_for
from shardwright.passes import profile_model
from shardwright.planner import evaluate, make_plan, needed_dtypes
from shardwright.planner.edited import checked_point
from shardwright.planner.pipelines.costs import pipe_of
from shardwright.planner.predict import Predictor
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.text import from_text
from shardwright.planner.schedules.timetable import Layout
from shardwright.planner.space import block_count
from shardwright.rehearse import rehearse
from shardwright.rehearse.collectives import Call, CollectiveLog
from shardwright.rehearse.compare_layout import Processes, compare_actions, compare_collectives
from shardwright.rehearse.launch import Failure, run
from shardwright.rehearse.rehearsal import compile_trial, profile_small
from shardwright.rehearse.report_types import Check
from shardwright.rehearse.shrink import SmallJob, pinned, shrink, with_stages
from shardwright.rehearse.shrink_mesh import shrink_mesh
from shardwright.rehearse.shrink_pipeline import nearest, resized, shrink_pipeline
from shardwright.rehearse.trials import trials
from shardwright.rehearse.verdict import check_pair
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.job import OptimizerSpec
from shardwright.schemas.plan import Collective, Decision, Plan
from shardwright.schemas.profile import ModelProfile
from shardwright.schemas.source import load_job

SGD = OptimizerSpec(name="sgd")
MODEL = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Skipping(nn.Module):
    # Each block of the second half also gets what its counterpart in the first one made, as in a U-Net.
    def __init__(self, layers, width):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x, made = self.embed(ids), []
        for number, block in enumerate(self.blocks):
            other = len(self.blocks) - 1 - number
            x = block(x + 0.5 * made[other] if other < number else x)
            made.append(x)
        return self.head(self.norm(x))


def build(layers=6, width=16):
    return Skipping(layers, width)
"""
JOB = """
model: {factory: skipping:build, args: {layers: 6}}
data: {synthetic: {vocabulary: 50}}
train:
  sequence_length: 32
  global_batch: 64
  steps: 100
  optimizer: {name: adamw, lr: 1e-3, clip_grad_norm: 1.0}
cluster: {devices: 8 x cpu}
"""


def planned(folder: Path, *strategy: str) -> tuple[Plan, ModelProfile]:
    """A plan with the pins of a strategy, and the profile that it was made from."""
    (folder / "skipping.py").write_text(MODEL)
    (folder / "job.yaml").write_text(JOB)
    loaded = load_job(folder / "job.yaml", [f"strategy.{pin}" for pin in strategy])
    profile = profile_model(loaded.job, folder, needed_dtypes(loaded.job))
    plan = make_plan(loaded.job, profile, job_file="job.yaml", defaults=loaded.defaults)
    assert isinstance(plan, Plan)
    return plan, profile


def edited(plan: Plan, profile: ModelProfile, *, recomputed: int | None = None, **pipeline: Any) -> Plan:
    """The plan as a person changed its pipeline."""
    decision = plan.decision
    changed = decision.pipeline.model_copy(update=pipeline)
    checkpointing = decision.checkpointing.model_copy(update={"policy": "full", "blocks": sum(changed.checkpointed)})
    if not sum(changed.checkpointed):
        checkpointing = checkpointing.model_copy(update={"policy": "none"})
    decision = decision.model_copy(update={"pipeline": changed, "checkpointing": checkpointing})
    return evaluate(plan.model_copy(update={"decision": decision}), profile)


def failing(checks: tuple[Check, ...] | list[Check]) -> dict[str, str]:
    return {check.name: check.found for check in checks if not check.passed}


ZERO_1 = ("pp=4", "schedule=zb-h1", "precision=fp32", "micro_batch=4", "states.optimizer_states=2")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, ModelProfile]:
    """A folder with a plan of four ranks, each with two copies."""
    folder = tmp_path_factory.mktemp("pipeline")
    return folder, *planned(folder, *ZERO_1)


_profiles: dict[str, ModelProfile] = {}


def profile_of(small: SmallJob, folder: Path) -> ModelProfile:
    """Of the shrunk model; jobs that differ in nothing else share it."""
    key = small.job.model_copy(update={"cluster": EIGHT}).model_dump_json()
    if key not in _profiles:
        _profiles[key] = profile_model(small.job, folder, ("fp32",))
    return _profiles[key]


# --- shrinking ------------------------------------------------------------------------------------------------------

EIGHT = cluster(("node", 8), ("rail", 8))


def piped(ranks: int, *axes: tuple[str, int], family: str = "1f1b", chunks: int = 1, **changes: Any) -> Decision:
    """A decision with pipeline stages; `cuts` and `checkpointed` follow from one block a stage unless given."""
    stages, schedule = ranks * chunks, SCHEDULES[family]
    of = changes.pop("of", stages)
    pipeline = {
        "ranks": ranks,
        "chunks": chunks,
        "placement": schedule.placement if chunks > 1 else "loop",
        "schedule": family,
        "cuts": changes.pop("cuts", tuple(range(1, stages))),
        "checkpointed": changes.pop("checkpointed", (0,) * stages),
    }
    states = {"parameters": 1, "gradients": 1, "accumulation": 8} | changes
    return decision(("pp", ranks), *axes, engine="amsp", pipeline=pipeline, of=of, reshard=None, **states)


@pytest.mark.parametrize(
    ("ranks", "axes", "processes", "sizes"),
    [
        (8, (("dp_1", 8),), 8, {"pp": 4, "dp_1": 2}),
        (8, (("dp_1", 8),), 4, {"pp": 2, "dp_1": 2}),
        (8, (("dp_1", 8),), 3, {"pp": 3, "dp_1": 1}),
        (8, (("dp_1", 8),), 2, {"pp": 2, "dp_1": 1}),
        (64, (), 8, {"pp": 4}),
        (3, (), 8, {"pp": 3}),
        (2, (("dp_2", 8), ("dp_1", 4)), 8, {"pp": 2, "dp_2": 2, "dp_1": 2}),
        (16, (("dp_2", 2), ("dp_1", 2)), 8, {"pp": 2, "dp_2": 2, "dp_1": 2}),
        (2, (("dp_1", 32),), 8, {"pp": 2, "dp_1": 4}),
    ],
)
def test_stages_keep_an_axis(
    ranks: int, axes: tuple[tuple[str, int], ...], processes: int, sizes: dict[str, int]
) -> None:
    devices = ranks * prod(size for _, size in axes)
    on = cluster(("node", min(devices, 8)), *([("rail", devices // 8)] if devices > 8 else []))
    small = shrink_mesh(piped(ranks, *axes), on, processes)
    assert small.axes == sizes
    assert prod(level.size for level in small.levels) == small.world_size == small.ranks * small.copies
    assert small.ranks == sizes["pp"]


def test_degrees_are_those_of_the_copies() -> None:
    chosen = piped(8, ("dp_2", 2), ("dp_1", 4), optimizer=4, gradients=4)
    small = shrink_mesh(chosen, EIGHT, 8)
    assert small.axes == {"pp": 2, "dp_2": 2, "dp_1": 2}
    assert (small.degree(4), small.degree(1)) == (2, 1)


@pytest.mark.parametrize(
    ("family", "chunks", "micro_batches", "few"),
    [
        ("1f1b", 1, 64, 8),
        ("1f1b", 1, 3, 3),
        ("interleaved-1f1b", 2, 64, 8),
        ("interleaved-1f1b", 3, 8, 8),
        ("dualpipe-v", 2, 16, 8),
        ("zeropp", 2, 5, 5),
        ("gpipe", 1, 1, 1),
    ],
)
def test_micro_batches_reach_a_steady_state(family: str, chunks: int, micro_batches: int, few: int) -> None:
    plan = plan_for(piped(8, family=family, chunks=chunks, accumulation=micro_batches), cluster(("node", 8)))
    small = shrink_pipeline(plan, 4)
    assert small is not None
    assert small.micro_batches == few
    assert (small.pipe.schedule, small.pipe.chunks, small.pipe.ranks) == (family, chunks, 4)


@pytest.mark.parametrize(
    ("cuts", "checkpointed", "ranks", "blocks", "recomputed"),
    [
        ((8, 16, 24), (0, 0, 0, 0), 4, (1, 1, 1, 1), (0.0, 0.0, 0.0, 0.0)),
        ((6, 15, 24), (6, 4, 0, 0), 4, (1, 2, 2, 2), (1.0, 4 / 9, 0.0, 0.0)),
        ((0, 16, 32), (0, 8, 16, 0), 4, (0, 2, 1, 0), (0.0, 0.5, 1.0, 0.0)),
        ((7, 16, 24), (3, 0, 0, 8), 2, (2, 3), (3 / 7, 1.0)),
    ],
)
def test_stages_keep_what_sets_them_apart(
    cuts: tuple[int, ...],
    checkpointed: tuple[int, ...],
    ranks: int,
    blocks: tuple[int, ...],
    recomputed: tuple[float, ...],
) -> None:
    chosen = piped(4, cuts=cuts, checkpointed=checkpointed, of=32, blocks=sum(checkpointed))
    small = shrink_pipeline(plan_for(chosen, cluster(("node", 4))), ranks)
    assert small is not None
    assert (small.blocks, small.recomputed) == (blocks, recomputed)


@pytest.mark.parametrize(
    ("wanted", "blocks", "sizes"),
    [
        ((1, 2, 2, 1), 6, [1, 2, 2, 1]),
        ((1, 2, 2, 1), 9, [2, 3, 3, 1]),
        ((0, 1, 2, 0), 6, [0, 2, 4, 0]),
        ((1, 2, 2, 1), 5, [1, 1, 2, 1]),
        ((1, 2, 2, 1), 2, [0, 1, 1, 0]),
    ],
)
def test_blocks_are_shared_as_they_were_asked_for(wanted: tuple[int, ...], blocks: int, sizes: list[int]) -> None:
    assert resized(wanted, blocks) == sizes


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(InputError, match=r"model\.rehearse.*4 pipeline stages need at least 2 blocks.* has 1"):
        resized((1, 1, 1, 1), 1)


def test_cuts_go_where_the_model_can_be_cut() -> None:
    assert nearest([2, 4, 6], [0, 1, 2, 4, 5, 6, 8]) == [2, 4, 6]
    assert nearest([2, 3, 4], [0, 1, 6, 7]) == [1, 6, 7]
    with pytest.raises(InputError, match="4 pipeline stages need at least 3 places to cut"):
        nearest([1, 2, 3], [1, 2])


FAMILIES = [(name, chunks) for name, each in SCHEDULES.items() for chunks in (1, 2) if each.allowed_chunks(chunks)]


@pytest.mark.parametrize(("family", "chunks"), FAMILIES)
def test_every_shrunk_pipeline_is_a_plan(one: tuple[Path, Plan, ModelProfile], family: str, chunks: int) -> None:
    folder, plan, _ = one
    chosen = piped(
        *(4, ("dp_1", 2)),
        family=family,
        chunks=chunks,
        optimizer=2,
        gradients=2,
        precision="fp32",
        accumulation=16,
        cuts=(1, 3, 4) if chunks == 1 else (0, 1, 2, 3, 4, 5, 6),
        of=6,
    )
    plan = plan.model_copy(update={"decision": chosen})
    for processes in (8, 4):
        small = shrink(plan, folder, processes=processes, steps=4)
        profile = profile_of(small, folder)
        assert small.pipeline is not None
        job = pinned(small, chosen, SGD, "fp32", len(profile.block_paths))
        predictor = Predictor(job, profile)
        point = checked_point(predictor, with_stages(small, small.pipeline, chosen, predictor, "fp32"))
        pipe = pipe_of(point)
        assert (pipe.schedule, pipe.chunks, pipe.ranks) == (family, chunks, processes // 2)
        assert (point.copies, point.optimizer_degree, point.gradient_degree) == (2, 2, 2)
        if chunks == 1:
            assert len({len(pipe.blocks(stage, block_count(profile))) for stage in range(pipe.layout.stages)}) == 2


def test_a_memory_limit_shrinks_with_the_ranks(one: tuple[Path, Plan, ModelProfile]) -> None:
    folder, plan, profile = one
    predicted = plan.prediction.pipeline
    assert predicted is not None
    least = max(max(stage.activation_bytes, stage.held_by_weight_bytes) for stage in predicted.stages)
    limited = edited(plan, profile, schedule="zb-auto", activation_limits=(4 * least,) * 4)
    for processes, ranks in ((8, 4), (4, 2)):
        small = shrink(limited, folder, processes=processes, steps=4)
        assert small.pipeline is not None
        assert min(small.pipeline.limits) >= ranks * (1 - 1e-9)  # four micro-batches of the fullest of four ranks
        few = profile_of(small, folder)
        predictor = Predictor(pinned(small, limited.decision, SGD, "fp32", len(few.block_paths)), few)
        found = with_stages(small, small.pipeline, limited.decision, predictor, "fp32")
        point = checked_point(predictor, found)
        made = predictor.pipelines.schedules.made(point)
        assert len(found.pipeline.activation_limits) == ranks
        assert all(
            map(float.__le__, map(float, made.simulation.peak_memory), map(float, found.pipeline.activation_limits))
        )


# --- comparing ------------------------------------------------------------------------------------------------------

PAIR = Processes(piped(2, ("dp_1", 2)).mesh, stages=((0, 3), (0, 3), (1, 2), (1, 2)), ties=(((0, 2),), ((1, 3),)) * 2)


def call(kind: str, axis: str, size: int, count: int) -> Collective:
    fields = {"kind": kind, "axis": axis, "group_size": 2, "bytes": size, "count": count, "purpose": "activations"}
    return Collective.model_validate(fields)


def sent(*ranks: int) -> list[dict[str, Any]]:
    """Findings of four processes of which each has sent so many messages, and received two."""
    groups = ((0, 2), (1, 3), (0, 2), (1, 3))
    return [
        {"collectives": [["send", group, 64, count], ["recv", group, 64, 2]], "unseen_collectives": 0}
        for group, count in zip(groups, ranks, strict=True)
    ]


def test_each_process_sends_what_is_predicted_of_it() -> None:
    predicted = [[call("send", "pp", 64, count)] for count in (1, 1, 3, 3)]
    (check,) = compare_collectives("run", PAIR, predicted, sent(1, 1, 3, 3))
    assert check.passed
    assert check.found == "8 calls, 512 B"
    (check, *_) = compare_collectives("run", PAIR, predicted, sent(1, 1, 3, 2))
    assert not check.passed
    assert check.found == "2 calls, 128 B on process 3 (stages 1, 2)"
    assert check.expected == "3 calls, 192 B (1 x 64 B)"


def test_a_message_of_several_tensors_is_one() -> None:
    log = CollectiveLog()
    for size in (8, 24):
        log.add(Call("send", (0, 1), size))
    log.add(Call("recv", (0, 1), 8))
    log.join_sends()
    log.add(Call("send", (0, 1), 32))
    log.join_sends()
    assert log.calls == {Call("send", (0, 1), 32): 2, Call("recv", (0, 1), 8): 1}


def test_another_order_is_told_with_its_stage() -> None:
    timetable = from_text("F0 1:F0 1:B0 B0\nF0 1:F0 1:B0 B0\n")
    layout = Layout(2, 2, "wave")
    right = [[["F", 0, 0], ["F", 3, 0], ["B", 3, 0], ["B", 0, 0]], [["F", 1, 0], ["F", 2, 0], ["B", 2, 0], ["B", 1, 0]]]
    found = [{"actions": right[place]} for place in (0, 0, 1, 1)]
    assert compare_actions("run", PAIR, timetable, layout, found).passed
    found[3] = {"actions": [right[1][0], right[1][2], right[1][1], right[1][3]]}
    check = compare_actions("run", PAIR, timetable, layout, found)
    assert not check.passed
    assert check.found == (
        "process 3 (stages 1, 2): B of stage 2, micro-batch 0, instead of F of stage 2, micro-batch 0"
    )
    found[3] = {"actions": right[1][:2]}
    assert compare_actions("run", PAIR, timetable, layout, found).found.endswith("2 actions, not 4")


# --- running --------------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.slow
def test_a_pipeline_holds(one: tuple[Path, Plan, ModelProfile]) -> None:
    """A V on two ranks, with ZeRO-1 copies, tied ends on one rank, skip connections and recomputed blocks."""
    folder, plan, profile = one
    decision = plan.decision.model_copy(update={"precision": "bf16_mixed"})
    v = {"chunks": 2, "placement": "wave", "schedule": "zb-v", "cuts": (0, 1, 2, 3, 4, 5, 6)}
    plan = edited(plan.model_copy(update={"decision": decision}), profile, **v, checkpointed=(0, 1, 0, 1, 0, 1, 0, 0))
    said: list[str] = []
    report = rehearse(plan, folder, processes=4, progress=said.append)
    assert report.error == "", report.log
    assert failing(report.checks) == {}
    assert report.passed
    assert report.processes == 4
    shrunk = {change.key: change.after for change in report.shrunk}
    assert shrunk["decision.mesh.axes"] == "2 x 2"
    assert {"decision.pipeline.cuts", "decision.pipeline.checkpointed"} <= shrunk.keys()
    names = {check.name for check in report.checks}
    assert {"order of actions", "send over pp", "all_gather over dp_1", "gradients at rest, B"} <= names


def replaced(old: str, new: str, file: str = "train.py") -> tuple[str, Callable[[str], str]]:
    def change(text: str) -> str:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        return text.replace(old, new)

    return file, change


PROGRAM = "program.txt"
LOSS, NORM, ORDER, PARAMETERS = "loss of 3 steps", "gradient norm of 3 steps", "order of actions", "parameters"
NUMBERS = {LOSS, NORM, PARAMETERS}
FAULTS: dict[str, tuple[tuple[str, Callable[[str], str]], set[str]]] = {
    "none": (("train.py", lambda script: script), set()),
    "wrong scale": (replaced("scale.fill_(1.0 /", "scale.fill_(2.0 /"), NUMBERS),
    "a tie that is not summed": (
        replaced("ties=placed.ties(COPIES)", "ties=placed.ties(COPIES)[:0]"),
        {*NUMBERS, "all_reduce over pp"},
    ),
    "the norm of one's own stages": (
        replaced('states.gradient_norm(mesh.get_group("pp"))', "states.gradient_norm()"),
        {NORM, "all_reduce over pp"},
    ),
    "same data in all copies": (replaced("rank=copy,", "rank=0,"), NUMBERS),
    "one micro-batch twice": (
        replaced("pipeline.step(micro_batches)", "pipeline.step([micro_batches[0], *micro_batches[:-1]])"),
        NUMBERS,
    ),
    "updates that stay where they are": (
        replaced("states.publish()", "[b.publish() for unit in states.units[1:] for b in unit]"),
        {*NUMBERS, "all_gather over dp_1"},
    ),
    "reduced before the last weight gradient": (
        replaced("W:1:3 REDUCE:1:3", "REDUCE:1:3 W:1:3", PROGRAM),
        NUMBERS,
    ),
    "another order": (replaced("W:1:2 W:1:3", "W:1:3 W:1:2", PROGRAM), {ORDER}),
    # Last, for the run ends here.
    "a lost reduction": (replaced(" REDUCE:1:3", "", PROGRAM), {"AssertionError"}),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What fails of each fault. All in one launch: the reference, the plan as it is, and then with each fault."""
    folder = tmp_path_factory.mktemp("faults")
    pins = ("pp=2", "schedule=zb-h1", "precision=fp32", "micro_batch=4", "states.optimizer_states=4")
    plan = edited(*planned(folder, *pins), cuts=(2,), checkpointed=(0, 2))
    small = shrink(plan, folder, processes=4, steps=3)
    profile = profile_small(small, plan.decision, folder)
    chosen = next(each for each in trials(plan) if "sgd" in each.name)
    pair = compile_trial(small, plan, profile, chosen, folder, folder / "compiled")
    launches = [pair.launch_alone]
    for name, ((file, change), _) in FAULTS.items():
        own = folder / name.replace(" ", "-")
        shutil.copytree(pair.launch.folder, own)
        (own / file).write_text(change((own / file).read_text()))
        launches.append(replace(pair.launch, folder=str(own)))
    _, *outcomes = run(launches, profile.packages, folder)
    failures = {}
    for name, launch, outcome in zip(FAULTS, launches[1:], outcomes, strict=True):
        if isinstance(outcome, Failure):
            failures[name] = {outcome.log[-1]: outcome.message}
            continue
        checks = check_pair(chosen, pair.plan, Path(launch.folder), Path(pair.launch_alone.folder), profile)
        failures[name] = failing(checks)
    return failures


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault_is_found_and_named(faulty: dict[str, dict[str, str]], name: str) -> None:
    _, expected = FAULTS[name]
    assert faulty[name].keys() >= expected
    assert bool(faulty[name]) == bool(expected)
    if ORDER in faulty[name]:
        assert faulty[name][ORDER].startswith("process 2 (stage 1): W of stage 1, micro-batch 3, instead of")
