"""The lanes of a step, by hand and by property."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.planner.lanes import Load, StepLoad, least_lane_seconds, run_lanes

NOTHING = Load(0, 0, 0, 0, 0, 0, 0, 0)


def step(block: Load, *, count: int = 3, root: Load = NOTHING, micro_batches: int = 1, **others: object) -> StepLoad:
    plain = StepLoad(
        blocks=[block] * count,
        root=root,
        embedding=(0, 0),
        head=(1, 2),
        micro_batches=micro_batches,
        kept=False,
        waits=False,
    )
    return replace(plain, **others)  # type: ignore[arg-type]


def test_compute_alone() -> None:
    lanes = run_lanes(step(Load(10, 20, 0, 0, 0, 0, 0, 0), micro_batches=7))
    assert lanes.compute == 7 * (3 * 30 + 3)
    assert lanes.gather_stall == lanes.reduce_stall == lanes.copies == 0


def test_hidden_gathers_expose_the_first_and_the_last_blocks_in_backward() -> None:
    """Forward: only the first gather (4) is waited for. Backward: the last block's gather is issued when the head's
    backward (2) begins: 2 of its 4 are exposed; the rest hides."""
    lanes = run_lanes(step(Load(10, 20, 4, 4, 0, 0, 0, 0)))
    assert lanes.gather_stall == 4 + 2
    assert lanes.compute == 3 * 30 + 3 + 6


def test_long_gathers_bound_the_step() -> None:
    """Compute of 1 a block cannot hide gathers of 10: every one of them is exposed but for the compute beside it."""
    lanes = run_lanes(step(Load(1, 1, 10, 10, 0, 0, 0, 0), head=(0, 0)))
    # Forward: gathers end at 10, 20, 30; backward: the last block's is issued at 31 and the others follow.
    assert lanes.compute == 31 + 10 + 10 + 10 + 1


def test_the_last_reduction_is_exposed() -> None:
    lanes = run_lanes(step(Load(10, 20, 0, 0, 0, 0, 5, 0)))
    assert lanes.reduce_stall == 5
    assert lanes.compute == 3 * 30 + 3 + 5


def test_a_reduction_waits_for_the_one_before() -> None:
    """Reductions of 30 beside backwards of 20: the second and third wait 10 each, and the last is exposed."""
    lanes = run_lanes(step(Load(10, 20, 0, 0, 0, 0, 30, 0)))
    assert lanes.reduce_stall == 10 + 10 + 30


def test_waiting_gradients_are_reduced_once() -> None:
    often = run_lanes(step(Load(10, 20, 0, 0, 0, 0, 30, 0), micro_batches=4))
    once = run_lanes(step(Load(10, 20, 0, 0, 0, 0, 30, 0), micro_batches=4, waits=True))
    assert once.reduce_stall == 10 + 10 + 30
    assert often.reduce_stall > once.reduce_stall


def test_replicas_are_reduced_once_a_step_on_a_lane_of_their_own() -> None:
    """The first micro-batch takes 93, and 5 until its last reduce-scatter. In the second the last block's backward
    begins 33 later; its all-reduce and the others' follow one another from its reduce-scatter on."""
    lanes = run_lanes(step(Load(10, 20, 0, 0, 0, 0, 5, 25), micro_batches=2))
    backward_of_last_begins = 93 + 5 + 30 + 1 + 2
    assert lanes.compute == backward_of_last_begins + 20 + 5 + 3 * 25


def test_replicas_that_share_the_links_wait_for_reduce_scatters_and_gathers() -> None:
    """One lane from the end of the first block's backward on: reduce-scatter (5) and all-reduce (25) of each block."""
    block = Load(10, 20, 0, 0, 0, 0, 5, 25)
    lanes = run_lanes(step(block, micro_batches=1, shared=True))
    first_backward_ends = 30 + 1 + 2 + 20
    assert lanes.compute == first_backward_ends + 3 * (5 + 25)
    assert lanes.compute > run_lanes(step(block, micro_batches=1)).compute


def test_kept_parameters_are_gathered_once() -> None:
    lanes = run_lanes(step(Load(1, 1, 10, 10, 2, 0, 0, 0), head=(0, 0), micro_batches=3, kept=True))
    assert lanes.gather_stall == 10 + 7 + 7
    assert lanes.copies == 3 * 2


def test_repeated_micro_batches_equal_simulated_ones() -> None:
    """Twenty micro-batches, of which only five are simulated, against the growth from ten to eleven."""
    block = Load(3, 5, 4, 4, 1, 1, 6, 2)
    ten, eleven, twenty = (run_lanes(step(block, micro_batches=count)).compute for count in (10, 11, 20))
    assert twenty == pytest.approx(ten + 10 * (eleven - ten))


SECONDS = st.integers(0, 50)
LOADS = st.builds(Load, *[SECONDS] * 8)
MODES = [{"kept": kept, "waits": waits, "shared": shared} for kept, waits, shared in product((False, True), repeat=3)]


@given(LOADS, LOADS, st.integers(1, 6), st.sampled_from(MODES), st.sampled_from(fields(Load)), st.integers(1, 20))
def test_more_of_anything_is_never_faster(
    block: Load, root: Load, micro_batches: int, modes: dict[str, bool], field: object, more: int
) -> None:
    base = step(block, root=root, micro_batches=micro_batches, **modes)
    name = field.name  # type: ignore[attr-defined]
    slower = replace(block, **{name: getattr(block, name) + more})
    assert run_lanes(replace(base, blocks=[slower] * 3)).compute >= run_lanes(base).compute


@given(LOADS, LOADS, st.integers(1, 9), st.sampled_from(MODES))
def test_compute_is_work_and_stalls(block: Load, root: Load, micro_batches: int, modes: dict[str, bool]) -> None:
    lanes = run_lanes(step(block, root=root, micro_batches=micro_batches, **modes))
    work = micro_batches * (3 * (block.forward + block.backward) + 3)
    assert lanes.compute == work + lanes.copies + lanes.gather_stall + lanes.reduce_stall


@given(LOADS, LOADS, st.integers(1, 9), st.sampled_from(MODES))
def test_the_bound_is_never_above_the_step(block: Load, root: Load, micro_batches: int, modes: dict[str, bool]) -> None:
    load = step(block, root=root, micro_batches=micro_batches, **modes)
    assert least_lane_seconds(load) <= run_lanes(load).compute
