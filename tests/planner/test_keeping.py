"""Choices of what a checkpointed block keeps, against a step by step simulation of PyTorch's cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.planner.keeping import Keeping, can_keep, keep_nothing, keep_products
from shardwright.schemas.profile import Affine, BackwardMoment, Call, Kind, Operator, UnitCost


@dataclass(frozen=True)
class Made:
    """The result of one call: forward frees it after the call `dies`, or backward after its call `released`."""

    size: int
    dies: int
    released: int | None
    kind: Kind
    gradient: int
    """What backward makes at that call, and frees at the next."""


@st.composite
def programs(draw: st.DrawFn) -> list[Made]:
    """Chains of calls, whose backward runs in the opposite order."""
    count = draw(st.integers(1, 6))
    return [
        Made(
            size=draw(st.integers(1, 50)),
            dies=draw(st.integers(at, count)),
            released=draw(st.none() | st.integers(0, at)),
            kind=draw(st.sampled_from(["matmul", "elementwise"])),
            gradient=draw(st.integers(0, 50)),
        )
        for at in range(count)
    ]


def stop_of(program: list[Made]) -> int:
    """Forward runs again until the last saved result is made."""
    return max((at + 1 for at, made in enumerate(program) if made.released is not None), default=0)


def simulate(program: list[Made], kept: set[int]) -> int:
    """The most bytes alive in backward beyond those before it, storage by storage."""
    cache = set(kept)
    anew: set[int] = set()
    before = alive = sum(program[at].size for at in cache)
    peak, stop = 0, stop_of(program)
    for now in range(stop):
        (cache.discard(now), anew.add(now)) if now in cache else anew.add(now)
        alive = sum(program[at].size for at in cache | anew)
        peak = max(peak, alive - before)
        anew = {at for at in anew if program[at].released is not None or program[at].dies > now}
    anew = {at for at in anew if program[at].released is not None}
    for now in reversed(range(len(program))):
        alive = sum(program[at].size for at in cache | anew) + program[now].gradient
        peak = max(peak, alive - before)
        anew = {at for at in anew if program[at].released != now}
    return peak


def cost_of(program: list[Made]) -> UnitCost:
    """The same as the profile tells it: every call under full checkpointing."""
    stop = stop_of(program)
    operators, calls = [], []
    for now, made in enumerate(program):
        here = [p.size for p in program[: now + 1] if p.released is not None or p.dies >= now]
        one = Affine(0, made.size)
        alive = Affine(0, sum(here)) if now < stop else Affine(0, 0)
        operators.append(operator(now, made.kind, one))
        calls.append(Call(operator=now, results=one, again=now < stop, alive=alive))
    after = [
        sum(p.size for p in program if p.released is not None and p.released <= now) + made.gradient
        for now, made in enumerate(program)
    ]
    highest = max([0, *(call.alive.slope for call in calls), *after])
    return UnitCost(
        operators=tuple(operators),
        saved={"none": Affine(0, 0), "selective": Affine(0, 0), "full": Affine(0, 7)},
        output=Affine(0, 1),
        forward_peak=Affine(0, 0),
        backward_peak={"none": Affine(0, 0), "full": Affine(0, highest)},
        not_recomputed=tuple(operators[stop:]),
        calls=tuple(calls),
        moments_after=tuple(BackwardMoment(Affine(0, size), 0, False) for size in after),
    )


def operator(at: int, kind: Kind, results: Affine, count: int = 1) -> Operator:
    return Operator(
        name=f"op{at}",
        module="",
        phase="forward",
        kind=kind,
        count=count,
        flops=Affine(0, 10 * count),
        bytes=Affine(0, 3 * count),
        shapes=((1,),),
        dtype="bfloat16",
        results=results,
    )


@settings(max_examples=60)
@given(programs())
def test_every_choice_is_what_the_simulation_says(program: list[Made]) -> None:
    cost = cost_of(program)
    everything = range(len(program))
    for chosen in (set(part) for size in range(len(program) + 1) for part in combinations(everything, size)):
        keeping = Keeping.of(cost, lambda op, chosen=chosen: int(op.name[2:]) in chosen)
        assert keeping.backward_peak.at(3) == 3 * simulate(program, chosen)
        assert keeping.saved == Affine(0, 7 + sum(program[at].size for at in chosen))
        assert keeping.flops(2) == 20 * len(set(range(stop_of(program))) - chosen)


@given(programs())
def test_more_is_kept_for_less_work(program: list[Made]) -> None:
    cost = cost_of(program)
    full, selective = Keeping.of(cost, keep_nothing), Keeping.of(cost, keep_products)
    assert full == Keeping.named(cost, "full")
    assert full.backward_peak == cost.backward_peak["full"]
    assert selective.saved.slope >= full.saved.slope
    assert selective.flops(1) <= full.flops(1)
    assert not [op for op in selective.recomputed if op.kind == "matmul"]


def test_calls_of_one_operator_before_and_after_the_stop() -> None:
    cost = cost_of([Made(5, 1, 0, "elementwise", 0)])
    twice, once = (operator(0, "elementwise", Affine(0, 5), count) for count in (2, 1))
    cost = replace(cost, operators=(twice,), not_recomputed=(once,))
    (again,) = Keeping.of(cost, keep_nothing).recomputed
    assert (again.count, again.flops, again.bytes) == (1, Affine(0, 10), Affine(0, 3))


def test_a_kept_output_moves_from_the_saved_bytes_to_the_peak() -> None:
    cost = cost_of([Made(5, 1, 0, "matmul", 0)])
    (call,) = cost.calls
    leaving = Call(operator=0, results=call.results, elsewhere=call.results, again=False, alive=Affine(0, 0))
    staying = replace(leaving, elsewhere=Affine(0, 0))
    plain, moved = (
        Keeping.of(replace(cost, calls=(each,), moments_after=()), keep_products) for each in (staying, leaving)
    )
    assert (plain.saved.slope, plain.backward_peak.slope) == (12, 0)
    assert (moved.saved.slope, moved.backward_peak.slope) == (7, 5)


def test_moments_keep_bytes_and_gradients_apart() -> None:
    cost = replace(
        cost_of([Made(5, 1, 0, "matmul", 0)]),
        moments_before=(BackwardMoment(Affine(0, 2), 30, False),),
        moments_after=(BackwardMoment(Affine(0, 6), 40, False), BackwardMoment(Affine(0, 4), 50, False)),
        crossing=Affine(0, 100),
    )
    full, kept = Keeping.of(cost, keep_nothing), Keeping.of(cost, keep_products)
    assert full.backward_moments == (
        BackwardMoment(Affine(0, 106), 40, False),
        BackwardMoment(Affine(0, 104), 50, False),
    )
    assert kept.backward_moments == (
        BackwardMoment(Affine(0, 102), 30, False),
        BackwardMoment(Affine(0, 101), 40, False),
        BackwardMoment(Affine(0, 99), 50, False),
    )
    assert full.backward_peak == Affine(0, 106)


@pytest.mark.parametrize(("results", "phase"), [(Affine(0, 0), "forward"), (Affine(0, 5), "input_gradient")])
def test_what_cannot_be_kept(results: Affine, phase: str) -> None:
    assert not can_keep(replace(operator(0, "matmul", results), phase=phase))
