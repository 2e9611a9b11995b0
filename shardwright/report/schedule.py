"""Drawings of a pipeline schedule: a grid with one row per rank and time from left to right, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.text import Text

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.simulator import Lane, Simulation
from shardwright.planner.schedules.text import action_text
from shardwright.planner.schedules.timetable import Action, Timetable
from shardwright.report.layout import facts, heading, page, percent, plural
from shardwright.report.time_grid import MARKED, TimeGrid, legend, number
from shardwright.schemas.expected import join

_NEGLIGIBLE = 1e-9
_CONTEXT = 4
"""Actions shown before and after one that cannot run."""


@dataclass(frozen=True, slots=True)
class Measures:
    """In what a schedule's times and memory are counted; unless said otherwise, in the units of the costs it was made
    with."""

    time: str = ""
    """Stands behind a time."""
    memory: str = "micro-batches"
    held: str = "micro-batches' activations of a device"
    """What the memory is of."""
    traced: str = "1 ms is one unit of the given times"
    """What a millisecond of a trace is."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A simulated schedule with what is told about it."""

    family: str
    simulation: Simulation
    lower_bound: float
    """No schedule of these stages within the memory limit has a shorter span."""
    period: float = 0.0
    """Time of an iteration when many follow each other; 0 where something else comes between them."""
    measures: Measures = Measures()
    plan: str = ""
    """Name of the plan that it belongs to."""
    contents: Sequence[str] = ()
    """Of a plan, what each stage has of the model."""

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
        f"{misfit.family} keeps activations of up to {number(misfit.needed[rank])} micro-batches on rank {rank}, "
        f"{number(misfit.excess)} more than the limit of {number(misfit.limits[rank])}.",
    )
    ways = [f"--memory-limit {number(max(misfit.needed))} is the least that it fits into"]
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
        Group(TimeGrid(simulation.ranks, peaks), legend(simulation.timetable)),
        facts(schedule_facts(schedule)),
    )


def schedule_title(schedule: Schedule) -> str:
    """`zb-h1: 4 stages, 8 micro-batches`."""
    simulation = schedule.simulation
    layout, chunks = simulation.layout, simulation.layout.chunks
    noun = "rank" if schedule.plan else "device"  # a rank of a plan is several devices where there are copies
    on = f" on {plural(layout.ranks, noun)} ({plural(chunks, 'chunk')} each)" if chunks > 1 else ""
    batches = plural(simulation.micro_batches, "micro-batch", "micro-batches")
    return f"{schedule.family}: {plural(layout.stages, 'stage')}{on}, {batches}"


def schedule_facts(schedule: Schedule) -> list[tuple[str, str]]:
    """Its numbers with their names."""
    simulation = schedule.simulation
    gap = f"{percent(schedule.gap)} above it" if schedule.gap else "reached: no schedule is shorter"
    unit = schedule.measures.time
    steady = f"{number(schedule.period)}{unit} an iteration, {schedule.steady_state_bubble:.4f} of it bubble"
    return [
        *([("plan", schedule.plan)] if schedule.plan else []),
        ("bubble rate", f"{schedule.bubble_rate:.4f} of the longest span, {number(simulation.span)}{unit}"),
        ("makespan", f"{number(simulation.makespan)}{unit}"),
        *([("steady state", steady)] if schedule.period else []),
        ("peak memory", f"{max(schedule.peak_memory):.2f} {schedule.measures.held}"),
        ("lower bound", f"{number(schedule.lower_bound)}{unit} of the span; {gap}"),
    ]


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
    grid = Group(TimeGrid(lanes, stop=(error.rank, offending)), legend(timetable))
    return page(heading("Where the timetable stops", note), grid, around)
