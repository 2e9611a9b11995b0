"""Schedules of several stages a rank, stage s on rank s mod p: interleaved 1F1B and breadth-first."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.planner.schedules.timetable import Action, Costs, Layout, Timetable


def interleaved(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """Groups of p micro-batches go through a rank's chunks in turn; (v - 1) p + 2 (p - 1 - i) forwards warm rank i up,
    then one forward and one backward in turn (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
    Clusters Using Megatron-LM", arXiv 2104.04473, section 2.2). Peak 1 + (p - 1) / (p v) times that of 1F1B
    (Korthikanti et al., arXiv 2205.05198, section 4.2.3)."""
    ranks, chunks = layout.ranks, layout.chunks
    forwards = [
        Action("F", chunk, group + each)
        for group in range(0, micro_batches, ranks)
        for chunk in range(chunks)
        for each in range(ranks)
    ]
    backwards = [Action("B", chunks - 1 - chunk, micro_batch) for _, chunk, micro_batch in forwards]
    timetable = []
    for rank in range(ranks):
        warm_up = min((chunks - 1) * ranks + 2 * (ranks - 1 - rank), len(forwards))
        actions = forwards[:warm_up]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            actions += [forward, backward]
        timetable.append(tuple(actions + backwards[len(forwards) - warm_up :]))
    return tuple(timetable)


def interleaved_refuses(layout: Layout, micro_batches: int) -> str:
    """It takes micro-batches in groups of the ranks."""
    left = micro_batches % layout.ranks
    return f"the micro-batches must be a multiple of the ranks, {layout.ranks}" if left else ""


def breadth_first(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """All micro-batches through one chunk before the next, forward and then backward (Lamy-Poirier, "Breadth-First
    Pipeline Parallelism", arXiv 2211.05953, section 4), so that each chunk's parameters are needed twice a step."""
    forwards = [Action("F", chunk, each) for chunk in range(layout.chunks) for each in range(micro_batches)]
    backwards = [Action("B", chunk, each) for chunk in reversed(range(layout.chunks)) for each in range(micro_batches)]
    return (tuple(forwards + backwards),) * layout.ranks
