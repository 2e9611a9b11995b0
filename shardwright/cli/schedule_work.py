"""What `shardwright schedule` does: makes a family's schedule, or simulates a timetable that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from rich.console import Group, RenderableType
from rich.text import Text

from shardwright import report
from shardwright.cli.schedule import DEFAULT_FAMILY
from shardwright.cli.schedule_input import Given, Values, costs_of, read_limits, wrong_option
from shardwright.planner.schedules.bounds import lower_bound
from shardwright.planner.schedules.execution import ScheduleError, micro_batches_of
from shardwright.planner.schedules.families.family import DoesNotFitError, Family
from shardwright.planner.schedules.problem import TOLERANCE
from shardwright.planner.schedules.simulator import Simulation, progress, simulate, steady_period
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.schedules.timetable import Costs, Layout, Placement
from shardwright.report.schedule import Misfit, Schedule
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.expected import join, nearest

_PLACEMENTS: tuple[Placement, ...] = ("loop", "wave")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a schedule, where they are given."""

    ranks: int | None
    micro_batches: int | None
    chunks: int | None


def make(name: str, sizes: Sizes, times: Mapping[str, Values], memory_limit: str | None) -> Schedule | Misfit:
    """A family's schedule, or what it lacks to be one. Raises InputError."""
    family = _family(name)
    if sizes.ranks is None or sizes.micro_batches is None:
        option = "--stages" if sizes.ranks is None else "--micro-batches"
        raise wrong_option(option, "is missing", "give --stages and --micro-batches, or --check with a timetable")
    limits = read_limits(memory_limit, sizes.ranks)
    attempts = _attempts(family, sizes.ranks, sizes.micro_batches, sizes.chunks, times)
    made = [each for each in (attempt.make(limits) for attempt in attempts) if each is not None]
    if not made:
        attempt = attempts[0]
        return Misfit(family.name, limits or (), attempt.least(), tuple(_others(attempt, times, limits or ())))
    # Of equally long ones the first, which has the fewest stages.
    return _told(family.name, min(made, key=lambda each: round(each.span, 9)), limits)


def _attempts(
    family: Family, ranks: int, micro_batches: int, chunks: int | None, times: Mapping[str, Values]
) -> list[_Attempt]:
    """One for each number of chunks that the family tries unless `chunks` says; those that the times are not for are
    left out, but not all. Raises InputError."""
    numbers = family.tries(ranks, micro_batches) if chunks is None and family.tries is not None else (chunks,)
    attempts: list[_Attempt] = []
    problems: list[InputError] = []
    for number in numbers:
        layout = _layout(family, ranks, number)
        refused = family.refuses(layout, micro_batches)
        if refused:
            message = f"{family.name} has no such schedule: {refused}"
            raise wrong_option("--family", message, "change it, or name another family")
        try:
            attempts.append(_Attempt(family, layout, micro_batches, costs_of(times, layout)))
        except InputError as error:
            problems.append(error)
    if not attempts:
        raise problems[0]
    return attempts


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A family asked for one schedule."""

    family: Family
    layout: Layout
    micro_batches: int
    costs: Costs

    def make(self, limits: Sequence[float] | None) -> Simulation | None:
        """Its schedule simulated; None if it does not keep the limits."""
        try:
            timetable = self.family.make(self.layout, self.micro_batches, self.costs, limits)
        except DoesNotFitError:
            return None
        simulation = simulate(timetable, self.layout, self.costs)
        return None if simulation.beyond(limits) else simulation

    def least(self) -> tuple[float, ...]:
        """What each rank holds in the schedule of least memory: of a family that searches, under the least limit, in
        steps of a chunk's activations, at which it finds one."""
        unlimited = self.make(None) if not self.family.searches else None
        if unlimited is not None:
            return unlimited.peak_memory
        step, ranks = max(self.costs.activations), self.layout.ranks
        low, high = self.layout.chunks - 1, self.layout.chunks
        while (found := self.make((high * step,) * ranks)) is None:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            within = self.make((middle * step,) * ranks)
            low, high, found = (middle, high, found) if within is None else (low, middle, within)
        return found.peak_memory


