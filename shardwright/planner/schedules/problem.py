"""What a search for a schedule is given, with the quantities that its bounds and its passes share.

[Note: ramps]
With nothing in its way, micro-batch 0 reaches stage s at starts[s] = sum over r < s of F_r + send_r after its first F
began. Between the end of F on stage s and the start of I there, the micro-batch has to go to the last stage and back:
returns[s] = sum over r > s of F_r + I_r + 2 send_(r-1). Both are least times for every micro-batch and any schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from shardwright.planner.schedules.timetable import Costs, Layout

TOLERANCE = 1e-9
"""Relative slack of comparisons of sums of floats."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Stages, costs and limits, and what follows from them; per stage where nothing else is said."""

    layout: Layout
    costs: Costs
    micro_batches: int
    limits: tuple[float, ...]
    """Memory of each rank, in units of `Costs.activations`; never more than all its micro-batches would keep."""
    rank_of: tuple[int, ...]
    stages_of: tuple[tuple[int, ...], ...]
    """Of each rank, in the order of the model."""
    kept: tuple[float, ...]
    """Activations of one micro-batch on each rank."""
    work: tuple[float, ...]
    """Time of all actions of each rank."""
    starts: tuple[float, ...]
    """Least time from the first F of stage 0 to that of each stage: [Note: ramps]."""
    returns: tuple[float, ...]
    """Least time from the end of F to the start of I of the same micro-batch: [Note: ramps]."""

    @property
    def unit(self) -> float:
        """Activations of one micro-batch on the rank that keeps most."""
        return max(self.kept)

    def under(self, cap: float) -> Problem:
        """The same with no rank allowed more than `cap`."""
        return replace(self, limits=tuple(min(limit, cap) for limit in self.limits))


def make_problem(layout: Layout, costs: Costs, micro_batches: int, limits: Sequence[float] | None) -> Problem:
    """Derive a problem; `limits` per rank, or None for no limit."""
    stages = range(layout.stages)
    rank_of = tuple(layout.place(stage)[0] for stage in stages)
    stages_of = tuple(tuple(s for s in stages if rank_of[s] == rank) for rank in range(layout.ranks))
    passes = [sum(times) for times in zip(costs.forward, costs.input_gradient, costs.weight_gradient, strict=True)]
    kept = tuple(sum(costs.activations[s] for s in own) for own in stages_of)
    everything = tuple(micro_batches * each for each in kept)
    steps = [forward + send for forward, send in zip(costs.forward, costs.send, strict=False)]
    trips = [
        costs.forward[s] + costs.input_gradient[s] + 2 * costs.send[s - 1] for s in range(layout.stages - 1, 0, -1)
    ]
    return Problem(
        layout=layout,
        costs=costs,
        micro_batches=micro_batches,
        limits=tuple(map(min, everything, limits)) if limits is not None else everything,
        rank_of=rank_of,
        stages_of=stages_of,
        kept=kept,
        work=tuple(micro_batches * sum(passes[s] for s in own) for own in stages_of),
        starts=tuple(accumulate(steps, initial=0.0)),
        returns=tuple(accumulate(trips, initial=0.0))[::-1],
    )
