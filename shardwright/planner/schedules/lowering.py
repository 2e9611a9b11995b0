"""Programs: what each rank does of a timetable, with what it sends, receives, gathers and reduces.

[Note: one order of messages]
The timetable is run once as the simulator would; whenever an action ends that makes something for another rank, the
send goes to the end of its own rank's program and the receive to the end of the other's, at that moment. So all steps
of all ranks lie in one order in which each comes after what it needs. Every pair of ranks issues its messages in the
same order, as NCCL demands; and since any step waits for earlier ones only, nothing deadlocks even where all messages
of a rank go through one queue and each waits for its other side (`verification.verify` proves that). Data-parallel
copies of the pipeline run the same programs, so that their collectives have one order, too.

[Note: values within a rank]
What a stage makes for another of the same rank is not sent.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.timetable import Costs, Layout, Timetable, even_costs

StepKind = Literal["F", "I", "W", "B", "SEND_F", "RECV_F", "SEND_I", "RECV_I", "GATHER", "RELEASE", "REDUCE"]
Edge = tuple[int, int]
"""Two stages, the first of which makes a value for the second, a later one."""
_MAKES = {"F": "F", "I": "I", "B": "I"}
"""What an action makes for other stages: activations (F) or gradients of its inputs (I)."""


class Step(NamedTuple):
    """One step of a rank's program."""

    kind: StepKind
    """F, I, W and B as in a timetable; SEND and RECV of activations (F) or of their gradients (I); GATHER and RELEASE
    of a stage's parameters; REDUCE of its gradients."""
    stage: int
    """In the order of the model."""
    micro_batch: int
    """Of a GATHER, RELEASE or REDUCE, that of the action it belongs to."""
    peer: int = -1
    """The stage at the other end of a message."""


Program = tuple[Step, ...]
Value = tuple[str, int, int, int]
"""Activations (F) or gradients (I) of a micro-batch on the way from one stage to another."""


@dataclass(frozen=True, slots=True)
class Gathers:
    """When sharded parameters are whole, in actions of a rank."""

    lead: int = 1
    """A gather is issued so many actions before the first that needs it."""
    gap: int = 1
    """Parameters stay whole between two actions of a stage with at most so many others in between."""


def neighbours(layout: Layout) -> tuple[Edge, ...]:
    """From each stage to the next."""
    return tuple(pairwise(range(layout.stages)))


def lower(
    timetable: Timetable,
    layout: Layout,
    *,
    edges: Sequence[Edge] | None = None,
    costs: Costs | None = None,
    reduce_every: int | None = None,
    gathers: Gathers | None = None,
) -> tuple[Program, ...]:
    """The program of each rank.

    `edges`: neighbours unless given, to which stages that a skip connection joins may be added. `costs` decide only in
    which order messages are issued; unless given, F, I and W take equally long. A stage's gradients are reduced after
    its last W, and with `reduce_every` after each so many of its micro-batches. `gathers`: for parameters that rest
    sharded. Raises ScheduleError for a timetable that waits for itself, ValueError for an edge that leads back.
    """
    graph = Graph(layout, neighbours(layout) if edges is None else edges)
    lists = [
        _with_states(
            [Step(action.kind, layout.stage(rank, action.chunk), action.micro_batch) for action in actions],
            reduce_every,
            gathers,
        )
        for rank, actions in enumerate(timetable)
    ]
    return _Messages(lists, graph, costs or even_costs(layout, (1.0, 1.0, 1.0, 0.0), 1.0)).run()


class Graph:
    """Which stages make values for which, and the rank of each. Raises ValueError for an edge that leads back."""

    def __init__(self, layout: Layout, edges: Sequence[Edge]) -> None:
        for source, target in edges:
            if not 0 <= source < target < layout.stages:
                raise ValueError(f"no value can go from stage {source} to stage {target} of {layout.stages}")
        self.layout = layout
        self.rank = [layout.place(stage)[0] for stage in range(layout.stages)]
        self.after: list[list[int]] = [[] for _ in range(layout.stages)]
        self.before: list[list[int]] = [[] for _ in range(layout.stages)]
        for source, target in sorted(set(edges)):
            self.after[source].append(target)
            self.before[target].append(source)

    def needs(self, step: Step) -> list[Value]:
        """The values of other stages that a step needs."""
        kind, stage, micro_batch, _ = step
        if kind == "F":
            return [("F", source, stage, micro_batch) for source in self.before[stage]]
        if kind in ("I", "B"):
            return [("I", target, stage, micro_batch) for target in self.after[stage]]
        return []

    def makes(self, step: Step) -> list[Value]:
        """The values that a step makes for other stages."""
        kind, stage, micro_batch, _ = step
        targets = {"F": self.after, "I": self.before, "B": self.before}.get(kind)
        return [] if targets is None else [(_MAKES[kind], stage, peer, micro_batch) for peer in targets[stage]]


