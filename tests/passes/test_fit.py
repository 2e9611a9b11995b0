"""Lines through three points, and lines above many."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.passes.fit import NotAffine, fit, fit_peak
from shardwright.schemas.profile import Affine

lines = st.builds(Affine, st.integers(-1000, 1000), st.integers(0, 1000))


@given(lines)
def test_a_line_is_found_again(line: Affine) -> None:
    assert fit([line.at(2), line.at(3), line.at(4)], "it is") == line


@given(lines, st.integers(-5, 5).filter(bool))
def test_what_is_no_line_is_refused(line: Affine, off: int) -> None:
    with pytest.raises(NotAffine, match="it is"):
        fit([line.at(2), line.at(3), line.at(4) + off], "it is")


@given(st.lists(lines, min_size=1), st.integers(1, 50))
def test_a_peak_lies_above_every_moment(moments: list[Affine], micro_batch: int) -> None:
    rises = [[line.at(b) for line in moments] for b in (2, 3, 4)]
    peak = fit_peak(rises, "forward")
    assert peak.at(micro_batch) >= max(0, *(line.at(micro_batch) for line in moments))
    assert peak.at(1) == max(0, *(line.at(1) for line in moments))


@given(st.lists(lines, min_size=1), st.integers(1, 50))
def test_a_moment_that_is_always_highest_is_the_peak(moments: list[Affine], micro_batch: int) -> None:
    highest = Affine(max(line.constant for line in moments), max(line.slope for line in moments))
    rises = [[line.at(b) for line in (*moments, highest)] for b in (2, 3, 4)]
    if highest.at(1) >= 0:
        assert fit_peak(rises, "forward").at(micro_batch) == highest.at(micro_batch)


def test_moments_must_stay_the_same() -> None:
    with pytest.raises(NotAffine, match="allocations"):
        fit_peak([[1], [1, 2], [1, 2]], "forward")
