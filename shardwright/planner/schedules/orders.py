"""Orders of F and I on each rank that are worth filling with W's."""

from __future__ import annotations

from math import ceil

from shardwright.planner.schedules.problem import TOLERANCE, Problem


def alternating(problem: Problem, share: float = 1.0, extra: int = 0) -> list[list[int]]:
    """One stage a rank: F's, then one I and one F in turn.

    [Note: warm-up of alternating ranks]
    A rank that has n micro-batches in flight when it begins to alternate keeps n. No more than memory allows, nor than
    start before its first I can come (and `extra` more). On rank 0 that is the limit; every next rank has to have
    fewer, or its F's wait for those of the rank before: with a period C of the busiest rank, the micro-batch is on its
    way between the two for F + I + 2 send, so at least that share of C fewer (`share` 0: down to 1 on the last rank in
    even steps, if that is less)."""
    m, costs = problem.micro_batches, problem.costs
    stages = problem.layout.stages
    period = max(problem.work) / m
    most = []
    for stage in range(stages):
        room = int(problem.limits[stage] / costs.activations[stage] + TOLERANCE) if costs.activations[stage] else m
        useful = (
            int(1 + problem.returns[stage] / costs.forward[stage] + TOLERANCE) + extra if costs.forward[stage] else m
        )
        most.append(min(m, room, useful))
    orders: list[list[int]] = []
    for stage in range(stages):
        first, gradient = stage * m, (stages + stage) * m
        steep = most[0] - (problem.returns[0] - problem.returns[stage]) / period
        even = 1 + (most[0] - 1) * (stages - 1 - stage) / max(1, stages - 1)
        ahead = max(1, min(most[stage], ceil(share * steep + (1 - share) * min(even, steep) - TOLERANCE)))
        most[stage] = ahead
        order = list(range(first, first + ahead))
        for micro_batch in range(m):
            order.append(gradient + micro_batch)
            if micro_batch + ahead < m:
                order.append(first + ahead + micro_batch)
        orders.append(order)
    return orders


def one_by_one(problem: Problem) -> list[list[int]]:
    """One micro-batch after the other: what always fits."""
    m, stages = problem.micro_batches, problem.layout.stages
    return [
        [
            action
            for each in range(m)
            for action in [stage * m + each for stage in own] + [(stages + stage) * m + each for stage in own[::-1]]
        ]
        for own in problem.stages_of
    ]


class _Turns:
    """Counts of what each rank of a V has run, as ranks take turns.

    A micro-batch goes up the first chunks (F of chunk 0, rank 0 to the last), back along the second (F of chunk 1), and
    its gradient the same way: I of chunk 1 from rank 0 on, I of chunk 0 back."""

    def __init__(self, problem: Problem, lead: float) -> None:
        self.problem, self.m, self.ranks, self.lead = problem, problem.micro_batches, problem.layout.ranks, lead
        self.orders: list[list[int]] = [[] for _ in range(self.ranks)]
        self.count = [[0] * self.ranks for _ in range(4)]
        """F of chunk 0, F of chunk 1, I of chunk 1, I of chunk 0."""
        self.held = [0.0] * self.ranks
        self.keeps = [
            [problem.costs.activations[s] for s in (rank, 2 * self.ranks - 1 - rank)] for rank in range(self.ranks)
        ]

    def may(self, what: int, rank: int) -> bool:
        """Whether the rank's next action of this sort has its input, by count."""
        mine = self.count[what]
        if mine[rank] >= self.m:
            return False
        before = rank - 1 if what % 2 == 0 else rank + 1
        if 0 <= before < self.ranks:
            return mine[before] > mine[rank]
        return what == 0 or self.count[what - 1][rank] > mine[rank]

    def fits(self, chunk: int, rank: int) -> bool:
        """Whether the rank has room for one more F of a chunk."""
        return self.held[rank] + self.keeps[rank][chunk] <= self.problem.limits[rank] * (1 + TOLERANCE)

    def put(self, what: int, rank: int) -> None:
        """Run the rank's next action of this sort."""
        stages, chunk = 2 * self.ranks, (0, 1, 1, 0)[what]
        stage = stages - 1 - rank if chunk else rank
        self.orders[rank].append((what > 1) * stages * self.m + stage * self.m + self.count[what][rank])
        self.count[what][rank] += 1
        self.held[rank] += self.keeps[rank][chunk] if what < 2 else -self.keeps[rank][chunk]

    def warm_up(self) -> None:
        """F's until the first I: on each rank as many of chunk 0 as fit before the first of chunk 1 comes, with room
        left for what must come before the first I, then both chunks in turn."""
        costs, last = self.problem.costs, self.ranks - 1
        for rank in range(self.ranks):
            self.put(0, rank)
        for rank in range(last, -1, -1):
            wait = self.problem.starts[2 * last + 1 - rank] - self.problem.starts[rank]
            while (
                self.count[0][0] < self.m
                and (self.count[0][rank] + 1) * costs.forward[rank] <= wait * self.lead
                and self.held[rank] + (2 + 2 * rank) * self.keeps[rank][0]
                <= self.problem.limits[rank] * (1 + TOLERANCE)
            ):
                for upstream in range(rank + 1):
                    self.put(0, upstream)
            if self.may(1, rank):
                self.put(1, rank)
        for rank in range(1, self.ranks):
            while self._behind(rank):
                able = [self._round(chunk, rank) for chunk in (0, 1)]
                if not any(able):
                    break

    def _behind(self, rank: int) -> bool:
        """Whether a rank has run fewer F's than the one before, or not yet one more of chunk 1."""
        up, back = self.count[:2]
        return up[rank] + back[rank] < up[rank - 1] + back[rank - 1] or back[rank] <= back[rank - 1] < self.m

    def _round(self, chunk: int, lowest: int) -> bool:
        """One F on every rank from the lowest on, where it can; whether any could."""
        ranks = range(self.ranks - 1, lowest - 1, -1) if chunk else range(lowest, self.ranks)
        able = False
        for rank in ranks:
            if self.may(chunk, rank) and self.fits(chunk, rank):
                self.put(chunk, rank)
                able = True
        return able

    def steady(self) -> bool:
        """One I and one F on every rank until all have run; the later pass where both could. False if it gets stuck."""
        total = 4 * self.m * self.ranks
        done = sum(map(sum, self.count))
        while done < total:
            for late, early in ((3, 2), (1, 0)):
                choice = [late if self.may(late, rank) else early for rank in range(self.ranks)]
                backwards = [rank for rank in range(self.ranks - 1, -1, -1) if choice[rank] == late]
                forwards = [rank for rank in range(self.ranks) if choice[rank] == early]
                for rank in backwards + forwards:
                    what = choice[rank]
                    if self.may(what, rank) and (what > 1 or self.fits(what, rank)):
                        self.put(what, rank)
            before, done = done, sum(map(sum, self.count))
            if done == before:
                return False
        return True


def turns(problem: Problem, lead: float = 1.0) -> list[list[int]] | None:
    """A V of two chunks: ranks run one I and one F in turn, after a warm-up that `lead` (of the time until the first F
    of chunk 1) makes longer or shorter. None where memory does not allow it."""
    state = _Turns(problem, lead)
    state.warm_up()
    return state.orders if state.steady() else None
