"""Proves that the programs of a pipeline's ranks are right, by running them symbolically."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.lowering import Edge, Graph, Program, Step, StepKind, Value, neighbours
from shardwright.planner.schedules.timetable import Layout


def verify(
    programs: Sequence[Program], layout: Layout, edges: Sequence[Edge] | None = None, *, sharded: bool = False
) -> None:
    """Raises ScheduleError unless the programs are right in the strictest of worlds, where a send and its receive wait
    for each other and for everything before them on their ranks.

    Then every action runs once and has its values, every value is used once, every gradient is reduced and no action
    follows the last reduction of its stage. `sharded`: and parameters are gathered when they are used, and released.
    """
    graph = Graph(layout, neighbours(layout) if edges is None else edges)
    world = _World(programs, graph, sharded)
    world.run()
    world.complete()


_AFTER: dict[StepKind, tuple[StepKind, ...]] = {"F": (), "I": ("F",), "W": ("I",), "B": ("F",)}
"""What comes before an action of a stage and micro-batch."""
_OPPOSITE: dict[StepKind, StepKind] = {"SEND_F": "RECV_F", "RECV_F": "SEND_F", "SEND_I": "RECV_I", "RECV_I": "SEND_I"}


class _World:
    """Programs while they run, step by step."""

    def __init__(self, programs: Sequence[Program], graph: Graph, sharded: bool) -> None:
        self.programs, self.graph, self.sharded = programs, graph, sharded
        self.at = [0] * len(programs)
        self.ran: Counter[Step] = Counter()
        self.here: list[set[Value]] = [set() for _ in programs]
        """Values that a rank has made or received, and not used."""
        self.left_to_reduce = Counter(step.stage for program in programs for step in program if step.kind == "REDUCE")
        self.unreduced: set[int] = set()
        self.whole: set[int] = set()
        """Stages whose parameters are."""

    def run(self) -> None:
        """To the end of all programs."""
        moved = True
        while moved:
            moved = False
            for rank in range(len(self.programs)):
                while self._advance(rank):
                    moved = True
        for rank, program in enumerate(self.programs):
            if self.at[rank] < len(program):
                raise ScheduleError(rank, self.at[rank], f"{program[self.at[rank]]} waits for ever")

    def complete(self) -> None:
        """Nothing is left over and nothing is missing."""
        batches = 1 + max((step.micro_batch for step in self.ran), default=-1)
        for stage, rank in enumerate(self.graph.rank):
            for micro_batch in range(batches):
                kinds = "".join(kind for kind in _AFTER if self.ran[Step(kind, stage, micro_batch)])
                if kinds not in ("FIW", "FB"):
                    self._fail(rank, f"stage {stage} does {kinds or 'nothing'} for micro-batch {micro_batch}")
            if stage in self.unreduced:
                self._fail(rank, f"gradients of stage {stage} are not reduced")
            if stage in self.whole:
                self._fail(rank, f"parameters of stage {stage} are not released")
        for rank, values in enumerate(self.here):
            if values:
                self._fail(rank, f"{min(values)} is never used")

    def _advance(self, rank: int) -> bool:
        """Runs a rank's next step, and the other side's with it if it is a message; false if it must wait."""
        if self.at[rank] == len(self.programs[rank]):
            return False
        step = self.programs[rank][self.at[rank]]
        if step.kind not in _OPPOSITE:
            self._run(rank, step)
        else:
            other = self.graph.rank[step.peer]
            opposite = Step(_OPPOSITE[step.kind], step.peer, step.micro_batch, step.stage)
            if self.at[other] == len(self.programs[other]) or self.programs[other][self.at[other]] != opposite:
                return False
            sends = step.kind.startswith("SEND")
            source, target = (step.stage, step.peer) if sends else (step.peer, step.stage)
            value = (step.kind[-1], source, target, step.micro_batch)
            self._use(rank if sends else other, value)
            self.here[other if sends else rank].add(value)
            self.at[other] += 1
        self.at[rank] += 1
        return True

    def _run(self, rank: int, step: Step) -> None:
        """An action, or a step of the states."""
        kind, stage, micro_batch, _ = step
        if kind in _AFTER:
            self.ran[step] += 1
            if self.ran[step] > 1 or any(not self.ran[Step(each, stage, micro_batch)] for each in _AFTER[kind]):
                self._fail(rank, f"{step} runs twice, or before {_AFTER[kind]}")
        for value in self.graph.needs(step):
            self._use(rank, value)
        self.here[rank].update(self.graph.makes(step))
        if kind in ("F", "I", "B") and self.sharded and stage not in self.whole:
            self._fail(rank, f"{step} without its parameters")
        if kind in ("I", "W", "B"):
            self.unreduced.add(stage)
            if not self.left_to_reduce[stage]:
                self._fail(rank, f"{step} follows the last reduction")
        elif kind == "REDUCE":
            self.unreduced.discard(stage)
            self.left_to_reduce[stage] -= 1
        elif kind in ("GATHER", "RELEASE"):
            if (stage in self.whole) != (kind == "RELEASE"):
                self._fail(rank, f"{step} twice")
            self.whole ^= {stage}

    def _use(self, rank: int, value: Value) -> None:
        if value not in self.here[rank]:
            self._fail(rank, f"{value} is not here")
        self.here[rank].remove(value)

    def _fail(self, rank: int, message: str) -> None:
        raise ScheduleError(rank, self.at[rank], message)
