"""Latest starts.

[Note: latest starts]
With stage s's first F at starts[s], its rank has to end by starts[lowest stage of the rank] + target. Backwards from
there: I of micro-batch j leaves room for its own and all later I's and W's of its stage and of the lower stages of its
rank, which all follow it, and, with one stage a rank, for the F's that memory keeps from running before it; it starts
early enough for I of the stage before and for the next micro-batch's I. F starts early enough for F of the next stage
(on the last one for its I) and for the next micro-batch's F. All are necessary for the target, not sufficient;
`spacing` goes beyond that: it keeps micro-batches that memory forces apart by a share of the rank's work for one.
"""

from __future__ import annotations

from math import inf

from shardwright.planner.schedules.problem import TOLERANCE, Problem


def latest_starts(problem: Problem, target: float, spacing: float) -> list[float]:
    """Of every F and I by number, for every rank's span to be at most `target`."""
    costs, m, stages = problem.costs, problem.micro_batches, problem.layout.stages
    gradients: list[list[float]] = []
    after = [0.0] * problem.layout.ranks
    """I and W of one micro-batch on a rank's stages so far."""
    for stage in range(stages):
        rank = problem.rank_of[stage]
        own = problem.stages_of[rank]
        takes = costs.input_gradient[stage]
        after[rank] += takes + costs.weight_gradient[stage]
        end = problem.starts[own[0]] + target
        step = costs.send[stage - 1] + takes if stage else 0.0
        between = costs.forward[stage] if stage == stages - 1 else 0.0
        fitting = _fitting(problem, rank)
        apart = spacing * max(0.0, _work_of_one(problem, rank) - takes - between)
        late = costs.forward[stage] if len(own) == 1 else 0.0
        row, following = [0.0] * m, inf
        for each in range(m - 1, -1, -1):
            start = min(end - (m - each) * after[rank] - max(0, m - each - fitting) * late, following - takes)
            if stage:
                start = min(start, gradients[-1][each] - step)
            row[each] = start
            following = start - between - (apart if each + fitting <= m else 0.0)
        gradients.append(row)
    forwards = [[start - costs.forward[-1] for start in gradients[-1]]]
    for stage in range(stages - 2, -1, -1):
        rank = problem.rank_of[stage]
        takes, send, above = costs.forward[stage], costs.send[stage], forwards[-1]
        fitting = _fitting(problem, rank)
        apart = spacing * (_work_of_one(problem, rank) - takes)
        row, following = [0.0] * m, inf
        for each in range(m - 1, -1, -1):
            row[each] = start = min(above[each] - send, following) - takes
            following = start - (apart if each >= fitting else 0.0)
        forwards.append(row)
    return [start for row in forwards[::-1] + gradients for start in row]


def _fitting(problem: Problem, rank: int) -> int:
    """Whole micro-batches that fit on a rank."""
    each = problem.kept[rank]
    return problem.micro_batches if each <= 0 else int(problem.limits[rank] / each + TOLERANCE)


def _work_of_one(problem: Problem, rank: int) -> float:
    return problem.work[rank] / problem.micro_batches
