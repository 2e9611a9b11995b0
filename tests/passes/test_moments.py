"""Which moments of a backward are kept, and how parameter gradients appear in them."""

from __future__ import annotations

import pytest

from passes.jobs import USER, make_job
from shardwright.passes import profile_model
from shardwright.passes.fit import NotAffine
from shardwright.passes.moments import Instant, worst_moments
from shardwright.schemas.profile import Affine, BackwardMoment, ModelProfile


def runs(*moments: tuple[int, int, int, bool]) -> list[list[Instant]]:
    """At micro-batch 2, 3 and 4, of moments as constant, slope, gradients and whether they lie in the loss."""
    return [[Instant(at + slope * b, made, in_loss) for at, slope, made, in_loss in moments] for b in (2, 3, 4)]


def test_only_what_nothing_else_exceeds_is_kept() -> None:
    found = worst_moments(runs((5, 1, 0, False), (0, 9, 0, False), (-4, 2, 7, False), (-5, 2, 7, False)), Affine(0, 0))
    assert found == (
        BackwardMoment(Affine(0, 9), 0, False),
        BackwardMoment(Affine(-4, 2), 7, False),
    )


def test_one_moment_may_exceed_another_at_some_micro_batches_only() -> None:
    found = worst_moments(runs((100, 1, 0, False), (0, 9, 0, False)), Affine(0, 0))
    assert found == (BackwardMoment(Affine(100, 1), 0, False), BackwardMoment(Affine(0, 9), 0, False))


def test_loss_and_model_are_kept_apart_and_everything_is_shifted() -> None:
    found = worst_moments(runs((0, 9, 0, True), (0, 3, 2, False)), Affine(1, 1))
    assert found == (BackwardMoment(Affine(1, 10), 0, True), BackwardMoment(Affine(1, 4), 2, False))


def test_moments_that_differ_in_number_are_refused() -> None:
    with pytest.raises(NotAffine, match="more allocations"):
        worst_moments([[], [Instant(1, 0, False)], []], Affine(0, 0))


@pytest.fixture(scope="module")
def gpt() -> ModelProfile:
    return profile_model(make_job({"factory": "gpt:build"}), USER, ("bf16",))


def test_all_gradients_exist_in_the_end(gpt: ModelProfile) -> None:
    for index, unit in enumerate(gpt.units):
        if unit.kind == "block":
            numel = sum(parameter.numel for parameter in gpt.parameters if parameter.unit == index) // unit.count
            for moments in unit.costs["bf16"].backward_moments.values():
                assert max(moment.gradients for moment in moments) == numel


def test_the_highest_moment_is_the_peak(gpt: ModelProfile) -> None:
    for unit in gpt.units:
        cost = unit.costs["bf16"]
        for policy, moments in cost.backward_moments.items():
            assert max(moment.bytes.at(1) for moment in moments) == cost.backward_peak[policy].at(1)


def test_the_loss_comes_before_the_head(gpt: ModelProfile) -> None:
    head = gpt.units[-1].costs["bf16"].backward_moments["none"]
    assert [moment.in_loss for moment in head] == sorted((moment.in_loss for moment in head), reverse=True)
    assert head[0].in_loss
    assert not head[-1].in_loss
    assert all(moment.gradients == 0 for moment in head if moment.in_loss)
