"""Lower bounds on the longest span of a rank, over all schedules within a memory limit.

Valid for stages of different cost, several chunks on a rank and limits that differ between ranks. Where a rank has
several stages, their least memory and most work stand in for each of them. `k` is the rank's limit, `m` the number of
micro-batches, `M` what a stage keeps from F to I and `h` what of it stays to W; sums over a rank's stages are written
F, I, W, M. A span runs from the start of a rank's first action, which is F of its lowest stage, to the end of its last.

[Note: bound of the work]
A rank runs each of its actions once: span >= m (F + I + W).

[Note: bound of a rank's own idling]
F of the lowest stage and I of the highest are a way apart that no micro-batch shortens: first_i = starts[high] -
starts[low] + F_high + returns[high]. Until then the rank runs nothing but F's, and those it runs all keep their
activations: at most k. It idles for the rest, `wait`. Its last F is one of its highest stage; the I of the lowest stage
for the same micro-batch comes at least `back` = returns[low] - (starts[high] + F_high - starts[low] - F_low) later.
Between them the rank has only the I and W of what it holds when its last F ends: a micro-batches active (one of them
the last, whose I and W come after) and w waiting for W, a M + w h <= k. It idles for the rest, `drain`. Both idle times
add up where the last F cannot precede the first I, because all F's together keep more than k; otherwise the longer
counts.

[Note: bound of the chain]
Seen from rank 0's first F, rank q begins at starts[low], waits `wait`, and runs all its F's and I's before its last
I, which is of its lowest stage; by then it has run all W's but those that fit into k. From there the gradient goes down
to stage 0, whose W ends rank 0's span.

[Note: bound of the path]
When the last F of rank q ends, all its F's are done and all but k of what they keep is let go of. That takes at least
the cheaper of I alone, I / (M - h) for a unit of memory, or I and W, (I + W) / M. After that F the last micro-batch
still goes up to the last stage and down to stage 0. The F's that do not fit before the first I come after it.

[Note: bound of the area]
A micro-batch keeps M from the start of F to the end of I, at least F + returns + I, and h while W runs. Summed over
micro-batches that is at most k times the span.

Each is a necessary condition and no more; that all are valid is checked against the exact optimum of small cases. The
area is the bound that Qi et al. use for the lifespan of a building block ("Pipeline Parallelism with Controllable
Memory", arXiv 2405.15362, section 3); the others are derived here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import floor, inf

from shardwright.planner.schedules.problem import TOLERANCE, Problem, make_problem
from shardwright.planner.schedules.timetable import Costs, Layout


def lower_bound(layout: Layout, costs: Costs, micro_batches: int, limits: Sequence[float] | None) -> float:
    """No schedule's longest span is below this; `limits` per rank in units of `Costs.activations`, None: no limit."""
    return bound_of(make_problem(layout, costs, micro_batches, limits))


def bound_of(problem: Problem) -> float:
    """The largest of the bounds over all ranks."""
    costs = problem.costs
    steps = [gradient + send for gradient, send in zip(costs.input_gradient, costs.send, strict=False)]
    ways_down = list(accumulate(steps, initial=costs.weight_gradient[0]))
    """From the end of a stage's I to the end of stage 0's W."""
    return max(max(_bounds(_rank(problem, rank), problem, ways_down)) for rank in range(problem.layout.ranks))


@dataclass(frozen=True, slots=True)
class _Rank:
    """One rank's stages: sums over them, and the extremes that stand in for each."""

    stages: tuple[int, ...]
    count: int
    """Stages times micro-batches."""
    limit: float
    forward: float
    input_gradient: float
    activations: float
    work: float
    first_i: float
    back: float
    fits_forward: float
    """Time of the F's that fit into the limit."""