def _others(attempt: _Attempt, times: Mapping[str, Values], limits: Sequence[float]) -> Iterator[str]:
    """Other families that fit: of those with a fixed memory the ones that keep the limits, and the search that finds
    what there is."""
    for other in SCHEDULES.values():
        layout = Layout(attempt.layout.ranks, other.chunks, other.placement)
        if other is attempt.family or other.refuses(layout, attempt.micro_batches):
            continue
        try:
            costs = costs_of(times, layout)
        except InputError:
            continue  # a list in the file has one time a stage, and this family has another number of stages
        search = other.name == DEFAULT_FAMILY
        # Making a schedule takes seconds where there are many stages, so only what may well fit is tried; the search
        # finds a schedule wherever one micro-batch fits.
        needed = 1.0 if search else other.memory(layout) if other.memory else inf
        made = _Attempt(other, layout, 1 if search else attempt.micro_batches, costs)
        may_fit = needed * min(costs.activations) * layout.chunks <= min(limits) * (1 + TOLERANCE)
        if may_fit and made.make(limits) is not None:
            yield other.name


def _family(name: str) -> Family:
    if name in SCHEDULES:
        return SCHEDULES[name]
    near, names = nearest(name, SCHEDULES), join(list(SCHEDULES), "or")
    way_out = f"did you mean {near}? It is one of {names}" if near else f"it is one of {names}"
    raise wrong_option("--family", f"there is no family '{name}'", way_out)


def _layout(family: Family, ranks: int, chunks: int | None) -> Layout:
    """Raises InputError for chunks that the family does not take."""
    wanted = chunks or family.chunks
    if family.allowed_chunks(wanted):
        return Layout(ranks, wanted, family.placement)
    near = min(filter(family.allowed_chunks, range(1, 2 * wanted + 2)), key=lambda each: abs(each - wanted))
    message = f"{family.name} does not run with {wanted} stages on each device, but with {family.chunks_in_words}"
    raise wrong_option("--chunks", message, f"the nearest that it takes is {near}")


def _told(name: str, simulation: Simulation, limits: Sequence[float] | None) -> Schedule:
    layout, costs = simulation.layout, simulation.costs
    return Schedule(
        family=name,
        simulation=simulation,
        period=steady_period(simulation.timetable, layout, costs),
        lower_bound=lower_bound(layout, costs, simulation.micro_batches, limits),
    )


def replay(
    given: Given,
    name: str | None,
    sizes: Sizes,
    times: Mapping[str, Values],
    memory_limit: str | None,
    show: Callable[[RenderableType], None] | None,
) -> Schedule | Misfit:
    """A given timetable, simulated: on the placement of the family that is named or that the file names; otherwise, of
    several chunks a device, on the one on which it gets further.

    `show` takes a drawing of one that is too large for the memory, or that does not run. The latter raises InputError.
    """
    found = Sizes(len(given.timetable), micro_batches_of(given.timetable), given.chunks)
    _agree(sizes, found)
    named = name or (given.family if given.family in SCHEDULES else "")
    placements = (_family(named).placement,) if named else _PLACEMENTS[: min(2, given.chunks)]
    layouts = [Layout(len(given.timetable), given.chunks, placement) for placement in placements]
    limits = read_limits(memory_limit, len(given.timetable))
    simulation = _run(given, layouts, times, show)
    told = _told(named or "given", simulation, limits)
    if limits is None or not simulation.beyond(limits):
        return told
    if show:
        show(Group(report.draw_schedule(told), Text()))
    return Misfit(told.family, limits, simulation.peak_memory, given=True)


def _agree(sizes: Sizes, found: Sizes) -> None:
    pairs = {
        "--stages": (sizes.ranks, found.ranks),
        "--micro-batches": (sizes.micro_batches, found.micro_batches),
        "--chunks": (sizes.chunks, found.chunks),
    }
    for option, (wanted, there) in pairs.items():
        if wanted not in (None, there):
            raise wrong_option(option, f"{wanted}, but the timetable has {there}", "leave it out: the file says it")


def _run(
    given: Given,
    layouts: Sequence[Layout],
    times: Mapping[str, Values],
    show: Callable[[RenderableType], None] | None,
) -> Simulation:
    """On the first layout on which it runs. Raises InputError, after showing where it stops."""
    stops = []
    for layout in layouts:
        costs = costs_of(times, layout)
        try:
            return simulate(given.timetable, layout, costs)
        except ScheduleError as error:
            stops.append((progress(given.timetable, layout, costs), error))
    lanes, wrong = max(stops, key=lambda stop: sum(map(len, stop[0])))
    if show:
        show(report.draw_stop(given.timetable, lanes, wrong))
    raise given.wrong(wrong)
