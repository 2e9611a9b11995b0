from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from report.test_drawings import drawn
from shardwright.report.layout import Bar, Column, Grid, Row, duration, facts, human_flops, paragraph, percent, plural
from shardwright.report.memory import common_unit, in_unit

CELLS = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=30).map(str.strip)

PROSE = st.lists(st.text("abcdefghijklm", min_size=1, max_size=12), max_size=12).map(" ".join)


@given(st.lists(st.tuples(CELLS, CELLS, PROSE, PROSE), min_size=1, max_size=4), st.integers(24, 120))
def test_grid_never_exceeds_its_width_and_keeps_every_character(rows: list[tuple[str, ...]], width: int) -> None:
    columns = (Column("name"), Column("number", "number"), Column("because", "prose"), Column("", "prose"))
    text = drawn(Grid(columns, [Row(row) for row in rows]), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert Counter("".join(map("".join, rows)).replace(" ", "")) <= Counter(text)


def test_grid_is_a_table_where_it_fits_and_a_list_where_not() -> None:
    grid = Grid((Column("unit"), Column("bytes", "number")), [Row(("embedding", "12.5 MiB")), Row(("head", "1 GiB"))])
    wide, narrow = drawn(grid, 40), drawn(grid, 16)
    assert wide.splitlines()[0].split() == ["unit", "bytes"]
    assert "embedding  12.5 MiB" in wide
    assert narrow.splitlines() == ["embedding", "  bytes  12.5", "         MiB", "head", "  bytes  1 GiB"]


def test_continued_table_goes_on_below() -> None:
    columns = (Column(""), *(Column(name, "number") for name in ("one", "two", "three")))
    grid = Grid(columns, [Row(("x", "1.00", "2.00", "3.00"))], continued=True)
    assert len(drawn(grid, 40).splitlines()) == 3
    below = drawn(grid, 14).splitlines()
    assert [line.split() for line in (below[0], below[2], below[4], below[6])] == [
        ["one", "two"],
        ["x", "1.00", "2.00"],
        ["three"],
        ["x", "3.00"],
    ]


def test_brackets_are_text_not_markup() -> None:
    assert drawn(paragraph("a [bold]list[/bold] [1, 4]"), 80) == "a [bold]list[/bold] [1, 4]\n"
    assert "[red]" in drawn(facts([("key", "[red]")]), 80)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, "░░░░"), (0.5, "██░░"), (0.59, "██▍░"), (1.0, "████"), (7.0, "████"), (-1.0, "░░░░")]
)
def test_bar(share: float, expected: str) -> None:
    assert drawn(Bar(share, 4, track=True), 80) == f"{expected}\n"


def test_bar_without_unicode_or_room() -> None:
    assert drawn(Bar(0.5, 8, track=True), 80, "ascii") == "####....\n"
    assert drawn(Bar(0.5, 80, track=True), 10) == "█████░░░░░\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.012, "12 ms"), (61, "61 s"), (600, "10.0 min"), (61_200, "17.0 h"), (500_000, "5.8 d")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (950, "950"), (1.6e7, "16 M"), (6.9e15, "6.9 P"), (2e18, "2 E")])
def test_human_flops(value: float, text: str) -> None:
    assert human_flops(value) == text


def test_small_words() -> None:
    assert plural(1, "block") == "1 block"
    assert plural(12_000, "block") == "12 000 blocks"
    assert plural(8, "process", "processes") == "8 processes"
    assert percent(0.0412) == "4.1 %"


def test_one_unit_for_a_whole_table() -> None:
    assert common_unit(3 * 2**30) == ("GiB", 2**30)
    assert common_unit(512) == ("bytes", 1)
    assert [in_unit(size, 2**30) for size in (0, 24, 2**30)] == ["-", "<0.01", "1.00"]
