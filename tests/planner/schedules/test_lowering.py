"""Programs of ranks: for any order of actions they are right, and every pair of ranks agrees on its messages."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pipeline_orders import random_timetable

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.lowering import Edge, Gathers, Program, Step, lower, neighbours
from shardwright.planner.schedules.timetable import Action, Layout, Placement, Timetable, even_costs
from shardwright.planner.schedules.verification import verify

LAYOUTS = st.builds(
    Layout,
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(["loop", "wave"]),  # type: ignore[arg-type]
)
ACTIONS = ("F", "I", "W", "B")


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Layout, tuple[Edge, ...], Timetable]:
    """A layout, edges with some that skip stages, and a random timetable."""
    layout = draw(LAYOUTS)
    pairs = [(one, other) for one in range(layout.stages) for other in range(one + 2, layout.stages)]
    skips = draw(st.lists(st.sampled_from(pairs), max_size=3, unique=True)) if pairs else []
    edges = (*neighbours(layout), *skips)
    timetable = random_timetable(layout, draw(st.integers(1, 4)), edges, draw(st.integers(0, 2**32)))
    return layout, edges, timetable


def messages(programs: Sequence[Program], layout: Layout) -> dict[tuple[int, int], list[tuple[str, int, int, int]]]:
    """What passes between two ranks, (rank, the other), in the order of the first one's program."""
    found = defaultdict(list)
    for rank, program in enumerate(programs):
        for step in program:
            if step.peer >= 0:
                source, target = (step.stage, step.peer) if step.kind.startswith("SEND") else (step.peer, step.stage)
                found[rank, layout.place(step.peer)[0]].append((step.kind[-1], source, target, step.micro_batch))
    return found


def actions(program: Program, layout: Layout) -> tuple[Action, ...]:
    return tuple(
        Action(step.kind, layout.place(step.stage)[1], step.micro_batch)  # type: ignore[arg-type]
        for step in program
        if step.kind in ACTIONS
    )


@settings(max_examples=120, deadline=None)
@given(
    pipelines(),
    st.none() | st.integers(1, 3),
    st.none() | st.builds(Gathers, st.integers(0, 2), st.integers(0, 3)),
    st.tuples(*[st.floats(0.1, 3)] * 3, st.floats(0, 2)),
)
def test_any_order_becomes_programs_that_are_right(
    pipeline: tuple[Layout, tuple[Edge, ...], Timetable],
    reduce_every: int | None,
    gathers: Gathers | None,
    times: tuple[float, float, float, float],
) -> None:
    layout, edges, timetable = pipeline
    costs = even_costs(layout, times, 0.5)
    programs = lower(timetable, layout, edges=edges, costs=costs, reduce_every=reduce_every, gathers=gathers)
    verify(programs, layout, edges, sharded=gathers is not None)
    assert tuple(actions(program, layout) for program in programs) == timetable
    between = messages(programs, layout)
    for (rank, other), passed in between.items():
        assert rank != other
        assert passed == between[other, rank]
    apart = [edge for edge in edges if layout.place(edge[0])[0] != layout.place(edge[1])[0]]
    batches = 1 + max(action.micro_batch for action in timetable[0])
    assert sum(map(len, between.values())) == 4 * len(apart) * batches


@settings(max_examples=60, deadline=None)
@given(pipelines(), st.data())
def test_a_program_with_a_fault_is_refused(
    pipeline: tuple[Layout, tuple[Edge, ...], Timetable], data: st.DataObject
) -> None:
    layout, edges, timetable = pipeline
    programs = lower(timetable, layout, edges=edges, gathers=Gathers())
    rank = data.draw(st.integers(0, layout.ranks - 1))
    program = list(programs[rank])
    at = data.draw(st.integers(0, len(program) - 1))
    fault = data.draw(st.sampled_from(["lost", "twice", "other micro-batch"]))
    step = program.pop(at)
    if fault == "other micro-batch":
        if step.kind in ("GATHER", "RELEASE", "REDUCE"):  # of these it is a remark
            return
        program.insert(at, step._replace(micro_batch=step.micro_batch + 1))
    elif fault == "twice":
        if step.kind in ("GATHER", "RELEASE", "REDUCE"):
            return
        program[at:at] = [step, step]
    with pytest.raises(ScheduleError):
        verify([*programs[:rank], tuple(program), *programs[rank + 1 :]], layout, edges, sharded=True)


def test_messages_in_another_order_on_one_side_wait_for_ever() -> None:
    layout = Layout(2)
    timetable = ((Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 0), Action("B", 0, 1)),) * 2
    first, second = lower(timetable, layout)
    sends = [at for at, step in enumerate(first) if step.kind == "SEND_F"]
    swapped = list(first)
    swapped[sends[0]], swapped[sends[1]] = swapped[sends[1]], swapped[sends[0]]
    with pytest.raises(ScheduleError, match=r"waits for ever|is not here"):
        verify((tuple(swapped), second), layout)


