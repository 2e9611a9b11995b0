"""What every drawing is made of: headings, tables that survive a narrow terminal, bars, and numbers for people.

A drawing is a rich renderable. It is built without knowing the terminal: what depends on its width or its character
set is decided in `__rich_console__`, when somebody prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from shardwright.schemas.units import human_seconds

_GAP = 2  # empty columns between two cells
_NARROWEST_PROSE = 20  # a wrapping column narrower than this reads badly
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar, `share` of at most `width` columns long (a share above 1 fills it). `track` shows what is left.

    Drawn with block characters, or with `#` and `.` where the terminal's encoding has none.
    """

    share: float
    width: int = 20
    style: str = "cyan"
    track: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(self.width, options.max_width)
        filled = min(1.0, max(0.0, self.share)) * width
        if options.ascii_only:
            bar, rest = "#" * round(filled), "."
        else:
            eighths = round(filled * 8)
            bar, rest = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip(), "░"
        yield Text.assemble((bar, self.style), (rest * (width - len(bar)) if self.track else "", "dim"))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, self.width)


Cell = str | Text | Bar


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a `Grid`. Text and numbers keep to one line; prose wraps. A newline in the title breaks it."""

    title: str
    kind: Literal["text", "number", "prose"] = "text"
    style: str = ""

    @property
    def titled(self) -> int:
        """Columns that the title takes."""
        return max(map(cell_len, self.title.split("\n")))


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a `Grid`; `style` sets it apart from the others."""

    cells: Sequence[Cell]
    style: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table. Where the terminal is too narrow for it, each row becomes a short list of `title value` lines instead,
    so that nothing is cut off and no line is wider than the terminal. A `continued` table first tries to go on below
    with the columns that do not fit, beginning with the first column again.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    continued: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width
        pieces = self._pieces(room) if self.continued else [list(range(len(self.columns)))]
        tables = [self._only(piece) for piece in pieces]
        if all(table._widths(room) for table in tables):
            yield page(*(table._table(table._widths(room)) for table in tables))
        else:
            yield self._records()

    def _pieces(self, room: int) -> list[list[int]]:
        """The columns of each table: as many as fit beside the first."""
        pieces = [[0]]
        for index in range(1, len(self.columns)):
            if len(pieces[-1]) == 1 or self._only([*pieces[-1], index])._widths(room):
                pieces[-1].append(index)
            else:
                pieces.append([0, index])
        return pieces

    def _only(self, indices: Sequence[int]) -> Grid:
        """The same table with some of its columns."""
        rows = [Row([row.cells[index] for index in indices], row.style) for row in self.rows]
        return Grid([self.columns[index] for index in indices], rows)

    def _widths(self, room: int) -> list[int]:
        """Width of each column, prose sharing what is left over by need; empty where the table has no room.

        rich's own distribution may crop a cell when several columns have a minimum, so every width is set here.
        """
        natural = [self._natural(index) for index in range(len(self.columns))]
        widths = [
            max(column.titled, min(width, _NARROWEST_PROSE) if column.kind == "prose" else width)
            for column, width in zip(self.columns, natural, strict=True)
        ]
        spare = room - sum(widths) - _GAP * (len(widths) - 1)
        if spare < 0:
            return []
        wishes = [max(0, wish - width) for wish, width in zip(natural, widths, strict=True)]
        share = min(1.0, spare / (sum(wishes) or 1))
        return [width + int(wish * share) for width, wish in zip(widths, wishes, strict=True)]

    def _natural(self, index: int) -> int:
        """Columns that the widest cell takes on one line."""
        return max((_cell_width(row.cells[index]) for row in self.rows), default=0)

    def _table(self, widths: Sequence[int]) -> Table:
        titled = any(column.title for column in self.columns)
        table = _bare_table(box.SIMPLE_HEAD if titled else None)
        for column, width in zip(self.columns, widths, strict=True):
            table.add_column(
                Text(column.title, style="dim"),
                justify="right" if column.kind == "number" else "left",
                style=column.style,
                width=max(1, width),
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*map(_drawn, row.cells), style=row.style)
        return table

    def _records(self) -> Group:
        records: list[RenderableType] = []
        for row in self.rows:
            records.append(Text.assemble(_drawn_text(row.cells[0]), style=row.style or "bold"))
            titles = [column.title.replace("\n", " ") for column in self.columns[1:]]
            pairs = [(title, cell) for title, cell in zip(titles, row.cells[1:], strict=True) if cell]
            records.append(facts(pairs))
        return Group(*records)


class Footnotes:
    """Texts that many rows refer to, each said once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        """What stands in the row: ` [1]`, or nothing where there is nothing to say."""
        return f" [{self._numbers.setdefault(text, len(self._numbers) + 1)}]" if text else ""

    def drawn(self) -> Grid:
        """The texts under the table."""
        rows = [Row((f"[{number}]", text)) for text, number in self._numbers.items()]
        return Grid((Column(""), Column("", "prose", "dim")), rows)


def _cell_width(cell: Cell) -> int:
    return cell.width if isinstance(cell, Bar) else max(map(cell_len, str(cell).split("\n")))


def _drawn(cell: Cell) -> RenderableType:
    return Text(cell) if isinstance(cell, str) else cell


def _drawn_text(cell: Cell) -> Text:
    return cell if isinstance(cell, Text) else Text("" if isinstance(cell, Bar) else cell)


def _bare_table(lines: box.Box | None) -> Table:
    """A table with `_GAP` columns between cells; a box draws one of them itself."""
    gap = _GAP if lines is None else _GAP - 1
    return Table(box=lines, show_header=lines is not None, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))


def facts(pairs: Iterable[tuple[str, Cell]], indent: int = 2) -> Padding:
    """Labels with their values, one a line; a value that is too long wraps beside its label."""
    table = _bare_table(None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in pairs:
        table.add_row(Text(label), _drawn(value))
    return Padding(table, (0, 0, 0, indent), expand=False)


def paragraph(text: str, style: str = "", indent: int = 0) -> Padding:
    """Free text, wrapped to the terminal and taken as it is: square brackets mean nothing."""
    return Padding(Text(text, style=style), (0, 0, 0, indent), expand=False)


def heading(title: str, note: str = "") -> Group:
    """The title of a section, with an explanation under it."""
    return Group(Text(title, style="bold"), *([Text(note, style="dim")] if note else []))


def page(*parts: RenderableType) -> Group:
    """Sections, with an empty line between each two."""
    spaced = [piece for part in parts for piece in (Text(), part)]
    return Group(*spaced[1:])


def percent(share: float) -> str:
    """0.0412 to `4.1 %`."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """For people, up to days: 61200 to `17.0 h`."""
    for unit, scale in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return human_seconds(seconds)


def plural(count: int, noun: str, nouns: str = "") -> str:
    """`1 block`, `12 blocks`, `8 processes`."""
    return f"{grouped(count)} {noun if count == 1 else nouns or noun + 's'}"


def grouped(count: int) -> str:
    """Thousands set apart by a space: 152588 to `152 588`."""
    return f"{count:,}".replace(",", " ")


def human_flops(value: float) -> str:
    """FLOPs in the prefixes that rates of compute are quoted in: 6.9e15 to `6.9 P`."""
    for prefix, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}" if abs(value) < 999.5 * scale else f"{value / scale:.0f} {prefix}"
    return f"{value:.0f}"
