"""Orders of a pipeline's actions that no family has: any that is possible."""

from __future__ import annotations

import random
from collections.abc import Sequence

from shardwright.planner.schedules.timetable import Action, Layout, Timetable


def random_timetable(
    layout: Layout, micro_batches: int, edges: Sequence[tuple[int, int]], seed: int, whole: float = 0.3
) -> Timetable:
    """A random order of all actions in which each comes after what it needs; a share `whole` of the stages and
    micro-batches has one whole backward (B) in place of I and W."""
    chance = random.Random(seed)
    before = {stage: [one for one, other in edges if other == stage] for stage in range(layout.stages)}
    after = {stage: [other for one, other in edges if one == stage] for stage in range(layout.stages)}
    todo: dict[tuple[str, int, int], str] = {}
    for stage in range(layout.stages):
        for micro_batch in range(micro_batches):
            kinds = "FB" if chance.random() < whole else "FIW"
            todo |= {("I" if kind == "B" else kind, stage, micro_batch): kind for kind in kinds}
    ranks: list[list[Action]] = [[] for _ in range(layout.ranks)]

    def ready(key: tuple[str, int, int]) -> bool:
        kind, stage, micro_batch = key
        needs = {
            "F": [("F", each, micro_batch) for each in before[stage]],
            "I": [("F", stage, micro_batch), *(("I", each, micro_batch) for each in after[stage])],
            "W": [("I", stage, micro_batch)],
        }
        return not any(each in todo for each in needs[kind])

    while todo:
        key = chance.choice([key for key in todo if ready(key)])
        rank, chunk = layout.place(key[1])
        ranks[rank].append(Action(todo.pop(key), chunk, key[2]))  # type: ignore[arg-type]
    return tuple(map(tuple, ranks))
