"""The programs of a pipeline's ranks in time, with their messages and collectives.

[Note: a pipeline in time]
Every rank goes through its program: actions one after the other, as long as `PipelineCosts` says. A message leaves when
what it carries is made, behind earlier ones from the same rank to the same other one; an action waits for those that it
needs. Collectives of the data-parallel copies go over wires of their own rank ([Note: wires] in flat_lanes.py): GATHER
issues the first hop of each bucket, the action that needs the stage waits and drives the others; REDUCE starts one
chain after the other, and each time those under way go one hop on, which waits for the hop before. What is under way
at the end of the program is then driven to its end. New values that the last step's optimizer sent off arrive when a
stage is first used. All ranks then meet in the sums of tied gradients and of the norm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardwright.planner.flat_lanes import Communication, Hops
from shardwright.planner.pipelines.owners import by_stage
from shardwright.planner.schedules.lowering import Edge, Program, Step
from shardwright.planner.schedules.timetable import Costs


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank's units send, and the stages that use each."""

    units: Sequence[Communication]
    stages: Sequence[tuple[int, ...]]
    adds: bool
    """Whether reduced gradients of several micro-batches are added up."""


@dataclass(slots=True)
class _Chain:
    """A chain in flight: its hops, the one that runs, when that ends, and seconds of copying after the last."""

    hops: Hops
    end: float
    add: float = 0.0
    at: int = 0


@dataclass(slots=True)
class RankRun:
    """A rank in time: its clock, and what it did until then."""

    wires: list[float]
    clock: float = 0.0
    busy: float = 0.0
    """Seconds of actions and copies."""
    gather_stall: float = 0.0
    reduce_stall: float = 0.0
    at: int = 0
    """Steps of its program that are done."""
    published: dict[int, list[_Chain]] = field(default_factory=dict)
    gathering: dict[int, list[_Chain]] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)
    reducing: list[_Chain] = field(default_factory=list)
    reduced: dict[int, int] = field(default_factory=dict)
    """How often each unit was."""

    def issue(self, chains: Sequence[Hops], add: float = 0.0) -> list[_Chain]:
        """The first hop of each chain."""
        return [_Chain(hops, self._hop(hops[0]), add) for hops in chains if hops]

    def drive(self, chains: Sequence[_Chain], *, reduces: bool = False) -> None:
        """All of them to their ends, and waits."""
        for chain in chains:
            while self.on(chain, reduces=reduces):
                pass

    def on(self, chain: _Chain, *, reduces: bool) -> bool:
        """Waits for the hop that runs and issues the next one; whether there was one."""
        waited = max(0.0, chain.end - self.clock)
        self.clock += waited
        if reduces:
            self.reduce_stall += waited
        else:
            self.gather_stall += waited
        chain.at += 1
        if chain.at < len(chain.hops):
            chain.end = self._hop(chain.hops[chain.at])
            return True
        self.work(chain.add)
        return False

    def advance(self) -> None:
        """Every reduction under way goes one hop on."""
        self.reducing = [chain for chain in self.reducing if self.on(chain, reduces=True)]

    def work(self, seconds: float) -> None:
        """Time in which the rank computes or copies."""
        self.clock += seconds
        self.busy += seconds

    def _hop(self, hop: tuple[int, float]) -> float:
        wire, seconds = hop
        self.wires[wire] = max(self.wires[wire], self.clock) + seconds
        return self.wires[wire]