def _with_states(steps: Sequence[Step], reduce_every: int | None, gathers: Gathers | None) -> list[Step]:
    """A rank's actions with the gathers, releases and reductions of its stages."""
    before: defaultdict[int, list[Step]] = defaultdict(list)
    after: defaultdict[int, list[Step]] = defaultdict(list)
    for stage in sorted({step.stage for step in steps}):
        if gathers is not None:
            released = -1
            for first, last in _whole(steps, stage, gathers.gap):
                at = max(first - gathers.lead, released + 1)
                before[at].append(Step("GATHER", stage, steps[first].micro_batch))
                after[last].append(Step("RELEASE", stage, steps[last].micro_batch))
                released = last
        ends = [index for index, (kind, of, *_) in enumerate(steps) if of == stage and kind in ("W", "B")]
        for count, index in enumerate(ends, 1):
            if count == len(ends) or (reduce_every is not None and count % reduce_every == 0):
                after[index].append(Step("REDUCE", stage, steps[index].micro_batch))
    return [each for index, step in enumerate(steps) for each in (*before[index], step, *after[index])]


def _whole(steps: Sequence[Step], stage: int, gap: int) -> Iterator[tuple[int, int]]:
    """First and last action of each time in which a stage's parameters are whole. W needs none: it multiplies inputs
    with gradients of outputs."""
    uses = [index for index, (kind, of, *_) in enumerate(steps) if of == stage and kind != "W"]
    first = uses[0]
    for one, other in pairwise(uses):
        if other - one - 1 > gap:
            yield first, one
            first = other
    yield first, uses[-1]


class _Messages:
    """Runs the ranks' steps in time, and adds sends and receives ([Note: one order of messages])."""

    def __init__(self, lists: Sequence[Sequence[Step]], graph: Graph, costs: Costs) -> None:
        self.lists, self.graph, self.costs = lists, graph, costs
        both = [one + other for one, other in zip(costs.input_gradient, costs.weight_gradient, strict=True)]
        self.durations = {"F": costs.forward, "I": costs.input_gradient, "W": costs.weight_gradient, "B": both}
        self.programs: list[list[Step]] = [[] for _ in lists]
        self.at = [0] * len(lists)
        self.free = [0.0] * len(lists)
        self.arrived: dict[Value, float] = {}
        self.waiting: dict[Value, int] = {}
        self.running: list[tuple[float, int]] = []

    def run(self) -> tuple[Program, ...]:
        """All steps, in the order in which they end."""
        for rank in range(len(self.lists)):
            self._start(rank)
        while self.running:
            now, rank = heapq.heappop(self.running)
            self._end(rank, now)
        for rank, steps in enumerate(self.lists):
            if self.at[rank] < len(steps):
                step = steps[self.at[rank]]
                raise ScheduleError(rank, self.at[rank], f"{step.kind}{step.micro_batch} waits for what never comes")
        return tuple(map(tuple, self.programs))

    def _start(self, rank: int) -> None:
        """Starts the rank's next step, or notes what it waits for."""
        if self.at[rank] == len(self.lists[rank]):
            return
        step = self.lists[rank][self.at[rank]]
        begin = self.free[rank]
        for value in self.graph.needs(step):
            if value not in self.arrived:
                self.waiting[value] = rank
                return
            begin = max(begin, self.arrived[value])
        durations = self.durations.get(step.kind)
        heapq.heappush(self.running, (begin + (durations[step.stage] if durations else 0.0), rank))

    def _end(self, rank: int, now: float) -> None:
        step = self.lists[rank][self.at[rank]]
        self.programs[rank].append(step)
        self.at[rank] += 1
        self.free[rank] = now
        ready = [rank]
        for value in self.graph.makes(step):
            kind, stage, peer, micro_batch = value
            other, delay = self.graph.rank[peer], 0.0
            if other != rank:
                delay = self.costs.send[min(stage, peer)]
                self.programs[rank].append(Step("SEND_F" if kind == "F" else "SEND_I", stage, micro_batch, peer))
                self.programs[other].append(Step("RECV_F" if kind == "F" else "RECV_I", peer, micro_batch, stage))
            self.arrived[value] = now + delay
            if value in self.waiting:
                ready.append(self.waiting.pop(value))
        for each in ready:
            self._start(each)
