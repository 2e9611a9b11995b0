"""A pipeline schedule as events for chrome://tracing and https://ui.perfetto.dev.

The form is that of "Trace Event Format" (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU):
complete events (`X`) on a thread for each rank, and counters (`C`) for the memory that it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shardwright.report.schedule import Schedule, schedule_title
from shardwright.report.svg import MARK
from shardwright.report.time_grid import KINDS

_MICROSECONDS = 1000.0
"""In one unit of time: the viewers count in microseconds, and a unit is taken for a millisecond."""


def schedule_trace(schedule: Schedule) -> dict[str, Any]:
    """The trace as plain JSON values."""
    return {
        "otherData": {
            "made": MARK,
            **({"plan": schedule.plan} if schedule.plan else {}),
            "schedule": schedule_title(schedule),
            "unit": schedule.measures.traced,
        },
        "displayTimeUnit": "ms",
        "traceEvents": [*_names(schedule), *_actions(schedule), *_counters(schedule)],
    }


def _names(schedule: Schedule) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": schedule_title(schedule)}}
    for rank in range(schedule.simulation.layout.ranks):
        yield {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": rank, "args": {"sort_index": rank}}


def _actions(schedule: Schedule) -> Iterator[dict[str, Any]]:
    layout, contents = schedule.simulation.layout, schedule.contents
    for rank, lane in enumerate(schedule.simulation.ranks):
        for (kind, chunk, micro_batch), start, end in lane:
            stage = layout.stage(rank, chunk)
            said = {"has": contents[stage]} if contents else {}
            yield {
                "ph": "X",
                "name": f"{kind}{micro_batch}",
                "cat": KINDS[kind],
                "pid": 0,
                "tid": rank,
                "ts": start * _MICROSECONDS,
                "dur": (end - start) * _MICROSECONDS,
                "args": {"stage": stage, **said, "chunk": chunk, "micro_batch": micro_batch},
            }


def _counters(schedule: Schedule) -> Iterator[dict[str, Any]]:
    for rank, steps in enumerate(schedule.simulation.memory):
        for time, held in steps:
            counted = {schedule.measures.memory: round(held, 9)}
            yield {"ph": "C", "name": f"memory of rank {rank}", "pid": 0, "ts": time * _MICROSECONDS, "args": counted}
