"""One pass of list scheduling against a target.

[Note: dispatch]
Ranks are served in the order of time. A rank that is free looks at the next F and I of each of its stages: those whose
input has come and that memory allows, and those known to come. `Rules` say which it takes, and when it runs a W or
waits instead. Two quantities make a wait or a W harmless: the latest start of every F and I for the target
([Note: latest starts]), and the idle time that a rank may have in all if it is to end within the target.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from shardwright.planner.schedules.latest import latest_starts
from shardwright.planner.schedules.passes import Numbered, Pass
from shardwright.planner.schedules.problem import TOLERANCE


class Rules(NamedTuple):
    """Settings of a pass."""

    order: str = "alternate"
    """What goes first where an F and an I are ready: `gradient` the I; `alternate` the F after an I; `urgent` the one
    with the earlier latest start."""
    delay: float = 0.5
    """The share of an F by which it may keep an I waiting that is known to come."""
    yielding: float = 1.0
    """The share of the slack of what is known to come that a delay may use up."""
    overlap: float = 0.0
    """The share of a W by which it may reach beyond the next arrival."""
    clear: str = "never"
    """When a W goes before an I to make room for an F that waits for memory: `never`, `always`, `urgent` (if the F is
    more urgent), `alternate` (after an I)."""
    look_ahead: bool = False
    """Whether a rank waits for something more urgent that is known to come."""
    slack: float = 0.0
    """By how much the target is above the bound, in ramps."""
    spacing: float = 0.0
    """How far latest starts keep micro-batches apart, as a share of a rank's work for one, where memory does not let
    them come closer."""
    budget: float = 1.0
    """The idle time that a rank may spend by choice, as a share of target - work."""
    in_flight: float | None = None
    """Limit on micro-batches in flight: 1: from what memory allows on rank 0 evenly down to 1; 0: that on all."""
    ahead: tuple[float, float] | None = None
    """(a, b): on rank q of p, F of chunk 0 is at most a (p - q) - b micro-batches ahead of that of the last chunk."""


class _State:
    """All ranks during one pass."""

    def __init__(self, numbered: Numbered, rules: Rules, bound: float) -> None:
        problem = numbered.problem
        costs, ranks, m = problem.costs, problem.layout.ranks, problem.micro_batches
        ramp = problem.returns[0] - sum(costs.forward[1:]) if problem.layout.chunks > 1 else problem.returns[0]
        target = bound + rules.slack * ramp
        self.numbered, self.rules, self.m, self.stages_of = numbered, rules, m, problem.stages_of
        self.ready, self.latest = numbered.ready(), latest_starts(problem, target, rules.spacing)
        self.next_f, self.next_i = [0] * problem.layout.stages, [0] * problem.layout.stages
        self.pending: list[deque[int]] = [deque() for _ in range(ranks)]
        self.done: list[list[int]] = [[] for _ in range(ranks)]
        self.held, self.active = [0.0] * ranks, [0.0] * ranks
        """Memory of each rank, and what of it waits for I."""
        self.limit = [limit * (1 + TOLERANCE) + TOLERANCE for limit in problem.limits]
        self.reserve = [
            sum(costs.activations[later] for later in problem.stages_of[rank] if later > stage)
            for stage, rank in enumerate(problem.rank_of)
        ]
        """Room that a stage's F has to leave to later stages of its rank."""
        self.idle, self.began = [0.0] * ranks, [0.0] * ranks
        self.budget = [rules.budget * (target - work) + TOLERANCE for work in problem.work]
        self.after_i = [True] * ranks
        self.most = _in_flight(numbered, rules.in_flight)
        lead = rules.ahead
        self.ahead = [m if lead is None else max(1, int(lead[0] * (ranks - q) - lead[1] + 0.5)) for q in range(ranks)]

    def admits(self, rank: int, stage: int) -> bool:
        """Whether rules other than memory let the rank's next F of this stage run."""
        first = self.stages_of[rank][0]
        if stage != first:
            return True
        begun = self.next_f[stage]
        if begun - self.next_i[stage] >= self.most[rank]:
            return False
        last = self.stages_of[rank][-1]
        if last == first:
            return True
        room = self.active[rank] + self.numbered.memory[stage * self.m] + self.reserve[stage] <= self.limit[rank]
        coming = self.next_i[self.stages_of[rank][1]] > self.next_i[stage]
        return begun - self.next_f[last] < self.ahead[rank] and (room or coming)