def _rank(problem: Problem, rank: int) -> _Rank:
    costs, stages = problem.costs, problem.stages_of[rank]
    low, high = stages[0], stages[-1]
    starts, returns, forward = problem.starts, problem.returns, costs.forward
    limit = problem.limits[rank]
    count = problem.micro_batches * len(stages)
    all_forward = sum(forward[s] for s in stages)
    fitting = _fitting(limit, min(costs.activations[s] for s in stages), count)
    to_high = starts[high] - starts[low]
    return _Rank(
        stages=stages,
        count=count,
        limit=limit,
        forward=all_forward,
        input_gradient=sum(costs.input_gradient[s] for s in stages),
        activations=sum(costs.activations[s] for s in stages),
        work=problem.work[rank],
        first_i=to_high + forward[high] + returns[high],
        back=returns[low] - (to_high + forward[high] - forward[low]),
        fits_forward=min(fitting * max(forward[s] for s in stages), problem.micro_batches * all_forward),
    )


def _fitting(limit: float, each: float, most: int) -> int:
    """How many of a size fit into a limit."""
    return most if each <= 0 else min(most, floor(limit / each * (1 + TOLERANCE) + TOLERANCE))


def _bounds(rank: _Rank, problem: Problem, ways_down: Sequence[float]) -> tuple[float, ...]:
    costs, m = problem.costs, problem.micro_batches
    low, high = rank.stages[0], rank.stages[-1]
    excess = m * rank.activations - rank.limit
    too_much = excess > TOLERANCE * rank.limit
    wait = max(0.0, rank.first_i - rank.fits_forward)
    drain = max(0.0, rank.back - _work_at_hand(rank, costs))
    idle = wait + drain if too_much else max(wait, drain)

    light = min(costs.held_by_weight[s] for s in rank.stages)
    forced = rank.count - _fitting(rank.limit, light, rank.count)
    forced_weight = forced * min(costs.weight_gradient[s] for s in rank.stages)
    chain = problem.starts[low] + wait + m * (rank.forward + rank.input_gradient) + forced_weight + ways_down[low]

    freeing = excess * _least_work_a_unit(rank, costs) if too_much else 0.0
    outward = problem.returns[high] + costs.input_gradient[high] + ways_down[high]
    path = problem.starts[low] + m * rank.forward + freeing + outward
    if too_much:
        rest = max(0.0, m * rank.forward - rank.fits_forward)
        path = max(path, problem.starts[low] + rank.first_i + rest + freeing + outward)
    kept = sum(
        costs.activations[s] * (costs.forward[s] + problem.returns[s] + costs.input_gradient[s])
        + costs.held_by_weight[s] * costs.weight_gradient[s]
        for s in rank.stages
    )
    area = m * kept / rank.limit if rank.limit > 0 else inf if kept > 0 else 0.0
    return rank.work + idle, chain, path, area


def _work_at_hand(rank: _Rank, costs: Costs) -> float:
    """The most I and W that a rank can hold when its last F ends, that of the last micro-batch aside."""
    light = min(costs.activations[s] for s in rank.stages)
    held = min(costs.held_by_weight[s] for s in rank.stages)
    weight = max(costs.weight_gradient[s] for s in rank.stages)
    both = weight + max(costs.input_gradient[s] for s in rank.stages)
    most = 0.0
    for active in range(1, _fitting(rank.limit, light, rank.count) + 1):
        waiting = _fitting(max(0.0, rank.limit - active * light), held, rank.count - active)
        most = max(most, (active - 1) * both + waiting * weight)
    return most


def _least_work_a_unit(rank: _Rank, costs: Costs) -> float:
    """Least time of I's and W's that lets go of one unit of memory."""
    ways = []
    for s in rank.stages:
        let_go = costs.activations[s] - costs.held_by_weight[s]
        if costs.activations[s] > 0:
            ways.append((costs.input_gradient[s] + costs.weight_gradient[s]) / costs.activations[s])
        if let_go > 0:
            ways.append(costs.input_gradient[s] / let_go)
    return min(ways, default=0.0)
