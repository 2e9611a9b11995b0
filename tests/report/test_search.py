from __future__ import annotations

import pytest

from report.samples import GIB, INFEASIBLE, KEPT, PLAN, TWO_AT_A_TIME
from report.test_drawings import drawn
from shardwright.report import diagnostic_fields, draw_input_error, why_fields
from shardwright.report.plan import first_sentence
from shardwright.report.search import draw_alternatives, draw_infeasible, find_reasons, others, value_at
from shardwright.schemas.diagnostics import Diagnostic, InputError


@pytest.mark.parametrize("key", ["micro_batch", "decision.micro_batch"])
def test_reason_of_one_key(key: str) -> None:
    assert [reason.key for reason in find_reasons(PLAN, key)] == ["decision.micro_batch"]


def test_a_key_stands_for_those_below_it() -> None:
    assert [reason.key for reason in find_reasons(PLAN, "states")] == [
        "decision.states.parameters",
        "decision.states.gradients",
    ]


@pytest.mark.parametrize(
    ("key", "nearest"), [("microbatch", "`micro_batch`"), ("decision.state.gradient", "`states.gradients`")]
)
def test_a_misspelt_key_gets_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(InputError) as caught:
        find_reasons(PLAN, key)
    (diagnostic,) = caught.value.diagnostics
    assert key in diagnostic.message
    assert f"did you mean {nearest}?" in diagnostic.suggestion


def test_a_strange_key_gets_the_list() -> None:
    with pytest.raises(InputError) as caught:
        find_reasons(PLAN, "qqq")
    assert caught.value.diagnostics[0].suggestion == "the keys are states.parameters, states.gradients, micro_batch"


def test_others_are_the_alternatives_that_chose_otherwise() -> None:
    assert others(PLAN, "decision.micro_batch") == (("2", TWO_AT_A_TIME),)
    assert others(PLAN, "engine.reshard_after_forward") == (("false", KEPT),)
    assert others(PLAN, "precision") == ()


def test_value_of_a_key() -> None:
    assert value_at(PLAN.decision, "checkpointing") == "12 of 32 blocks"
    assert value_at(PLAN.decision, "checkpointing.blocks") == "12"
    assert value_at(PLAN.decision, "mesh") == "dp_shard 8"
    assert value_at(PLAN.decision, "states.parameters") == "8"
    assert value_at(PLAN.decision, "checkpointing.nothing") is None
    assert value_at(PLAN.decision, "nothing.at.all") is None


def test_why_as_json() -> None:
    (fields,) = why_fields(PLAN, "micro_batch")
    assert fields["because"] == PLAN.reasons[2].because
    assert [(one["value"], one["fits"]) for one in fields["others"]] == [("2", True)]


def test_host_memory_that_is_missing_is_called_so() -> None:
    result = INFEASIBLE.model_copy(update={"needed_bytes": 40 * GIB, "available_bytes": 32 * GIB})
    text = drawn(draw_infeasible(result), 80)
    assert "The nearest needs 40 GiB of host memory; 32 GiB may be used." in text
    assert "optimizer states" not in text


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One. Two.", "One."),
        ("Only 8.4 % more", "Only 8.4 % more"),
        ("", ""),
        ("Costs 1.5 s. Else: x.", "Costs 1.5 s."),
    ],
)
def test_first_sentence(text: str, first: str) -> None:
    assert first_sentence(text) == first


def test_what_is_left_out_is_said() -> None:
    assert "and 1 other, which `inspect` shows" in drawn(draw_alternatives(PLAN, most=1), 80)
    assert "`inspect`" not in drawn(draw_alternatives(PLAN), 80)


ERROR = InputError(
    [
        Diagnostic(
            message="'fast' is not a number [a-z]",
            key="train.optimizer.lr",
            suggestion="write for example 3e-4",
            file="job.yaml",
            line=5,
            column=8,
            excerpt="  lr: fast\n      ^",
        ),
        Diagnostic(message="cannot be read", file="x.yaml"),
    ]
)


def test_diagnostics_read_the_same_with_and_without_colour() -> None:
    text = draw_input_error(ERROR)
    assert text.plain == str(ERROR)
    assert {str(span.style) for span in text.spans} == {"bold red", "bold cyan"}


def test_diagnostic_as_json() -> None:
    fields = diagnostic_fields(ERROR.diagnostics[0])
    assert (fields["file"], fields["line"], fields["column"]) == ("job.yaml", 5, 8)
    assert set(fields) == {"message", "key", "suggestion", "file", "line", "column", "excerpt"}