def _in_flight(numbered: Numbered, share: float | None) -> list[int]:
    problem, m = numbered.problem, numbered.problem.micro_batches
    ranks = problem.layout.ranks
    if share is None:
        return [m] * ranks
    most = min(int(problem.limits[0] / max(problem.costs.activations[0], TOLERANCE) + TOLERANCE), 2 * ranks - 1, m)
    even = [(most - 1) * (ranks - 1 - rank) / max(1, ranks - 1) for rank in range(ranks)]
    return [max(1, 1 + int(share * line + (1 - share) * (most - 1) + 0.999)) for line in even]


class _View(NamedTuple):
    """What a rank sees at a time: actions or -1, their latest starts, and arrivals to come."""

    gradient: int
    gradient_latest: float
    forward: int
    forward_latest: float
    blocked: float
    """Latest start of an F that is ready and lacks memory which pending W's hold."""
    next_gradient: float
    next_forward: float
    gradient_limit: float
    """Until when the rank may be busy without harm to an I that is known to come."""
    forward_limit: float
    urgent: tuple[float, float, float]
    """Of the most urgent arrival to come: latest start, arrival, duration."""


def _look(state: _State, rank: int, now: float) -> _View:
    ready, latest, m, size = state.ready, state.latest, state.m, state.numbered.size
    duration, memory, yielding = state.numbered.duration, state.numbered.memory, state.rules.yielding
    held, limit = state.held[rank], state.limit[rank]
    gradient = forward = -1
    gradient_latest = forward_latest = blocked = next_gradient = next_forward = inf
    gradient_limit = forward_limit = inf
    urgent = (inf, inf, 0.0)
    for stage in state.stages_of[rank]:
        each = state.next_i[stage]
        action = size + stage * m + each
        arrival = ready[action] if each < m else inf
        if arrival < inf:
            by = latest[action]
            if arrival <= now:
                if by < gradient_latest:
                    gradient, gradient_latest = action, by
            else:
                next_gradient = min(next_gradient, arrival)
                gradient_limit = min(gradient_limit, arrival + yielding * max(0.0, by - arrival))
                if by < urgent[0]:
                    urgent = (by, arrival, duration[action])
        each = state.next_f[stage]
        action = stage * m + each
        arrival = ready[action] if each < m else inf
        if arrival < inf and state.admits(rank, stage):
            by = latest[action]
            if held + memory[action] > limit:
                if arrival <= now and state.active[rank] + memory[action] <= limit:
                    blocked = min(blocked, by)
            elif arrival <= now:
                if by < forward_latest:
                    forward, forward_latest = action, by
            else:
                next_forward = min(next_forward, arrival)
                forward_limit = min(forward_limit, arrival + yielding * max(0.0, by - arrival))
                if by < urgent[0]:
                    urgent = (by, arrival, duration[action])
    return _View(
        gradient, gradient_latest, forward, forward_latest, blocked,
        next_gradient, next_forward, gradient_limit, forward_limit, urgent,
    )  # fmt: skip


