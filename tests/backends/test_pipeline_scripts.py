"""Emitted scripts of pipelines on two and four processes against one plain process, and against other engines' scripts:
what one saved, the others resume."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compare import assert_as_in_bf16, assert_as_plain, assert_went_on, column, furthest
from support.golden import LLAMA
from support.launch import SUPPORT, emit_into, make_job_folder, parameters_of, read_checkpoint, read_metrics, run_forked
from support.pipeline_plans import pipeline_plan
from support.plans import make_plan
from support.reference import plain
from support.tiny import build
from torch import Tensor

from shardwright.schemas.plan import Plan

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

MASKED = {"mask": ["corpus.mask"]}
TRAIN: dict[str, Any] = {"sequence_length": 12, "global_batch": 12, "steps": 4, "schedule": {"warmup": 2}}
CLIPPED = {"lr": 1e-2, "clip_grad_norm": 0.05}
"""Below the norm of every step, so that clipping always acts."""
GROUPED = {
    "optimizer": {
        **CLIPPED,
        "weight_decay": 5.0,
        "no_decay": ["embed.*", "blocks.1.qkv*"],
        "groups": [{"match": "blocks.0.*", "lr_scale": 0.25, "weight_decay": 20.0}],
    },
    "ema": 0.7,
}
SGD = {"optimizer": {"name": "sgd", "lr": 0.1, "clip_grad_norm": 0.05}}
TIED = {"tied": True}
SOMETIMES = {"optimizer": CLIPPED | {"clip_grad_norm": 0.195}}
"""Clips the first and the last gradient, and not those between."""
GROUPED_SOMETIMES = {"optimizer": GROUPED["optimizer"] | {"clip_grad_norm": 0.89}, "ema": 0.7}
"""Clips the first two."""


def job(train: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    """Keys of the job that a case changes."""
    return {"data": MASKED, "train": TRAIN | {"optimizer": CLIPPED} | (train or {}), "model": {"args": model}}


@dataclass(frozen=True)
class Case:
    """A plan, and how it is run."""

    name: str
    plan: Plan
    argv: tuple[str, ...] = ()
    out: str = ""
    signal: tuple[int, int, int] | None = None
    """Number, rank, and the step after which it is sent."""


def piped(
    name: str,
    family: str,
    *,
    ranks: int = 2,
    chunks: int = 1,
    micro_batches: int = 3,
    checkpointed: tuple[int, ...] | None = None,
    cuts: tuple[int, ...] | None = None,
    degrees: tuple[int, int, int] | None = None,
    train: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    keys: dict[str, Any] | None = None,
    argv: tuple[str, ...] = (),
    out: str = "",
    late: bool = False,
    **plan: Any,
) -> Case:
    """A pipeline of `ranks`; with `degrees` of parameters, gradients and optimizer states two copies of it."""
    p, g, o = degrees or (1, 1, 1)
    copies = 2 if degrees else 1
    made = make_plan(
        world=ranks * copies,
        engine="amsp",
        axes=(2,) if degrees else (),
        shard=p,
        gradients=g,
        optimizer=o,
        **plan,
        **(keys or job(train, **(model or {}))),
    )
    return Case(
        name,
        pipeline_plan(
            made,
            ranks=ranks,
            chunks=chunks,
            family=family,
            copies=copies,
            micro_batches=micro_batches,
            cuts=cuts,
            checkpointed=checkpointed,
            late_step=late,
        ),
        argv,
        out,
    )


FP32 = {
    2: [
        piped("1f1b", "1f1b", micro_batches=6),
        piped("1f1b, tied, groups", "1f1b", model=TIED, train=GROUPED, micro_batches=3),
        piped("zb-h1, sgd", "zb-h1", micro_batches=4, train=SGD, checkpointed=(1, 1)),
        piped("zb-h2, embedding alone", "zb-h2", cuts=(0,), model=TIED),
        piped("zb-v, tied", "zb-v", chunks=2, model=TIED, train=GROUPED),
        piped("zb-auto", "zb-auto", checkpointed=(0, 2)),
        piped(
            "interleaved",
            "interleaved-1f1b",
            chunks=2,
            micro_batches=4,
            model={"layers": 4},
            blocks=tuple(f"blocks.{i}" for i in range(4)),
        ),
        piped("one micro-batch", "gpipe", micro_batches=1),
        piped("late", "zb-h2", late=True, train=SOMETIMES),
        piped("late V, tied", "zb-v", late=True, chunks=2, model=TIED, train=GROUPED_SOMETIMES),
        piped("late, not clipped", "1f1b", late=True, train={"optimizer": CLIPPED | {"clip_grad_norm": None}}),
    ],
    4: [
        piped("1 1 2", "zb-h1", degrees=(1, 1, 2), model=TIED),
        piped("1 2 2, sgd", "1f1b", degrees=(1, 2, 2), train=SGD, checkpointed=(1, 0)),
        piped("2 2 2", "zb-h1", degrees=(2, 2, 2), micro_batches=6, model=TIED, train=GROUPED),
        piped("2 2 2, V", "zb-v", chunks=2, degrees=(2, 2, 2), micro_batches=6, model=TIED, checkpointed=(1, 0, 1, 0)),
        piped("four stages", "zb-h1", ranks=4, micro_batches=6, cuts=(1, 2, 3)),
        piped("late 1 1 2", "zb-h2", late=True, degrees=(1, 1, 2), train=SOMETIMES),
        piped("late 2 2 2, tied", "zb-h1", late=True, degrees=(2, 2, 2), model=TIED, train=GROUPED_SOMETIMES),
    ],
}
"""Compared with the plain loop."""

EVALUATED: dict[str, Any] = {
    "data": {**MASKED, "validation": {"files": ["held-out.txt"]}},
    "train": {**TRAIN, "evaluate_every": 2, "evaluate_batches": 9},
    "model": {"args": {"dropout": 0.2}},
}
BF16 = {"precision": "bf16_mixed"}
NOTHING = ("--steps", "0")
LOADED: dict[str, Any] = job(**TIED) | {"model": {"args": TIED, "weights": "weights"}}
SOURCES = ("tiny.py", "custom.py")
NORMED: dict[str, Any] = EVALUATED | {"model": {"factory": "normed:build"}, "train": EVALUATED["train"] | SGD}
"""SGD: some gradients are zero but for rounding, and AdamW would make steps of it."""
LLAMA_FACTS: dict[str, Any] = {
    "init": "modules",
    "blocks": tuple(f"model.layers.{index}" for index in range(3)),
    "sources": (),
    "packages": ("transformers",),
    "keys": {
        "model": {"factory": None, "args": {}, "hf": LLAMA | {"num_hidden_layers": 3, "tie_word_embeddings": True}}
    },
}
OWN_LOSS: dict[str, Any] = {
    "model": {"factory": "custom:with_loss", "loss": "model", "inputs": {"ids": "input_ids", "labels": "targets"}},
    "data": MASKED,
}
DATASET: dict[str, Any] = {
    "model": {"loss": "custom:loss"},
    "data": {"bytes": None, "dataset": "custom:samples", "args": {"size": 40}, "validation_dataset": "custom:held_out"},
}


def single(name: str, *, keys: dict[str, Any], argv: tuple[str, ...] = (), **plan: Any) -> Case:
    """The same on one process."""
    return Case(name, make_plan(**plan, **keys), argv)


FIRST = {
    "bf16": Case("bf16 1", make_plan(engine="fsdp2", **BF16, **job())),
    "init": Case("init 1", make_plan(init="modules", **job()), NOTHING),
    "init, tied": Case("init 1, tied", make_plan(init="modules", **job(**TIED)), NOTHING),
    "evaluates": Case("evaluates 1", make_plan(**EVALUATED | {"model": {}})),
    "loads": single("loads 1", init="modules", keys=LOADED, argv=NOTHING),
    "llama": single("llama 1", **LLAMA_FACTS),
    "normed": single("normed 1", accumulation=3, sources=("normed.py",), keys=NORMED),
    "own loss": single("own loss 1", sources=SOURCES, keys=OWN_LOSS),
    "dataset": single("dataset 1", sources=SOURCES, keys=DATASET),
}
"""On one process, which others are compared with."""
PAIRS = {
    "bf16": [
        piped("bf16 2", "zb-h1", **BF16),
        piped("bf16 2 2 2", "zb-v", chunks=2, degrees=(2, 2, 2), **BF16, checkpointed=(1, 0, 1, 0)),
    ],
    "init": [
        piped("init 2", "1f1b", init="modules", argv=NOTHING),
        piped("init 2, bf16", "1f1b", init="modules", argv=NOTHING, **BF16),
    ],
    "init, tied": [
        piped("init 2, tied", "1f1b", init="modules", model=TIED, argv=NOTHING),
        piped("init V, tied", "zb-v", chunks=2, degrees=(2, 2, 2), init="modules", model=TIED, argv=NOTHING),
    ],
    "evaluates": [
        piped("evaluates 2", "zb-h1", keys=EVALUATED | {"model": {}}),
        piped("evaluates 2 2 2", "1f1b", degrees=(2, 2, 2), keys=EVALUATED | {"model": {}}),
        piped("evaluates 2, late", "zb-h1", late=True, keys=EVALUATED | {"model": {}}),
    ],
    "loads": [
        piped("loads 2", "1f1b", init="modules", keys=LOADED, argv=NOTHING),
        piped("loads V", "zb-v", chunks=2, degrees=(2, 2, 2), init="modules", keys=LOADED, argv=NOTHING),
    ],
    "llama": [
        piped("llama 2", "zb-h1", checkpointed=(1, 1), **LLAMA_FACTS),
        piped("llama V", "zb-v", chunks=2, degrees=(1, 2, 2), **LLAMA_FACTS),
    ],
    "normed": [
        piped("normed 2", "zb-h1", sources=("normed.py",), keys=NORMED),
        piped("normed V", "zb-v", chunks=2, sources=("normed.py",), keys=NORMED),
    ],
    "quantized": [
        piped("quantized 2 2 2", "zb-h1", degrees=(2, 2, 2), int8=("dp_1",), int4=("dp_1",), model={"width": 64}),
    ],
    "own loss": [piped("own loss 2", "zb-h1", sources=SOURCES, keys=OWN_LOSS)],
    "dataset": [piped("dataset 2", "1f1b", sources=SOURCES, keys=DATASET)],
}

LONG = {"steps": 12, "ema": 0.9, "keep": 9}
MOVING = job(LONG, **TIED)
MOVES = [
    piped("moving pipeline", "zb-h1", keys=MOVING, argv=("--steps", "3"), out="moving"),
    Case("moving single", make_plan(**MOVING), ("--resume", "--steps", "5"), out="moving"),
    piped(
        "moving V", "zb-v", chunks=2, degrees=(1, 2, 2), keys=MOVING, argv=("--resume", "--steps", "8"), out="moving"
    ),
    Case(
        "moving amsp",
        make_plan(world=4, engine="amsp", axes=(2, 2), shard=2, optimizer=4, **MOVING),
        ("--resume", "--steps", "9"),
        out="moving",
    ),
    piped("moving back", "1f1b", keys=MOVING, argv=("--resume",), out="moving", cuts=(2,)),
]
"""One run that goes on with other engines, pipelines and numbers of processes, each plan compiled anew."""

DROPPING = job({"steps": 6}, dropout=0.1)
UNDIVIDED = piped("undivided", "zb-h1", keys=DROPPING, checkpointed=(1, 1))
HALVES = [
    Case("first half", UNDIVIDED.plan, out="halves", signal=(signal.SIGTERM, 1, 3)),
    Case("second half", UNDIVIDED.plan, ("--resume",), out="halves"),
]
LATE = piped(
    "undivided, late",
    "zb-h1",
    late=True,
    keys=DROPPING | {"train": DROPPING["train"] | {"save_every": 2}},
    checkpointed=(1, 1),
)
LATE_HALVES = [
    Case("first half, late", LATE.plan, out="late halves", signal=(signal.SIGTERM, 1, 2)),
    Case("second half, late", LATE.plan, ("--resume",), out="late halves"),
]


def of_world(world: int, cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.plan.decision.mesh.world_size == world]


OTHERS = [case for cases in PAIRS.values() for case in cases]
LAUNCHES: list[tuple[int, list[Case]]] = [
    (1, [*FIRST.values()]),
    (2, [*FP32[2], *of_world(2, OTHERS), UNDIVIDED, *HALVES, LATE, *LATE_HALVES, MOVES[0]]),
    (1, [MOVES[1]]),
    (4, [*FP32[4], *of_world(4, OTHERS), *MOVES[2:4]]),
    (2, [MOVES[4]]),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job after all launches; each case's script lies in a folder of its own name."""
    folder = make_job_folder(tmp_path_factory.mktemp("job"))
    shutil.copy(SUPPORT / "normed.py", folder)
    (folder / "weights").mkdir()
    save_file(stored_weights(), folder / "weights" / "model.safetensors")
    launches = []
    for world, cases in LAUNCHES:
        listed = []
        for case in cases:
            script = emit_into(case.plan, folder, case.name)
            run: dict[str, Any] = {"folder": str(script), "argv": ["--out", str(out_of(folder, case)), *case.argv]}
            listed.append(run | {"ends": "done"} | ({"signal": case.signal} if case.signal else {}))
        launches.append((world, listed))
    run_forked(launches, folder, ["transformers"])
    return folder


