"""Predicted memory of pipelines against the live tensors of running ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from planner.pipeline_points import pipe, point
from support.launch import results_of

from shardwright.passes import profile_model
from shardwright.planner.predict import Predictor
from shardwright.schemas.source import load_job

pytestmark = [pytest.mark.processes, pytest.mark.slow]

JOB = Path(__file__).parents[3] / "examples" / "bytes-gpt.yaml"
CASES = [("1f1b", (0, 0)), ("1f1b", (2, 2)), ("zb-h1", (0, 0)), ("zb-h1", (1, 2))]
KINDS = {"F": "forward", "I": "input gradient", "W": "weight gradient", "B": "backward"}


def test_the_memory_of_every_rank(tmp_path: Path) -> None:
    """The peak within 1.5 %. Forward of recomputed blocks is predicted as if they kept what is inside: above, and never
    the peak."""
    job = load_job(JOB, check_data=False).job
    pipelines = Predictor(job, profile_model(job, JOB.parent, ("fp32",))).pipelines
    points = {
        f"{schedule} {blocks}": point(pipe(schedule=schedule, checkpointed=blocks), accumulation=8)
        for schedule, blocks in CASES
    }
    runs = [
        {
            "name": name,
            "programs": pipelines.schedules.programs(where),
            "defers": where.pipe.schedule != "1f1b",
            "blocks": where.pipe.checkpointed,
            "cuts": where.pipe.cuts,
            "micro_batches": where.accumulation,
            "micro_batch": where.micro_batch,
        }
        for name, where in points.items()
        if where.pipe is not None
    ]
    found = results_of([(2, runs)], tmp_path, "torch", "pipeline_memory_worker")[0]
    for name, where in points.items():
        for rank in (0, 1):
            phases = {phase.name: phase.total for phase in pipelines.memory.phases(where, rank)}
            peaks = {KINDS[kind]: size for kind, size in found[rank][name].items() if kind in KINDS}
            fullest = max(peaks, key=lambda kind: peaks[kind])
            assert -0.001 < phases[fullest] / peaks[fullest] - 1 < 0.015, (name, rank)
            for kind, size in peaks.items():
                assert -0.01 < phases[kind] / size - 1 < (0.12 if kind == "forward" else 0.015), (name, rank, kind)
