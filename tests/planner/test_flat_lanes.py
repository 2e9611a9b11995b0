"""The lanes of `ShardedStates`, by hand and by property."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.planner.flat_lanes import Communication, FlatStep, FlatUnit, Hops, run_flat

NOTHING = Communication()
FAST, SLOW = 0, 1


def step(sends: Communication, *, forward: float = 10, backward: float = 20, **others: object) -> FlatStep:
    """Three blocks; the head takes 1 and 2."""
    plain = FlatStep(
        blocks=[FlatUnit(forward, backward, sends)] * 3,
        root=NOTHING,
        embedding=(0, 0),
        head=(1, 2),
        micro_batches=1,
        kept=False,
        wires=2,
    )
    return replace(plain, **others)  # type: ignore[arg-type]


def one(wire: int, seconds: float) -> tuple[Hops, ...]:
    """A chain of one hop."""
    return (((wire, seconds),),)


def test_compute_alone() -> None:
    assert run_flat(step(NOTHING, micro_batches=7)).compute == 7 * (3 * 30 + 3)


def test_only_the_first_gather_is_exposed() -> None:
    """In backward the last block's gather is hidden behind the head's backward, as far as that goes."""
    totals = run_flat(step(Communication(gathers=one(FAST, 4), again=one(FAST, 4))))
    assert totals.gather_stall == 4 + (4 - 2)
    assert totals.reduce_stall == 0


def test_only_the_last_reduction_is_exposed() -> None:
    totals = run_flat(step(Communication(reductions=one(FAST, 5), last_reductions=one(FAST, 5))))
    assert totals.reduce_stall == 5
    assert totals.compute == 93 + 5


def test_the_second_hop_of_a_gather_waits_for_the_first() -> None:
    """It is issued when the block is waited for."""
    hops = (((SLOW, 3.0), (FAST, 2.0)),)
    totals = run_flat(step(Communication(gathers=hops)))
    assert totals.gather_stall == 3 + 2 + 2 + 2
    ahead = run_flat(step(Communication(gathers=hops), gather_hops=2))
    assert ahead.gather_stall == 3 + 2 + 1


def test_chains_of_reductions_go_on_side_by_side() -> None:
    """Over two wires the first hop of one block runs beside the second of the one before, which is issued with it: what
    is left after the last backward is the slow wire's load of two blocks."""
    hops = (((FAST, 5.0), (SLOW, 15.0)),)
    totals = run_flat(step(Communication(last_reductions=hops)))
    assert totals.reduce_stall == 15 + 15


def test_gathers_and_reductions_contend_for_a_wire() -> None:
    both = Communication(again=one(FAST, 15), last_reductions=one(FAST, 15))
    apart = Communication(again=one(FAST, 15), last_reductions=one(SLOW, 15))
    assert run_flat(step(both)).compute > run_flat(step(apart)).compute


def test_what_the_optimizer_changed_travels_beside_the_next_forward() -> None:
    """The first block waits; the others have theirs while it computes. Where they are gathered as well, the second
    block's is waited for before the first one runs, since its gather starts there."""
    publishes = step(Communication(publications=one(SLOW, 6)))
    assert run_flat(replace(publishes, gather_hops=0)).gather_stall == 6
    assert run_flat(publishes).gather_stall == 6 + 6
    assert run_flat(replace(publishes, micro_batches=3)).gather_stall == 6 + 6


def test_parameters_that_stay_are_gathered_once() -> None:
    sends = Communication(gathers=one(FAST, 4), again=one(FAST, 4))
    assert run_flat(step(sends, kept=True, micro_batches=3)).gather_stall == 4


def test_whole_gradients_are_copied_first_and_then_added() -> None:
    """Three blocks: 3 each for a copy, 3 + 2 for every later micro-batch."""
    sends = Communication(hand_over=3, add_whole=2)
    copies = [run_flat(step(sends, micro_batches=count)).copies for count in (1, 2, 20)]
    assert copies == [9, 9 + 15, 9 + 19 * 15]


def test_repeated_micro_batches_equal_simulated_ones() -> None:
    """Twenty micro-batches, of which only five are simulated, against the growth from ten to eleven."""
    sends = Communication(
        gathers=one(SLOW, 9), again=one(FAST, 7), reductions=one(FAST, 8), last_reductions=one(SLOW, 5)
    )
    ten, eleven, twenty = (run_flat(step(sends, micro_batches=count)).compute for count in (10, 11, 20))
    assert twenty == pytest.approx(ten + 10 * (eleven - ten))


SECONDS = st.integers(0, 50)
CHAINS = st.lists(st.lists(st.tuples(st.integers(0, 1), SECONDS), max_size=2).map(tuple), max_size=2).map(tuple)
SENDS = st.builds(
    Communication,
    gathers=CHAINS,
    again=CHAINS,
    reductions=CHAINS,
    last_reductions=CHAINS,
    publications=CHAINS,
    keep=SECONDS,
    hand_over=SECONDS,
    add_whole=SECONDS,
    add=SECONDS,
)


@given(SENDS, SENDS, st.integers(1, 6), st.booleans(), st.integers(0, 1), st.integers(1, 4))
def test_slower_links_are_never_faster(
    block: Communication, root: Communication, micro_batches: int, kept: bool, wire: int, factor: int
) -> None:
    """The same order of issue, one link slower."""

    def slower(sends: Communication) -> Communication:
        chains = {
            field.name: tuple(
                tuple((at, seconds * (factor if at == wire else 1)) for at, seconds in hops)
                for hops in getattr(sends, field.name)
            )
            for field in fields(Communication)
            if field.name not in ("keep", "hand_over", "add_whole", "add")
        }
        return replace(sends, **chains)  # type: ignore[arg-type]

    fast = step(block, root=root, micro_batches=micro_batches, kept=kept)
    slow = step(slower(block), root=slower(root), micro_batches=micro_batches, kept=kept)
    assert run_flat(slow).compute >= run_flat(fast).compute


@given(SENDS, SENDS, st.integers(1, 9), st.booleans())
def test_compute_is_work_and_stalls(block: Communication, root: Communication, micro_batches: int, kept: bool) -> None:
    totals = run_flat(step(block, root=root, micro_batches=micro_batches, kept=kept))
    assert totals.compute == micro_batches * 93 + totals.copies + totals.gather_stall + totals.reduce_stall
