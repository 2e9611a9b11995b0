"""A timetable checked and run in time: the loops under the simulator."""

from __future__ import annotations

from collections.abc import Sequence

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


def micro_batches_of(timetable: Timetable) -> int:
    """The number of micro-batches that a timetable speaks of."""
    return 1 + max((action.micro_batch for actions in timetable for action in actions), default=-1)


_Encoded = tuple[list[int], list[float], list[int], list[float]]
"""Of a rank, for each action: the number of its input, its duration, the number of the input that it makes (-1: none)
and the time that passes until that has arrived."""


class Execution:
    """A timetable as flat lists, each rank's up to the first action that cannot run in its place. An input of an action
    has a number: F of a stage and micro-batch `stage * m + micro_batch`, I (or B) `n` more, where n = stages * m; W
    needs nothing but its rank and has 2n."""

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
        self.ranks: list[_Encoded] = []
        self.wrong: ScheduleError | None = None
        """What is wrong with the order of a rank, of the first one that is."""
        self.seen = bytearray(self.size)
        """What is there of each stage and micro-batch, as in `_NEEDS`."""
        for rank in range(layout.ranks):
            encoded: _Encoded = ([], [], [], [])
            self.ranks.append(encoded)
            try:
                self._encode(rank, *encoded)
            except ScheduleError as error:
                self.wrong = self.wrong or error

    def _encode(
        self, rank: int, inputs: list[int], durations: list[float], outputs: list[int], delays: list[float]
    ) -> None:
        """Fills a rank's lists. Raises ScheduleError at an action that cannot run in its place."""
        m, layout, seen = self.micro_batches, self.layout, self.seen
        table = self._table(rank)
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

    def _demand_all(self) -> None:
        if self.wrong is not None:
            raise self.wrong
        for at, state in enumerate(self.seen):
            if state != 7:
                stage, micro_batch = divmod(at, self.micro_batches)
                rank, chunk = self.layout.place(stage)
                missing = next(kind for kind in ("F", "I", "W") if not _LEAVES[kind] & ~_NEEDS[kind] & state)
                what = _named(Action(missing, chunk, micro_batch), self.layout)  # type: ignore[arg-type]
                raise ScheduleError(rank, len(self.timetable[rank]), f"{what} is missing")

    def run(self) -> tuple[tuple[list[float], ...], tuple[list[float], ...], list[int]]:
        """Starts and ends per rank, and the ranks in an order in which their actions can run. Raises ScheduleError
        unless every F, I and W runs exactly once."""
        self._demand_all()
        starts, ends, order, waiting = self.advance()
        if waiting:
            self._deadlock(waiting, ends)
        return starts, ends, order

    def advance(self) -> tuple[tuple[list[float], ...], tuple[list[float], ...], list[int], dict[int, int]]:
        """The same as far as it goes, and the ranks that wait for what never comes, by the number of that input."""
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
        return starts, ends, order, waiting

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
