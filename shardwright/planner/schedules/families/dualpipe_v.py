"""DualPipe-V: two stages a rank on a V, the backward cut in two only where that shortens the ramps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count

from shardwright.planner.schedules.timetable import Action, Costs, Kind, Layout, Timetable


def dualpipe_v(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """The "cut-in-half" form of DeepSeek's DualPipe (arXiv 2412.19437, section 3.2.1; steps 1 to 8 of dualpipev.py in
    https://github.com/deepseek-ai/DualPipe). Where DualPipe overlaps a forward with a backward, this order runs the one
    after the other."""
    return tuple(_rank(rank, layout.ranks, micro_batches) for rank in range(layout.ranks))


def dualpipe_v_refuses(layout: Layout, micro_batches: int) -> str:
    """Its ramps need as many micro-batches as there are stages."""
    few = micro_batches < layout.stages
    return f"it needs as many micro-batches as stages, {layout.stages}" if few else ""


def _rank(rank: int, ranks: int, micro_batches: int) -> tuple[Action, ...]:
    actions: list[Action] = []
    forwards, backwards = (count(), count()), (count(), count())
    pending: deque[Action] = deque()
    behind = ranks - rank - 1

    def forward(chunk: int) -> None:
        actions.append(Action("F", chunk, next(forwards[chunk])))

    def backward(chunk: int, cut: bool = False) -> None:
        kind: Kind = "I" if cut else "B"
        micro_batch = next(backwards[chunk])
        actions.append(Action(kind, chunk, micro_batch))
        if cut:
            pending.append(Action("W", chunk, micro_batch))

    def weight() -> None:
        if pending:
            actions.append(pending.popleft())

    for _ in range(2 * behind):
        forward(0)
    for _ in range(rank + 1):
        forward(0)
        forward(1)
    for _ in range(behind):
        backward(1, cut=True)
        weight()
        forward(1)
    for _ in range(micro_batches - 2 * ranks + rank + 1):
        forward(0)
        backward(1)
        forward(1)
        backward(0)
    for _ in range(behind):
        backward(1)
        forward(1)
        backward(0)
    # Of the last 2 (rank + 1) backwards the second half is cut, so that the ramp need not wait for W's.
    for step in range(2 * (rank + 1)):
        backward(1 - step % 2, cut=step > rank)
    for _ in range(behind):
        weight()
        backward(0, cut=True)
    while pending:
        weight()
    return tuple(actions)