def stored_weights() -> dict[str, Tensor]:
    """Of the tied model, other ones than it begins with."""
    torch.manual_seed(99)
    return {name: value.clone() for name, value in build(tied=True).state_dict().items()}


def out_of(folder: Path, case: Case) -> Path:
    return folder / (case.out or f"{case.name}/out")


@pytest.mark.parametrize("case", [c for cases in FP32.values() for c in cases], ids=lambda c: c.name)
def test_fp32_pipelines_match_one_plain_process(runs: Path, case: Case) -> None:
    """Bounds as for the other engines (`test_processes.py`)."""
    assert_as_plain(out_of(runs, case), plain(case.plan, runs), case.plan.job.train.optimizer.name)


@pytest.mark.parametrize("case", PAIRS["bf16"], ids=lambda c: c.name)
def test_bf16_pipelines_match_bf16_on_one_process(runs: Path, case: Case) -> None:
    assert_as_in_bf16(out_of(runs, case), out_of(runs, FIRST["bf16"]))


@pytest.mark.parametrize("which", ["init", "init, tied"])
def test_initial_weights_are_those_of_every_other_plan(runs: Path, which: str) -> None:
    expected = parameters_of(read_checkpoint(out_of(runs, FIRST[which])))
    for case in PAIRS[which]:
        found = parameters_of(read_checkpoint(out_of(runs, case)))
        assert furthest(found, expected) == 0.0, case.name


