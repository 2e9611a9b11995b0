"""One simulator for every schedule: times, memory, bubbles, and the period of iterations that follow each other.

[Note: bubble rate]
The zero-bubble papers count, per rank, from the start of its first action to the end of its last, take the largest of
these spans as the cost, and of it the share that is not work (Qi et al., arXiv 2401.10241, sections 2.3 and 3.2):
`(cost - m (T_F + T_B + T_W)) / cost`. Where stages are uneven, `m (T_F + T_B + T_W)` is here the work of the busiest
rank: the bubble is what even the rank that never has too little to do spends waiting.

A span leaves out that ranks start one after the other. The makespan counts it; iterations that follow each other
without a barrier between them overlap, and then take the steady period each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardwright.planner.schedules.timetable import Action, Costs, Layout, Timetable

_NEEDS = {"F": 0, "I": 1, "W": 3, "B": 1}
"""What must have run of a stage and micro-batch before an action: 1 for F, 2 for I, 4 for W, added up."""
_LEAVES = {"F": 1, "I": 3, "W": 7, "B": 7}


class ScheduleError(ValueError):
    """A timetable that is wrong or waits for itself: the rank, and the index of the action in its order (the number of
    its actions if one is missing)."""

    def __init__(self, rank: int, index: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.index = index
        self.message = message

    def __str__(self) -> str:
        return f"rank {self.rank}, action {self.index}: {self.message}"


@dataclass(frozen=True)
class Simulation:
    """When every action runs. Times in the unit of the costs, from 0, the start of the first action."""

    timetable: Timetable
    layout: Layout
    costs: Costs
    starts: tuple[list[float], ...]
    """Per rank, of its actions in order."""
    ends: tuple[list[float], ...]

    @cached_property
    def ranks(self) -> tuple[tuple[tuple[Action, float, float], ...], ...]:
        """Per rank its actions in order, each with start and end."""
        return tuple(
            tuple(zip(*of_rank, strict=True)) for of_rank in zip(self.timetable, self.starts, self.ends, strict=True)
        )

    @cached_property
    def micro_batches(self) -> int:
        """Of the iteration."""
        return micro_batches_of(self.timetable)

    @property
    def makespan(self) -> float:
        """From the start of the first action to the end of the last."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0) - min(
            (starts[0] for starts in self.starts if starts), default=0.0
        )

    @property
    def span(self) -> float:
        """The largest over the ranks of the time from the start of its first action to the end of its last."""
        return max(
            (ends[-1] - starts[0] for starts, ends in zip(self.starts, self.ends, strict=True) if ends), default=0.0
        )

    def bubble_rate(self, costs: Costs | None = None, micro_batches: int | None = None) -> float:
        """See [Note: bubble rate]. Of the simulated costs and micro-batches unless others are given."""
        work = max(rank_work(costs or self.costs, self.layout, micro_batches or self.micro_batches))
        return (self.span - work) / self.span if self.span else 0.0

    @cached_property
    def memory(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """Per rank the points of a staircase, (time, held from then on), in units of `Costs.activations`. F's memory is
        held from its start, what I, W and B let go of is free at their end."""
        return tuple(tuple(self._staircase(rank)) for rank in range(self.layout.ranks))

    @cached_property
    def peak_memory(self) -> tuple[float, ...]:
        """Per rank the most that it holds at once, in units of `Costs.activations`."""
        return tuple(max((held for _, held in steps), default=0.0) for steps in self.memory)

    def _staircase(self, rank: int) -> Iterator[tuple[float, float]]:
        table = _memory_table(self.costs, self.layout, rank)
        held = 0.0
        for (kind, chunk, _), start, end in zip(self.timetable[rank], self.starts[rank], self.ends[rank], strict=True):
            held += table[kind, chunk]
            yield start if kind == "F" else end, held


def simulate(timetable: Timetable, layout: Layout, costs: Costs) -> Simulation:
    """Each rank runs its actions in the given order, each as early as its inputs allow. Raises ScheduleError where an
    action is missing, runs twice, before what it needs, or never; ValueError where costs and layout do not fit."""
    program = _Program(timetable, layout, costs)
    starts, ends, _ = program.run()
    return Simulation(timetable, layout, costs, starts, ends)


def check(timetable: Timetable, layout: Layout, micro_batches: int | None = None) -> None:
    """Raises ScheduleError unless every F, I and W (or F and B) of every stage and micro-batch runs exactly once, in an
    order without deadlock."""
    free = (0.0,) * layout.stages
    _Program(timetable, layout, Costs(free, free, free, free[1:], free, free), micro_batches).run()


def micro_batches_of(timetable: Timetable) -> int:
    """The number of micro-batches that a timetable speaks of."""
    return 1 + max((action.micro_batch for actions in timetable for action in actions), default=-1)


def rank_work(costs: Costs, layout: Layout, micro_batches: int) -> list[float]:
    """Per rank the time of all its actions of an iteration."""
    work = [0.0] * layout.ranks
    for stage in range(layout.stages):
        each = costs.forward[stage] + costs.input_gradient[stage] + costs.weight_gradient[stage]
        work[layout.place(stage)[0]] += micro_batches * each
    return work


def steady_period(timetable: Timetable, layout: Layout, costs: Costs) -> float:
    """How much later an iteration ends than the one before when many follow each other, each rank going on to the next
    as soon as it is done with its own.

    The ends of one iteration's ranks are a max-plus linear function A of those of the iteration before, so the period
    is A's eigenvalue, the largest mean of a cycle of ranks (Baccelli et al., "Synchronization and Linearity", theorem
    3.23). It is found from below: longest paths under a guess either settle, which proves the guess, or close a cycle
    whose mean is larger, the next guess. `Costs.send` is paid between iterations no more than within one.
    """
    program = _Program(timetable, layout, costs)
    _, ends, order = program.run()
    ranks = [rank for rank in range(layout.ranks) if ends[rank]]
    if not ranks:
        return 0.0
    ready = [0.0] * layout.ranks
    period = max(rank_work(costs, layout, program.micro_batches))
    parents: dict[int, tuple[int, float]] = {}
    tolerance = 1e-12 * max(1.0, max(end[-1] for end in ends if end)) * len(order) ** 0.5
    while True:
        after, origins = program.again(order, ready)
        late = [rank for rank in ranks if after[rank] - period > ready[rank] + tolerance]
        if not late:
            return period
        moved = list(ready)
        for rank in late:
            parents[rank] = origins[rank], after[rank] - ready[origins[rank]]
            moved[rank] = after[rank] - period
        ready = moved
        period = max(period, _largest_cycle_mean(parents))


def _largest_cycle_mean(parents: dict[int, tuple[int, float]]) -> float:
    """Of a graph in which each node has one edge at most; 0 if there is no cycle."""
    best = 0.0
    for first in parents:
        node, length, edges, visited = first, 0.0, 0, set[int]()
        while node in parents and node not in visited:
            visited.add(node)
            node, weight = parents[node]
            length, edges = length + weight, edges + 1
            if node == first:
                best = max(best, length / edges)
                break
    return best


def _memory_table(costs: Costs, layout: Layout, rank: int) -> dict[tuple[str, int], float]:
    """What an action of a rank adds to its memory, by kind and chunk ([Note: memory of an action])."""
    table: dict[tuple[str, int], float] = {}
    for chunk in range(layout.chunks):
        stage = layout.stage(rank, chunk)
        kept, held = costs.activations[stage], costs.held_by_weight[stage]
        table |= {("F", chunk): kept, ("I", chunk): held - kept, ("W", chunk): -held, ("B", chunk): -kept}
    return table


class _Program:
    """A checked timetable as flat lists. An input of an action has a number: F of a stage and micro-batch `stage * m +
    micro_batch`, I (or B) `n` more, where n = stages * m; W needs nothing but its rank and has 2n."""

    def __init__(self, timetable: Timetable, layout: Layout, costs: Costs, micro_batches: int | None = None) -> None:
        if len(timetable) != layout.ranks:
            raise ValueError(f"a timetable of {len(timetable)} ranks for a layout of {layout.ranks}")
        sizes = {len(each) for each in (costs.forward, costs.input_gradient, costs.weight_gradient)}
        sizes |= {len(costs.send) + 1, len(costs.activations), len(costs.held_by_weight)}
        if sizes != {layout.stages}:
            raise ValueError(f"costs of {sorted(sizes)} stages for a layout of {layout.stages}")
        self.timetable, self.layout, self.costs = timetable, layout, costs
        self.micro_batches = micro_batches_of(timetable) if micro_batches is None else micro_batches
        self.size = layout.stages * self.micro_batches
        seen = bytearray(self.size)
        self.ranks = [self._encode(rank, seen) for rank in range(layout.ranks)]
        self._complete(seen)

    def _encode(self, rank: int, seen: bytearray) -> tuple[list[int], list[float], list[int], list[float]]:
        """For each action the number of its input, its duration, the number of the input that it makes (-1: none) and
        the time that passes until that has arrived."""
        m, layout = self.micro_batches, self.layout
        table = self._table(rank)
        inputs: list[int] = []
        durations: list[float] = []
        outputs: list[int] = []
        delays: list[float] = []
        for index, action in enumerate(self.timetable[rank]):
            kind, chunk, micro_batch = action
            row = table.get((kind, chunk))
            if row is None:
                raise ScheduleError(
                    rank, index, f"there is no {kind} of chunk {chunk}; chunks count to {layout.chunks - 1}"
                )
            if not 0 <= micro_batch < m:
                raise ScheduleError(rank, index, f"there is no micro-batch {micro_batch}; they count to {m - 1}")
            place, needs, leaves, number, duration, output, delay = row
            if seen[place + micro_batch] != needs:
                raise ScheduleError(rank, index, _out_of_order(action, seen[place + micro_batch], layout))
            seen[place + micro_batch] = leaves
            inputs.append(number + micro_batch if kind != "W" else number)
            durations.append(duration)
            outputs.append(output + micro_batch if output >= 0 else -1)
            delays.append(delay)
        return inputs, durations, outputs, delays

    def _table(self, rank: int) -> dict[tuple[str, int], tuple[int, int, int, int, float, int, float]]:
        m, n, layout, costs = self.micro_batches, self.size, self.layout, self.costs
        table: dict[tuple[str, int], tuple[int, int, int, int, float, int, float]] = {}
        for chunk in range(layout.chunks):
            stage = layout.stage(rank, chunk)
            at, last = stage * m, stage == layout.stages - 1
            backward = n + at - m if stage else -1
            down, up = self._send(stage), self._send(stage - 1)
            whole = costs.input_gradient[stage] + costs.weight_gradient[stage]
            rows = {
                "F": (at, costs.forward[stage], n + at if last else at + m, down),
                "I": (n + at, costs.input_gradient[stage], backward, up),
                "W": (2 * n, costs.weight_gradient[stage], -1, 0.0),
                "B": (n + at, whole, backward, up),
            }
            table |= {(kind, chunk): (at, _NEEDS[kind], _LEAVES[kind], *row) for kind, row in rows.items()}
        return table

    def _send(self, stage: int) -> float:
        """The time between a stage and the next; 0 past the ends and where both lie on one rank."""
        if not 0 <= stage < self.layout.stages - 1:
            return 0.0
        here, there = self.layout.place(stage)[0], self.layout.place(stage + 1)[0]
        return 0.0 if here == there else self.costs.send[stage]

    def _complete(self, seen: bytearray) -> None:
        for at, state in enumerate(seen):
            if state != 7:
                stage, micro_batch = divmod(at, self.micro_batches)
                rank, chunk = self.layout.place(stage)
                missing = next(kind for kind in ("F", "I", "W") if not _LEAVES[kind] & ~_NEEDS[kind] & state)
                what = _named(Action(missing, chunk, micro_batch), self.layout)  # type: ignore[arg-type]
                raise ScheduleError(rank, len(self.timetable[rank]), f"{what} is missing")

    def run(self) -> tuple[tuple[list[float], ...], tuple[list[float], ...], list[int]]:
        """Starts and ends per rank, and the ranks in an order in which their actions can run."""
        arrived = [-1.0] * (2 * self.size) + [0.0]
        arrived[: self.micro_batches] = [0.0] * self.micro_batches
        waiting: dict[int, int] = {}
        starts: tuple[list[float], ...] = tuple([] for _ in self.ranks)
        ends: tuple[list[float], ...] = tuple([] for _ in self.ranks)
        order: list[int] = []
        ready = list(range(len(self.ranks) - 1, -1, -1))
        while ready:
            rank = ready.pop()
            inputs, durations, outputs, delays = self.ranks[rank]
            rank_starts, rank_ends = starts[rank], ends[rank]
            clock = rank_ends[-1] if rank_ends else 0.0
            for index in range(len(rank_ends), len(inputs)):
                start = arrived[inputs[index]]
                if start < 0.0:
                    waiting[inputs[index]] = rank
                    break
                if start < clock:
                    start = clock
                clock = start + durations[index]
                rank_starts.append(start)
                rank_ends.append(clock)
                order.append(rank)
                output = outputs[index]
                if output >= 0:
                    arrived[output] = clock + delays[index]
                    if output in waiting:
                        ready.append(waiting.pop(output))
        if waiting:
            self._deadlock(waiting, ends)
        return starts, ends, order

    def again(self, order: Sequence[int], ready: Sequence[float]) -> tuple[list[float], list[int]]:
        """One iteration whose ranks are ready at the given times, none before 0: when each is done, and the rank whose
        time of being ready decided that."""
        arrived = [0.0] * (2 * self.size + 1)
        origin = [-1] * (2 * self.size + 1)
        clocks, origins = list(ready), list(range(len(self.ranks)))
        position = [0] * len(self.ranks)
        for rank in order:
            inputs, durations, outputs, delays = self.ranks[rank]
            index = position[rank]
            position[rank] = index + 1
            number = inputs[index]
            if arrived[number] > clocks[rank]:
                clocks[rank], origins[rank] = arrived[number], origin[number]
            clocks[rank] += durations[index]
            output = outputs[index]
            if output >= 0:
                arrived[output] = clocks[rank] + delays[index]
                origin[output] = origins[rank]
        return clocks, origins

    def _deadlock(self, waiting: dict[int, int], ends: Sequence[Sequence[float]]) -> None:
        """Raises at the first action of a circle of ranks that wait for each other."""
        inputs = {rank: number for number, rank in waiting.items()}
        rank, path = min(inputs), list[int]()
        while rank not in path:
            path.append(rank)
            rank, _ = self._maker(inputs[rank])
        circle = path[path.index(rank) :]
        steps = []
        for each in circle:
            maker, chunk, kind, micro_batch = *self._maker(inputs[each]), *self._what(inputs[each])
            own = _named(self.timetable[each][len(ends[each])], self.layout)
            steps.append(f"{own} on rank {each} waits for {kind}{micro_batch} of chunk {chunk} on rank {maker}")
        message = "deadlock: " + ", ".join(steps[:4]) + (", and so on" if len(steps) > 4 else "")
        raise ScheduleError(circle[0], len(ends[circle[0]]), message)

    def _maker(self, number: int) -> tuple[int, int]:
        """Rank and chunk of the action that makes an input."""
        backward, at = divmod(number, self.size)
        stage = at // self.micro_batches
        last = stage == self.layout.stages - 1
        return self.layout.place(stage + (0 if last else 1) if backward else stage - 1)

    def _what(self, number: int) -> tuple[str, int]:
        """Kind and micro-batch of the action that makes an input."""
        backward, at = divmod(number, self.size)
        last = at // self.micro_batches == self.layout.stages - 1
        return ("I" if backward and not last else "F"), at % self.micro_batches


def _named(action: Action, layout: Layout) -> str:
    chunk = f" of chunk {action.chunk}" if layout.chunks > 1 else ""
    return f"{action.kind}{action.micro_batch}{chunk}"


def _out_of_order(action: Action, state: int, layout: Layout) -> str:
    """What is wrong with an action whose stage and micro-batch is in this state."""
    name, needs = _named(action, layout), _NEEDS[action.kind]
    if state & needs == needs:
        return f"{name} runs a second time"
    return f"{name} runs before its {'I' if state & 1 else 'F'}"