@pytest.mark.parametrize("late", ["I", "W"])
def test_an_action_after_the_last_reduction_is_refused(late: str) -> None:
    layout = Layout(1)
    (program,) = lower(((Action("F", 0, 0), Action("I", 0, 0), Action("W", 0, 0)),), layout)
    moved = [step for step in program if step.kind != "REDUCE"]
    moved.insert([step.kind for step in moved].index(late), Step("REDUCE", 0, 0))
    with pytest.raises(ScheduleError, match="follows the last reduction"):
        verify((tuple(moved),), layout)


def test_a_timetable_that_waits_for_itself_is_refused() -> None:
    wrong = ((Action("B", 0, 0), Action("F", 0, 0)), (Action("F", 0, 0), Action("B", 0, 0)))
    with pytest.raises(ScheduleError):
        lower(wrong, Layout(2))
    with pytest.raises(ValueError, match="no value can go"):
        lower(wrong, Layout(2), edges=((1, 0),))


def test_values_between_two_stages_of_one_rank_never_leave_it() -> None:
    layout = Layout(2, 2, "wave")
    timetable = random_timetable(layout, 3, neighbours(layout), seed=1)
    kinds = [(step.stage, step.peer) for program in lower(timetable, layout) for step in program if step.peer >= 0]
    assert (1, 2) not in kinds
    assert (2, 1) not in kinds
    assert {(0, 1), (1, 0), (2, 3), (3, 2)} == set(kinds)


def test_reductions_follow_the_last_weight_gradient_and_every_so_many() -> None:
    kinds: dict[int | None, str] = {}
    for every in (None, 1, 2):
        steps = [Action(kind, 0, batch) for kind in ("F", "I", "W") for batch in range(3)]  # type: ignore[arg-type]
        (program,) = lower((tuple(steps),), Layout(1), reduce_every=every)
        kinds[every] = "".join("R" if step.kind == "REDUCE" else step.kind for step in program)
    assert kinds == {None: "FFFIIIWWWR", 1: "FFFIIIWRWRWR", 2: "FFFIIIWWRWR"}


def test_parameters_are_whole_from_a_while_before_their_use_and_never_for_weight_gradients_alone() -> None:
    letters = {"GATHER": "g", "RELEASE": "r"}
    steps = [Action(kind, chunk, 0) for kind, chunk in (("F", 0), ("F", 1), ("I", 1), ("W", 1), ("I", 0), ("W", 0))]  # type: ignore[arg-type]

    def text(gathers: Gathers) -> str:
        (program,) = lower((tuple(steps),), Layout(1, 2), gathers=gathers)
        return " ".join(f"{letters.get(step.kind, step.kind)}{step.stage}" for step in program if step.kind != "REDUCE")

    assert text(Gathers(lead=1, gap=0)) == "g0 g1 F0 r0 F1 I1 r1 g0 W1 I0 r0 W0"
    assert text(Gathers(lead=0, gap=3)) == "g0 F0 g1 F1 I1 r1 W1 I0 r0 W0"


def test_receives_are_issued_when_they_are_due_not_long_before() -> None:
    """In one queue for all messages of a rank a receive that comes late holds up what follows."""
    layout = Layout(3)
    forward = tuple(Action("F", 0, batch) for batch in range(4))
    timetable = ((*forward, *(Action("B", 0, batch) for batch in range(4))),) * 3
    middle = lower(timetable, layout)[1]
    order = [f"{step.kind}{step.micro_batch}" for step in middle]
    assert order.index("SEND_F0") < order.index("RECV_F3")


def test_sixty_four_stages_of_many_micro_batches_are_lowered_quickly() -> None:
    ranks, batches = 64, 256
    layout = Layout(ranks)
    table: list[list[Action]] = []
    for rank in range(ranks):
        warm = min(ranks - rank, batches)
        actions_of = [Action("F", 0, batch) for batch in range(warm)]
        for batch in range(batches):
            actions_of += [Action("I", 0, batch), Action("W", 0, batch)]
            actions_of += [Action("F", 0, batch + warm)] if batch + warm < batches else []
        table.append(actions_of)
    start = time.perf_counter()
    programs = lower(tuple(map(tuple, table)), layout)
    assert time.perf_counter() - start < 10
    assert sum(map(len, programs)) == ranks * (3 * batches + 1) + 4 * (ranks - 1) * batches


def test_a_layouts_placement_decides_who_is_sent_to() -> None:
    expected: dict[Placement, Any] = {"loop": {(0, 1), (1, 0)}, "wave": {(0, 1), (1, 0)}}
    for placement, pairs in expected.items():
        layout = replace(Layout(2, 4), placement=placement)
        programs = lower(random_timetable(layout, 2, neighbours(layout), seed=3), layout)
        found = messages(programs, layout)
        assert set(found) == pairs
        assert len(found[0, 1]) == 2 * 2 * sum(
            layout.place(stage)[0] != layout.place(stage + 1)[0] for stage in range(layout.stages - 1)
        )