@pytest.mark.parametrize("case", PAIRS["evaluates"], ids=lambda c: c.name)
def test_held_out_losses_do_not_depend_on_the_plan(runs: Path, case: Case) -> None:
    found, expected = (
        [line["validation_loss"] for line in read_metrics(out_of(runs, each)) if "validation_loss" in line]
        for each in (case, FIRST["evaluates"])
    )
    assert len(expected) == 2
    assert found == pytest.approx(expected, rel=1e-5)


def test_rounded_messages_change_little(runs: Path) -> None:
    case = PAIRS["quantized"][0]
    found, expected = column(out_of(runs, case), "loss"), plain(case.plan, runs).losses
    assert found == pytest.approx(expected, rel=1e-2)
    assert found != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("which", ["llama", "own loss", "dataset"])
def test_other_models_losses_and_data_match_one_process(runs: Path, which: str) -> None:
    first = out_of(runs, FIRST[which])
    for case in PAIRS[which]:
        out = out_of(runs, case)
        assert column(out, "tokens") == column(first, "tokens")
        assert column(out, "loss") == pytest.approx(column(first, "loss"), rel=2e-6), case.name
        found, expected = parameters_of(read_checkpoint(out)), parameters_of(read_checkpoint(first))
        assert furthest(found, expected) < 1e-4, case.name


