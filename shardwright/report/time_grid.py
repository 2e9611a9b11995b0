"""A grid of what the ranks of a pipeline do: one row per rank, time from left to right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from shardwright.planner.schedules.simulator import Lane
from shardwright.planner.schedules.timetable import Action, Timetable

IDLE, FILL, MARKED = ".", "-", "bold white on red"
KINDS = {"F": "forward", "I": "input gradient", "W": "weight gradient", "B": "both in one"}
_STYLES = {
    ("F", 0): "black on bright_cyan",
    ("F", 1): "white on blue",
    ("I", 0): "black on bright_green",
    ("I", 1): "white on green",
    ("W", 0): "black on bright_yellow",
    ("W", 1): "black on yellow",
    ("B", 0): "black on bright_magenta",
    ("B", 1): "white on magenta",
}
"""By kind, and by whether the chunk is odd."""


def number(value: float) -> str:
    """Six digits at most."""
    return f"{value:.6g}"


def legend(timetable: Timetable) -> Text:
    """The letters that occur."""
    actions = {(action.kind, action.chunk % 2) for lane in timetable for action in lane}
    kinds = [kind for kind in KINDS if any(each == kind for each, _ in actions)]
    text = Text(style="dim")
    for kind in kinds:
        text.append(f" {kind} ", _STYLES[kind, 0]).append(f" {KINDS[kind]}  ")
    text.append(f"{IDLE} idle")
    if any(odd for _, odd in actions):
        text.append(f"\n{', '.join(kinds).lower()}: the same of odd chunks")
    return text


@dataclass(frozen=True, slots=True)
class TimeGrid:
    """Rows of ranks, scaled to the width of the terminal. Where every action is wide enough it is written with its
    micro-batch, or else by its letter; where some are narrower than a column, each column has the letter of what takes
    most of its time.

    `stop`: a rank, and what is marked behind its last action.
    """

    lanes: Sequence[Lane]
    peaks: Sequence[str] = ()
    """What stands at the end of each row."""
    stop: tuple[int, str] | None = None
    unit: str = ""
    """Of the times."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        peak_width = max(map(len, ("peak", *self.peaks))) if self.peaks else 0
        number_width = max(4, len(str(len(self.lanes) - 1)))
        mark = f">{self.stop[1]}<" if self.stop else ""
        room = options.max_width - number_width - 1 - (peak_width + 1 if peak_width else 0)
        end = max(map(end_of, self.lanes), default=0.0)
        scale = _Scale(end, max(8, room - len(mark)))
        rows = scale.rows(self.lanes)
        head = f"{'rank':>{number_width}} t=0{'t=' + number(end) + self.unit:>{scale.width - 3}}"
        yield Text(f"{head:<{number_width + 1 + max(scale.width, room)}} {'peak' if self.peaks else ''}", "dim")
        for rank, row in enumerate(rows):
            line = Text(f"{rank:>{number_width}} ", "dim", no_wrap=True)
            if self.stop and rank == self.stop[0]:
                line.append(row[: scale.column(end_of(self.lanes[rank]))]).append(mark, MARKED)
            else:
                line.append(row)
            if self.peaks:
                line.append(f" {self.peaks[rank]:>{peak_width}}", "default")
            yield line


def beginning(lanes: Sequence[Lane], until: float) -> list[Lane]:
    """What runs before a time; what runs then ends with it."""
    return [tuple((action, start, min(end, until)) for action, start, end in lane if start < until) for lane in lanes]


def end_of(lane: Lane) -> float:
    """Of its last action."""
    return lane[-1][2] if lane else 0.0


@dataclass(frozen=True, slots=True)
class _Scale:
    """Times from 0 to `end` on `width` columns."""

    end: float
    width: int

    def column(self, time: float) -> int:
        """The column boundary nearest to a time."""
        return round(time / self.end * self.width) if self.end else 0

    def rows(self, lanes: Sequence[Lane]) -> list[Text]:
        """One line of cells for each rank, all written in the most telling way that has room."""
        narrow: dict[int, int] = {}
        """By length of the whole label, the fewest columns that such an action has."""
        for lane in lanes:
            for action, start, end in lane:
                length, room = len(_label(action)), self.column(end) - self.column(start)
                narrow[length] = min(narrow.get(length, room), room)
        if all(room >= length for length, room in narrow.items()):
            return [self._singly(lane, None) for lane in lanes]
        return [self._singly(lane, 1) if min(narrow.values()) else self._letters(lane) for lane in lanes]

    def _singly(self, lane: Lane, most: int | None) -> Text:
        """Every action with its label, cut off at a number of characters."""
        text = Text()
        for action, start, end in lane:
            text.append(IDLE * (self.column(start) - len(text)), "dim")
            text.append(f"{_label(action)[:most]:{FILL}<{self.column(end) - self.column(start)}}", _style(action))
        return text.append(IDLE * (self.width - len(text)), "dim")

    def _letters(self, lane: Lane) -> Text:
        text = Text()
        for shares in self._shares(lane):
            (kind, odd), share = max(shares.items(), key=lambda each: each[1], default=(("", 0), 0.0))
            if 2 * sum(shares.values()) > 1 and share:
                text.append(kind.lower() if odd else kind, _STYLES[kind, odd])
            else:
                text.append(IDLE, "dim")
        return text

    def _shares(self, lane: Lane) -> Iterator[dict[tuple[str, int], float]]:
        """For each column, the share of its time of each kind of even and of odd chunks."""
        columns: list[dict[tuple[str, int], float]] = [{} for _ in range(self.width)]
        for action, start, end in lane:
            first, last = (time / self.end * self.width if self.end else 0.0 for time in (start, end))
            key = action.kind, action.chunk % 2
            for column in range(int(first), min(self.width, int(last) + 1)):
                share = min(last, column + 1) - max(first, column)
                columns[column][key] = columns[column].get(key, 0.0) + share
        yield from columns


def _label(action: Action) -> str:
    """`F12`, or `f12` of an odd chunk."""
    return f"{action.kind.lower() if action.chunk % 2 else action.kind}{action.micro_batch}"


def _style(action: Action) -> str:
    return _STYLES[action.kind, action.chunk % 2]