class PipelineRun:
    """All ranks through their programs, once ([Note: a pipeline in time])."""

    def __init__(
        self,
        programs: Sequence[Program],
        costs: Costs,
        sends: Mapping[Edge, float],
        loads: Sequence[RankLoad],
        *,
        wires: int,
    ) -> None:
        self._programs, self._loads, self._sends = programs, loads, sends
        both = [one + other for one, other in zip(costs.input_gradient, costs.weight_gradient, strict=True)]
        self._durations = {"F": costs.forward, "I": costs.input_gradient, "W": costs.weight_gradient, "B": both}
        self._ranks = [RankRun(wires=[0.0] * wires) for _ in programs]
        self._units = [by_stage(load.stages) for load in loads]
        self._reductions = [
            Counter(unit for kind, stage, *_ in program if kind == "REDUCE" for unit in units.get(stage, ()))
            for program, units in zip(programs, self._units, strict=True)
        ]
        self._rank_of = {stage: rank for rank, program in enumerate(programs) for _, stage, *_ in program}
        self._made: dict[tuple[str, int, int, int], float] = {}
        """When each value has arrived: kind, from, to, micro-batch."""
        self._links: dict[tuple[int, int], float] = {}
        self._before: dict[int, list[int]] = {}
        self._after: dict[int, list[int]] = {}
        for source, target in sorted(sends):
            self._after.setdefault(source, []).append(target)
            self._before.setdefault(target, []).append(source)

    def run(self) -> list[RankRun]:
        """When every rank is done, its reductions included."""
        for rank, state in enumerate(self._ranks):
            # The root's first, which is the last unit.
            units = self._loads[rank].units
            for unit in (len(units) - 1, *range(len(units) - 1)) if units else ():
                state.published[unit] = state.issue(units[unit].publications)
        ready = list(range(len(self._programs)))
        while ready:
            moved = [rank for rank in ready if self._go_on(rank)]
            ready = [rank for rank in ready if self._ranks[rank].at < len(self._programs[rank])]
            if ready and not moved:
                raise ValueError("the programs wait for each other")
        for state in self._ranks:
            while state.reducing:
                state.advance()
        return self._ranks

    def _go_on(self, rank: int) -> bool:
        """Runs a rank until it waits for what is not made yet; whether it ran anything."""
        state, program = self._ranks[rank], self._programs[rank]
        began = state.at
        while state.at < len(program) and self._do(rank, state, program[state.at]):
            state.at += 1
        return state.at > began

    def _do(self, rank: int, state: RankRun, step: Step) -> bool:
        kind, stage, micro_batch, _ = step
        if kind in ("F", "I", "B"):
            values = self._inputs(kind, stage, micro_batch)
            if any(value not in self._made for value in values):
                return False
            self._use(rank, state, stage)
            state.clock = max(state.clock, *(self._made.pop(value) for value in values), 0.0)
            state.work(self._durations[kind][stage])
            self._send(rank, state.clock, kind, stage, micro_batch)
        elif kind == "W":
            state.work(self._durations[kind][stage])
        elif kind == "GATHER":
            self._gather(rank, state, stage)
        elif kind == "RELEASE":
            state.whole.difference_update(self._units[rank].get(stage, ()))
        elif kind == "REDUCE":
            self._reduce(rank, state, stage)
        return True

    def _inputs(self, kind: str, stage: int, micro_batch: int) -> list[tuple[str, int, int, int]]:
        if kind == "F":
            return [("F", source, stage, micro_batch) for source in self._before.get(stage, ())]
        return [("I", target, stage, micro_batch) for target in self._after.get(stage, ())]

    def _send(self, rank: int, now: float, kind: str, stage: int, micro_batch: int) -> None:
        """What an action makes leaves at once; messages from one rank to another follow each other."""
        ahead = kind == "F"
        for peer in (self._after if ahead else self._before).get(stage, ()):
            other, arrival = self._rank_of[peer], now
            if other != rank:
                seconds = self._sends[min(stage, peer), max(stage, peer)]
                arrival = max(now, self._links.get((rank, other), 0.0)) + seconds
                self._links[rank, other] = arrival
            self._made["F" if ahead else "I", stage, peer, micro_batch] = arrival

    # --- collectives ------------------------------------------------------------------------------------------------

    def _gather(self, rank: int, state: RankRun, stage: int) -> None:
        for unit in self._units[rank].get(stage, ()):
            self._arrive(state, unit)
            if unit not in state.whole and unit not in state.gathering:
                state.gathering[unit] = state.issue(self._loads[rank].units[unit].gathers)

    def _use(self, rank: int, state: RankRun, stage: int) -> None:
        """The parameters of a stage are whole afterwards."""
        for unit in self._units[rank].get(stage, ()):
            if unit in state.whole:
                continue
            self._arrive(state, unit)
            chains = state.gathering.pop(unit, None)
            state.drive(state.issue(self._loads[rank].units[unit].gathers) if chains is None else chains)
            state.whole.add(unit)

    def _arrive(self, state: RankRun, unit: int) -> None:
        state.drive(state.published.pop(unit, ()))

    def _reduce(self, rank: int, state: RankRun, stage: int) -> None:
        load = self._loads[rank]
        for unit in self._units[rank].get(stage, ()):
            sends, times = load.units[unit], state.reduced.get(unit, 0)
            state.reduced[unit] = times + 1
            last = times + 1 == self._reductions[rank][unit]
            add = sends.add if load.adds and times else 0.0
            for hops in sends.last_reductions if last else sends.reductions:
                state.advance()
                state.reducing += state.issue([hops], add)