def test_running_statistics_are_those_of_the_stages_that_keep_them(runs: Path) -> None:
    expected = read_checkpoint(out_of(runs, FIRST["normed"]))
    buffers = {name: value for name, value in expected.items() if name.startswith("buffer.")}
    assert len(buffers) == 15
    for case in PAIRS["normed"]:
        found = read_checkpoint(out_of(runs, case))
        assert furthest({name: found[name] for name in buffers}, buffers) < 1e-5
        losses = [
            [line.get("validation_loss", line["loss"]) for line in read_metrics(out_of(runs, each))]
            for each in (case, FIRST["normed"])
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_every_stage_loads_its_part_of_the_weights(runs: Path) -> None:
    expected = {name: value for name, value in stored_weights().items() if name not in ("head.weight", "scale")}
    for case in (FIRST["loads"], *PAIRS["loads"]):
        assert furthest(parameters_of(read_checkpoint(out_of(runs, case))), expected) == 0.0, case.name


def test_what_a_pipeline_saved_is_exported(runs: Path) -> None:
    case = FP32[4][3]
    command = [sys.executable, runs / case.name / "export.py", runs / "exported", "--checkpoint", out_of(runs, case)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    found = load_file(runs / "exported" / "model.safetensors")
    assert furthest({name: found[name] for name in found if name != "scale"}, plain(case.plan, runs).parameters) < 2e-5


def test_a_run_goes_on_with_and_without_a_pipeline(runs: Path) -> None:
    out = out_of(runs, MOVES[0])
    assert column(out, "step") == list(range(1, 13))
    assert_went_on(out, plain(MOVES[0].plan, runs))


def test_a_run_that_was_told_to_stop_goes_on_with_the_same_dropout(runs: Path) -> None:
    halves, whole = out_of(runs, HALVES[1]), out_of(runs, UNDIVIDED)
    assert column(halves, "loss") == column(whole, "loss")
    assert_same_checkpoints(halves, whole)


def assert_same_checkpoints(one: Path, other: Path) -> None:
    found, expected = read_checkpoint(one), read_checkpoint(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


MEASURED = ("tokens_per_s", "step_time_s", "peak_memory_bytes")


def logged(out: Path) -> list[dict[str, Any]]:
    """Every line of the log, without what is measured."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in read_metrics(out)]


@pytest.mark.parametrize(
    ("late", "waiting"),
    [(LATE, UNDIVIDED), (LATE_HALVES[1], UNDIVIDED), (PAIRS["evaluates"][2], PAIRS["evaluates"][0])],
    ids=lambda case: case.name,
)
def test_late_steps_train_and_log_the_same_to_the_bit(runs: Path, late: Case, waiting: Case) -> None:
    one, other = out_of(runs, late), out_of(runs, waiting)
    assert [list(line) for line in read_metrics(one)] == [list(line) for line in read_metrics(other)]
    assert logged(one) == logged(other)
    assert_same_checkpoints(one, other)


@pytest.mark.parametrize(
    ("case", "clipped"),
    [
        (case, [True, False, False, True] if "tied" not in case.name else [True, True, False, False])
        for cases in FP32.values()
        for case in cases
        if case.name.startswith("late") and case.plan.job.train.optimizer.clip_grad_norm is not None
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_some_late_steps_are_done_again(runs: Path, case: Case, clipped: list[bool]) -> None:
    limit = case.plan.job.train.optimizer.clip_grad_norm
    assert [norm > limit for norm in column(out_of(runs, case), "grad_norm")] == clipped
