"""Bubble rates as they were published, to 4 digits."""

import pytest

from shardwright.planner.schedules.simulator import simulate
from shardwright.planner.schedules.table import make_schedule

# Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241: profiled T_F, T_B, T_W and T_comm in ms of the models
# (hidden size, attention heads, sequence length) on p devices with m micro-batches, and the bubble rates that it gives
# for these schedules.
NAMES = ("1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p")
TABLE = {
    "1.5B": ((2304, 24, 1024), (8, 24), (18.522, 18.086, 9.337, 0.601), (0.2431, 0.1585, 0.1083, 0.1585, 0.0433)),
    "14.6B": ((5120, 40, 1024), (16, 48), (11.347, 11.248, 8.132, 0.377), (0.2552, 0.1397, 0.0672, 0.1397, 0.0066)),
}


@pytest.mark.parametrize("model", TABLE)
def test_straight_schedules(model: str) -> None:
    (hidden, heads, sequence), (ranks, micro_batches), times, rates = TABLE[model]
    # Bytes of a transformer layer, section 2.3: M_B = sb(34h + 5as), M_W = 32sbh.
    held_by_weight = 32 * hidden / (34 * hidden + 5 * heads * sequence)
    for name, rate in zip(NAMES, rates, strict=True):
        layout, costs, timetable = make_schedule(name, ranks, micro_batches, times, held_by_weight=held_by_weight)
        simulation = simulate(timetable, layout, costs)
        assert round(simulation.bubble_rate(), 4) == rate, name
        # H1's and H2's peak, by rank from 1: (p - i + 1) M_B + (i - 1) M_W and (2p - 2i + 1) M_B + (2i - 2) M_W.
        after = range(ranks)
        peaks = {
            "zb-h1": [ranks - i + i * held_by_weight for i in after],
            "zb-h2": [2 * (ranks - i) - 1 + 2 * i * held_by_weight for i in after],
        }
        assert simulation.peak_memory == pytest.approx(peaks.get(name, simulation.peak_memory))
        assert max(simulation.peak_memory) <= {"zb-2p": 2 * ranks, "zb-h2": 2 * ranks - 1}.get(name, ranks) + 1e-9


# Of equal T_F, T_B and T_W without sending, m = 4p: what the scheduler that the authors published reaches
# (https://github.com/sail-sg/zero-bubble-pipeline-parallelism); peaks in micro-batches of a device.
V_SHAPES = [
    ("zb-v", {4: (0.0, 4), 6: (0.0, 6), 8: (0.0, 8), 16: (0.0, 16)}),
    ("v-half", {4: (0.0495, 3), 6: (0.0710, 4), 8: (0.0813, 5), 16: (0.0965, 9)}),
    ("v-min", {4: (0.1028, 2), 6: (0.1056, 3), 8: (0.1233, 4), 16: (0.1332, 6)}),
]


@pytest.mark.parametrize(("name", "expected"), V_SHAPES)
def test_v_shapes(name: str, expected: dict[int, tuple[float, int]]) -> None:
    for ranks, (rate, peak) in expected.items():
        layout, costs, timetable = make_schedule(name, ranks, 4 * ranks, (1.0, 1.0, 1.0, 0.0))
        simulation = simulate(timetable, layout, costs)
        assert (round(simulation.bubble_rate(), 4), max(simulation.peak_memory)) == (rate, peak)
