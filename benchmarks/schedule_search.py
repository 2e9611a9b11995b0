"""How near zb-auto comes to the lower bound, and how long it takes.

    python benchmarks/schedule_search.py [--all]

Times of F, I, W and sending are those of the zero-bubble paper's three models (arXiv 2401.10241). Bubble rates
are (span - work) / span; a gap of 0 proves that no schedule is shorter. Seconds are processor time of one search, to
which the clock of a shared machine does not add. `--all` adds settings in which the bound is not met at once.
"""

import gc
import sys
import time
from typing import NamedTuple

from shardwright.planner.schedules.auto import search
from shardwright.planner.schedules.timetable import Layout, even_costs

SMALL = (18.522, 18.086, 9.337, 0.601)
MIDDLE = (11.347, 11.248, 8.132, 0.377)
LARGE = (10.402, 10.248, 7.698, 0.46)
HELD_BY_WEIGHT = 0.5


class Setting(NamedTuple):
    """One search; the limit in micro-batches."""

    ranks: int
    micro_batches: int
    chunks: int
    limit: float
    times: tuple[float, float, float, float]


SETTINGS = (
    Setting(8, 24, 1, 8, SMALL),
    Setting(8, 24, 1, 12, SMALL),
    Setting(8, 24, 1, 16, SMALL),
    Setting(16, 48, 1, 16, MIDDLE),
    Setting(16, 48, 1, 24, MIDDLE),
    Setting(32, 256, 1, 32, LARGE),
    Setting(32, 256, 1, 64, LARGE),
    Setting(64, 512, 1, 64, LARGE),
    Setting(64, 512, 1, 128, LARGE),
    Setting(8, 24, 2, 8, SMALL),
    Setting(16, 48, 2, 16, MIDDLE),
    Setting(32, 64, 2, 32, LARGE),
)
MORE = (
    Setting(8, 24, 1, 10, SMALL),
    Setting(16, 48, 1, 32, MIDDLE),
    Setting(32, 256, 1, 48, LARGE),
    Setting(8, 24, 2, 4, SMALL),
    Setting(8, 24, 2, 5, SMALL),
    Setting(8, 24, 2, 6, SMALL),
    Setting(16, 48, 2, 6, MIDDLE),
    Setting(16, 48, 2, 9, MIDDLE),
    Setting(16, 48, 2, 12, MIDDLE),
    Setting(32, 256, 2, 32, LARGE),
)


def main() -> None:
    """Print one row a setting."""
    print("ranks  m    chunks  limit  bubble   of bound  gap      seconds")
    for each in SETTINGS + (MORE if "--all" in sys.argv[1:] else ()):
        layout = Layout(each.ranks, each.chunks, "wave" if each.chunks == 2 else "loop")
        costs = even_costs(layout, each.times, HELD_BY_WEIGHT)
        gc.collect()
        began = time.process_time()
        found = search(layout, costs, each.micro_batches, [each.limit] * each.ranks)
        seconds = time.process_time() - began
        work = each.micro_batches * sum(each.times[:3])
        print(
            f"{each.ranks:<6d} {each.micro_batches:<4d} {each.chunks:<7d} {each.limit:<6g}"
            f" {1 - work / found.span:<8.4f} {1 - work / found.bound:<9.4f} {max(0.0, found.gap):<8.2%} {seconds:.2f}"
        )


if __name__ == "__main__":
    main()
