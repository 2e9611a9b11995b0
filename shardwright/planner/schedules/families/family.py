"""What a family of schedules is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardwright.planner.schedules.timetable import Costs, Layout, Placement, Timetable

Make = Callable[[Layout, int, Costs, "Sequence[float] | None"], Timetable]
"""Layout, micro-batches, costs, and a memory limit per rank in units of `Costs.activations` or None."""


class DoesNotFitError(ValueError):
    """A family has no schedule within the memory limit."""


def never(layout: Layout, micro_batches: int) -> str:
    """Of a family that takes every layout and number of micro-batches."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One entry of `SCHEDULES`."""

    name: str
    """Slug."""
    summary: str
    """One sentence, for a person who chooses."""
    source: str
    """The paper that describes it."""
    make: Make
    placement: Placement = "loop"
    chunks: int = 1
    """Stages a rank unless the user says otherwise."""
    tries: Callable[[int, int], tuple[int, ...]] | None = None
    """Of ranks and micro-batches: numbers of stages a rank of which the best is taken unless the user says; None for
    `chunks` alone."""
    allowed_chunks: Callable[[int], bool] = lambda chunks: chunks == 1
    chunks_in_words: str = "1"
    refuses: Callable[[Layout, int], str] = never
    """Why it has no schedule for this layout and number of micro-batches; empty where it has one."""
    memory: Callable[[Layout], float] | None = None
    """The most a rank holds with even stages, in units of one micro-batch's activations of a whole device, whatever the
    number of micro-batches; None: it grows with their number, or is whatever is allowed."""
    searches: bool = False
    """Whether it makes use of a memory limit; others keep it or do not."""
