"""Schedules of one stage a rank whose order is fixed: GPipe, 1F1B, ZB-H1 and ZB-H2."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.planner.schedules.timetable import Action, Costs, Layout, Timetable


def gpipe(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """Every forward, then every backward (Huang et al., "GPipe", arXiv 1811.06965, figure 2c), here in the order of the
    micro-batches, so that gradients add up in the order in which one process would add them."""
    forwards = [Action("F", 0, micro_batch) for micro_batch in range(micro_batches)]
    backwards = [Action("B", 0, micro_batch) for micro_batch in range(micro_batches)]
    return (tuple(forwards + backwards),) * layout.ranks


def one_f_one_b(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """p - i forwards on rank i (from 0), then one backward and one forward in turn (Narayanan et al., "PipeDream",
    arXiv 1806.03377; with a flush, "Memory-Efficient Pipeline-Parallel DNN Training", arXiv 2006.09503)."""
    return tuple(tuple(_one_by_one(micro_batches, layout.ranks - rank, None)) for rank in range(layout.ranks))


def zb_h1(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """1F1B with the backward cut in two and rank i's W's i micro-batches late (arXiv 2401.10241, section 2.1,
    figure 2): bubble (p - 1)(T_F + T_B - T_W), peak p M_B."""
    return tuple(tuple(_one_by_one(micro_batches, layout.ranks - rank, rank)) for rank in range(layout.ranks))


def zb_h2(layout: Layout, micro_batches: int, costs: Costs, limits: Sequence[float] | None) -> Timetable:
    """Twice the warm-up of 1F1B, 2(p - i) - 1 forwards on rank i, and W's 2i micro-batches late (arXiv 2401.10241,
    section 2.2, figure 3): bubble (p - 1)(T_F + T_B - 2 T_W), peak (2p - 1) M_B."""
    return tuple(
        tuple(_one_by_one(micro_batches, 2 * (layout.ranks - rank) - 1, 2 * rank)) for rank in range(layout.ranks)
    )


def _one_by_one(micro_batches: int, warm_up: int, late: int | None) -> list[Action]:
    """Forwards to warm up, then a backward and a forward in turn; W's `late` micro-batches after their I's (None: the
    backward in one)."""
    warm_up = min(warm_up, micro_batches)
    actions = [Action("F", 0, micro_batch) for micro_batch in range(warm_up)]
    weights = 0
    for micro_batch in range(micro_batches):
        actions.append(Action("B" if late is None else "I", 0, micro_batch))
        if late is not None and micro_batch >= late:
            actions.append(Action("W", 0, weights))
            weights += 1
        if warm_up + micro_batch < micro_batches:
            actions.append(Action("F", 0, warm_up + micro_batch))
    if late is not None:
        actions += [Action("W", 0, micro_batch) for micro_batch in range(weights, micro_batches)]
    return actions