def _decide(state: _State, rank: int, now: float, view: _View) -> int:
    """The action to run now, a W if it is that of the first pending, or -1 to wait."""
    rules, pending, duration = state.rules, state.pending[rank], state.numbered.duration
    chosen = -1
    spare = state.budget[rank] - state.idle[rank]
    if view.gradient >= 0:
        chosen = view.gradient
        if pending and view.forward < 0 and view.blocked < inf and _clears(rules.clear, view, state.after_i[rank]):
            return pending[0]
        if view.forward >= 0 and (
            state.after_i[rank] if rules.order == "alternate"
            else rules.order == "urgent" and view.forward_latest < view.gradient_latest
        ):  # fmt: skip
            chosen = view.forward
    elif view.forward >= 0:
        takes = duration[view.forward]
        end = now + takes
        if (
            end <= view.next_gradient + rules.delay * takes + TOLERANCE
            or end <= view.gradient_limit
            or view.next_gradient - now > spare
        ):
            chosen = view.forward
    by, arrival, takes = view.urgent
    if chosen >= 0 and rules.look_ahead and now + duration[chosen] > by + TOLERANCE:
        own = view.forward_latest if chosen == view.forward else view.gradient_latest
        if arrival + takes <= own + TOLERANCE and arrival - now <= spare:
            chosen = -1
    if chosen < 0 and pending and _weight_fits(state, now, duration[pending[0]], spare, view):
        return pending[0]
    return chosen


def _clears(clear: str, view: _View, after_i: bool) -> bool:
    return (
        clear == "always"
        or (clear == "urgent" and view.blocked < view.gradient_latest)
        or (clear == "alternate" and after_i)
    )


def _weight_fits(state: _State, now: float, takes: float, spare: float, view: _View) -> bool:
    arrival = min(view.next_gradient, view.next_forward)
    return (
        now + takes <= min(view.gradient_limit, view.forward_limit) + TOLERANCE
        or now + (1 - state.rules.overlap) * takes <= arrival + TOLERANCE
        or arrival - now > spare
        or (state.rules.clear != "never" and view.blocked < view.gradient_limit)
    )


def dispatch(numbered: Numbered, rules: Rules, bound: float, longest: float = inf) -> Pass | None:
    """One pass: [Note: dispatch]. None if it gets stuck or a rank's span grows beyond `longest`."""
    state = _State(numbered, rules, bound)
    ranks, wakes, following = len(state.done), numbered.wakes, numbered.next
    due, since = [0.0] + [inf] * (ranks - 1), [0.0] * ranks
    """When each rank is served next, and since when it waits (inf: it does not)."""
    queue = [(0.0, 0)]
    while queue:
        now, rank = heappop(queue)
        if due[rank] != now:
            continue
        if since[rank] < now and state.done[rank]:
            state.idle[rank] += now - since[rank]
        view = _look(state, rank, now)
        action = _decide(state, rank, now, view)
        if action < 0:
            since[rank] = now
            due[rank] = min(view.next_gradient, view.next_forward)
        else:
            since[rank] = inf
            if not state.done[rank]:
                state.began[rank] = now
            due[rank] = end = now + numbered.duration[action]
            if end - state.began[rank] > longest:
                return None
            _run(state, rank, action, end)
            other, after = wakes[action], following[action]
            if other >= 0 and since[other] < inf and state.ready[after] < due[other]:
                due[other] = state.ready[after]
                heappush(queue, (due[other], other))
        if due[rank] < inf:
            heappush(queue, (due[rank], rank))
    if sum(map(len, state.done)) < 3 * numbered.size:
        return None
    # A rank with nothing left waits since its last action ended.
    return Pass(max(end - began for end, began in zip(since, state.began, strict=True)), state.done)


def _run(state: _State, rank: int, action: int, end: float) -> None:
    """Book an action that ends then."""
    tables = state.numbered
    size, memory = tables.size, tables.memory[action]
    kind, rest = divmod(action, size)
    stage = rest // state.m
    state.done[rank].append(action)
    state.held[rank] += memory
    if kind == 2:
        state.pending[rank].popleft()
        return
    state.after_i[rank] = kind == 1
    if kind == 0:
        state.next_f[stage] += 1
        state.active[rank] += memory
    else:
        state.next_i[stage] += 1
        state.active[rank] -= tables.memory[rest]
        state.pending[rank].append(action + size)
    after = tables.next[action]
    if after >= 0:
        state.ready[after] = end + tables.send[action]
