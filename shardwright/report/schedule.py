"""Drawings of a pipeline schedule: a grid with one row per rank and time from left to right, and its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.simulator import Lane, Simulation
from shardwright.planner.schedules.text import action_text
from shardwright.planner.schedules.timetable import Action, Timetable
from shardwright.report.layout import facts, heading, page, percent, plural
from shardwright.schemas.expected import join

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
_NEGLIGIBLE = 1e-9
_CONTEXT = 4
"""Actions shown before and after one that cannot run."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A simulated schedule with what is told about it."""

    family: str
    simulation: Simulation
    period: float
    """Time of an iteration when many follow each other."""
    lower_bound: float
    """No schedule of these stages within the memory limit has a shorter span."""

    @property
    def gap(self) -> float:
        """How much longer the span is than the lower bound, as a share of the bound."""
        gap = self.simulation.span / self.lower_bound - 1 if self.lower_bound else 0.0
        return gap if gap > _NEGLIGIBLE else 0.0

    @property
    def bubble_rate(self) -> float:
        """Of the span, as the zero-bubble papers define it."""
        return _not_negligible(self.simulation.bubble_rate())

    @property
    def steady_state_bubble(self) -> float:
        """The share of the steady period that the busiest rank waits."""
        return _not_negligible(1 - self.simulation.work / self.period if self.period else 0.0)

    @property
    def peak_memory(self) -> tuple[float, ...]:
        """Per rank, without the noise of adding up."""
        return tuple(round(peak, 9) for peak in self.simulation.peak_memory)


@dataclass(frozen=True, slots=True)
class Misfit:
    """A family that has no schedule within the memory, or a timetable beyond it. Memory is per rank, in activations of
    one micro-batch of a whole device."""

    family: str
    limits: tuple[float, ...]
    needed: tuple[float, ...]
    others: tuple[str, ...] = ()
    """Families that fit."""
    given: bool = False
    """Whether it is one timetable of the user's, rather than whatever the family makes."""

    @property
    def rank(self) -> int:
        """The rank that lacks most."""
        return max(range(len(self.limits)), key=lambda rank: self.needed[rank] - self.limits[rank])

    @property
    def excess(self) -> float:
        """What that rank lacks."""
        return self.needed[self.rank] - self.limits[self.rank]


def misfit_fields(misfit: Misfit) -> dict[str, Any]:
    """The misfit as plain JSON values."""
    return {
        "family": misfit.family,
        "memory_limit": list(misfit.limits),
        "needed": [round(needed, 9) for needed in misfit.needed],
        "rank": misfit.rank,
        "excess": round(misfit.excess, 9),
    }


def draw_misfit(misfit: Misfit) -> Group:
    """Needed against allowed, and what would help."""
    rank = misfit.rank
    verdict = Text.assemble(
        (f"{'This timetable does not fit' if misfit.given else 'No schedule fits'}. ", "bold red"),
        f"{misfit.family} keeps activations of up to {_number(misfit.needed[rank])} micro-batches on rank {rank}, "
        f"{_number(misfit.excess)} more than the limit of {_number(misfit.limits[rank])}.",
    )
    ways = [f"--memory-limit {_number(max(misfit.needed))} is the least that it fits into"]
    ways += [f"--family {join(misfit.others, 'or')} fits into this one"] if misfit.others else []
    return page(verdict, facts([("help", "; ".join(ways))]))


def _not_negligible(share: float) -> float:
    return share if abs(share) > _NEGLIGIBLE else 0.0


def schedule_fields(schedule: Schedule) -> dict[str, Any]:
    """The schedule as plain JSON values; times in the unit of the costs, memory in activations of one micro-batch of a
    whole device, `gap` and the bubbles as shares."""
    return {
        "family": schedule.family,
        "bubble_rate": schedule.bubble_rate,
        "makespan": schedule.simulation.makespan,
        "steady_state_bubble": schedule.steady_state_bubble,
        "peak_memory": list(schedule.peak_memory),
        "lower_bound": schedule.lower_bound,
        "gap": schedule.gap,
        "timetable": [[_action_fields(*step) for step in lane] for lane in schedule.simulation.ranks],
    }


def _action_fields(action: Action, start: float, end: float) -> dict[str, Any]:
    return {**action._asdict(), "start": start, "end": end}


