"""What the emission of a pipeline holds; `test_pipeline_scripts.py` runs such scripts."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from support.golden import PIPELINE_REASONS
from support.pipeline_plans import pipeline_plan
from support.plans import make_plan

from shardwright.backends.pytorch import emit
from shardwright.backends.pytorch.runtime.program import ProgramError, read_program
from shardwright.planner.schedules.text import from_text, program_from_text
from shardwright.planner.schedules.timetable import Action
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.plan import PipelinePrediction, Plan

SUPPORT = Path(__file__).parents[1] / "support"


def plan(
    *, degrees: tuple[int, int, int] = (1, 1, 2), micro_batches: int = 3, family: str = "zb-h1", **made: Any
) -> Plan:
    """Two ranks, two copies."""
    p, g, o = degrees
    whole = make_plan(world=4, engine="amsp", axes=(2,), shard=p, gradients=g, optimizer=o, **made)
    return pipeline_plan(whole, ranks=2, copies=2, micro_batches=micro_batches, family=family)


def emitted(of: Plan) -> dict[str, str]:
    return dict(emit(of, SUPPORT, SUPPORT / "out").files)


def kinds(of: Plan) -> set[str]:
    return {step.kind for program in program_from_text(emitted(of)["program.txt"]) for step in program}


def test_the_programs_run_the_plans_timetable() -> None:
    of = plan()
    assert of.prediction.pipeline is not None
    timetable = from_text("\n".join(of.prediction.pipeline.timetable))
    for rank, program in enumerate(program_from_text(emitted(of)["program.txt"])):
        actions = [Action(step.kind, 0, step.micro_batch) for step in program if step.kind in ("F", "I", "W", "B")]
        assert tuple(actions) == timetable[rank]
        assert {step.stage for step in program} == {rank}


def test_what_is_sharded_decides_what_is_gathered_and_reduced() -> None:
    assert {"GATHER", "RELEASE"} <= kinds(plan(degrees=(2, 2, 2)))
    assert not {"GATHER", "RELEASE"} & kinds(plan())
    for degrees, micro_batches, count in (((1, 1, 2), 3, 1), ((1, 2, 2), 3, 3), ((2, 2, 2), 6, 6), ((1, 2, 2), 1, 1)):
        programs = program_from_text(emitted(plan(degrees=degrees, micro_batches=micro_batches))["program.txt"])
        for program in programs:
            assert sum(step.kind == "REDUCE" for step in program) == count


def test_weight_gradients_are_deferred_only_where_they_come_late() -> None:
    assert "defer_weight_gradients" in emitted(plan())["train.py"]
    assert "defer_weight_gradients" not in emitted(plan(family="1f1b"))["train.py"]


def test_only_what_a_pipeline_needs_comes_along() -> None:
    files = emitted(plan())
    assert {
        f"shardwright_runtime/{name}.py" for name in ("pipeline", "stages", "program", "stage_states")
    } <= files.keys()
    alone = emitted(make_plan(world=4, engine="amsp", axes=(4,), optimizer=4))
    assert "program.txt" not in alone
    assert "shardwright_runtime/pipeline.py" not in alone


def test_one_copy_has_no_axis_of_copies() -> None:
    of = pipeline_plan(make_plan(world=2, engine="amsp"), ranks=2)
    names = {node.id for node in ast.walk(ast.parse(emitted(of)["train.py"])) if isinstance(node, ast.Name)}
    assert not {"COPIES", "copy", "place"} & names
    assert {"COPIES", "copy", "place"} <= {
        node.id for node in ast.walk(ast.parse(emitted(plan())["train.py"])) if isinstance(node, ast.Name)
    }


def test_reasons_stand_above_the_stages() -> None:
    text = emitted(plan(reasons=PIPELINE_REASONS))["train.py"]
    assert (
        "device.\n# Why pipeline.schedule = zb-v: Idle for 7.3 % of the step; the runner-up 1f1b for 15 %.\nSTAGE_RANKS"
        in text
    )


def broken(of: Plan, **changes: Any) -> Plan:
    predicted = of.prediction.pipeline
    assert isinstance(predicted, PipelinePrediction)
    pipeline = predicted.model_copy(update=changes) if changes else None
    return of.model_copy(update={"prediction": of.prediction.model_copy(update={"pipeline": pipeline})})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs its timetable"),
        ({"timetable": ("F0 B0", "X0")}, "is no action"),
        ({"timetable": ("F0 B0 F1 B1", "F0 F1 B1 B0")}, "waits"),
        ({"timetable": ("F0 B0",)}, "not right"),
        ({"edges": ((1, 0),)}, "no value can go"),
        ({"stages": ()}, "not right"),
    ],
)
def test_a_wrong_timetable_is_not_emitted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        emitted(broken(plan(family="1f1b"), **changes))


def test_a_second_copy_is_refused() -> None:
    with pytest.raises(InputError, match="no second copy"):
        emitted(plan(degrees=(2, 2, 2), micro_batches=6, secondary=1))


def test_the_runtime_reads_what_is_written(tmp_path: Path) -> None:
    text = emitted(plan(degrees=(2, 2, 2), micro_batches=6))["program.txt"]
    (tmp_path / "program.txt").write_text(text, encoding="utf-8")
    for rank, program in enumerate(program_from_text(text)):
        assert read_program(tmp_path / "program.txt", rank, (0, 1), {(0, 1)}) == program


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F:0:0\n", "programs of 1 ranks"),
        ("F:0:0 X:0:0\n-\n", "'X:0:0' is no step"),
        ("F:0\n-\n", "is no step"),
        ("F:0:0:1\n-\n", "is no step"),
        ("SEND_F:0:0\n-\n", "is no step"),
        ("F:0:٣\n-\n", "is no step"),
        ("SEND_F:0:0:2\n-\n", r"between the stages \[\(0, 2\)\]"),
        ("F:0:0\n-\n", r"between the stages \[\], and .* between \[\(0, 1\)\]"),
    ],
)
def test_wrong_programs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "program.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ProgramError, match=message):
        read_program(tmp_path / "program.txt", 0, (0, 1), {(0, 1)})