def draw_schedule(schedule: Schedule) -> Group:
    """The grid, what its letters mean, and the numbers."""
    simulation = schedule.simulation
    peaks = [f"{peak:.2f}" for peak in schedule.peak_memory]
    return page(
        heading(schedule_title(schedule)),
        Group(TimeGrid(simulation.ranks, peaks), _legend(simulation.timetable)),
        facts(schedule_facts(schedule)),
    )


def schedule_title(schedule: Schedule) -> str:
    """`zb-h1: 4 stages, 8 micro-batches`."""
    simulation = schedule.simulation
    layout, chunks = simulation.layout, simulation.layout.chunks
    on = f" on {plural(layout.ranks, 'device')} ({plural(chunks, 'chunk')} each)" if chunks > 1 else ""
    batches = plural(simulation.micro_batches, "micro-batch", "micro-batches")
    return f"{schedule.family}: {plural(layout.stages, 'stage')}{on}, {batches}"


def schedule_facts(schedule: Schedule) -> list[tuple[str, str]]:
    """Its numbers with their names."""
    simulation = schedule.simulation
    gap = f"{percent(schedule.gap)} above it" if schedule.gap else "reached: no schedule is shorter"
    return [
        ("bubble rate", f"{schedule.bubble_rate:.4f} of the longest span, {_number(simulation.span)}"),
        ("makespan", _number(simulation.makespan)),
        (
            "steady state",
            f"{_number(schedule.period)} an iteration, {schedule.steady_state_bubble:.4f} of it bubble",
        ),
        ("peak memory", f"{max(schedule.peak_memory):.2f} micro-batches' activations of a device"),
        ("lower bound", f"{_number(schedule.lower_bound)} of the span; {gap}"),
    ]


def _number(value: float) -> str:
    return f"{value:.6g}"


def _legend(timetable: Timetable) -> Text:
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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        peak_width = max(map(len, ("peak", *self.peaks))) if self.peaks else 0
        number_width = max(4, len(str(len(self.lanes) - 1)))
        mark = f">{self.stop[1]}<" if self.stop else ""
        room = options.max_width - number_width - 1 - (peak_width + 1 if peak_width else 0)
        end = max(map(_end, self.lanes), default=0.0)
        scale = _Scale(end, max(8, room - len(mark)))
        rows = scale.rows(self.lanes)
        head = f"{'rank':>{number_width}} t=0{'t=' + _number(end):>{scale.width - 3}}"
        yield Text(f"{head:<{number_width + 1 + max(scale.width, room)}} {'peak' if self.peaks else ''}", "dim")
        for rank, row in enumerate(rows):
            line = Text(f"{rank:>{number_width}} ", "dim", no_wrap=True)
            if self.stop and rank == self.stop[0]:
                line.append(row[: scale.column(_end(self.lanes[rank]))]).append(mark, MARKED)
            else:
                line.append(row)
            if self.peaks:
                line.append(f" {self.peaks[rank]:>{peak_width}}", "default")
            yield line


def _end(lane: Lane) -> float:
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


def draw_stop(timetable: Timetable, lanes: Sequence[Lane], error: ScheduleError) -> Group:
    """A timetable that is wrong or waits for itself: the grid up to where each rank stops, the offending action marked,
    and that action among its neighbours in the order."""
    actions = timetable[error.rank]
    offending = action_text(actions[error.index]) if error.index < len(actions) else "end"
    around = Text(f"rank {error.rank}: ", no_wrap=True)
    around.append("... " if error.index > _CONTEXT else "", "dim")
    for index in range(max(0, error.index - _CONTEXT), min(len(actions), error.index + _CONTEXT + 1)):
        if index == error.index:
            around.append(f">{offending}<", MARKED).append(" ")
        else:
            around.append(f"{action_text(actions[index])} ")
    if error.index >= len(actions):
        around.append(f">{offending}<", MARKED)
    around.append("..." if error.index + _CONTEXT + 1 < len(actions) else "", "dim")
    around.rstrip()
    ran = sum(map(len, lanes))
    note = f"{ran} of {plural(sum(map(len, timetable)), 'action')} run"
    if len(lanes[error.rank]) < error.index:
        note += f"; rank {error.rank} does not even reach the one that is wrong"
    grid = Group(TimeGrid(lanes, stop=(error.rank, offending)), _legend(timetable))
    return page(heading("Where the timetable stops", note), grid, around)
