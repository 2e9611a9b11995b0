"""All comparisons of one trial of a plan."""

from __future__ import annotations

from pathlib import Path

from shardwright.planner import at_rest_bytes
from shardwright.rehearse.compare import (
    Outcome,
    compare_checkpoint,
    compare_equal,
    compare_randomness,
    compare_series,
    compare_updates,
)
from shardwright.rehearse.compare_layout import compare_at_rest, compare_collectives
from shardwright.rehearse.report_types import Check
from shardwright.rehearse.trials import Trial
from shardwright.schemas.plan import Plan
from shardwright.schemas.profile import ModelProfile


def check_pair(of: Trial, plan: Plan, folder: Path, alone: Path, profile: ModelProfile) -> list[Check]:
    """Compare what the plan's processes left in `folder` with what one process left in `alone`, and with the plan."""
    mesh = plan.decision.mesh
    found, expected = Outcome(folder, mesh.world_size), Outcome(alone, 1)
    run, limits = of.name, of.tolerance
    findings = found.findings()
    at_rest = [
        at_rest_bytes(plan.decision, profile.parameters, plan.job.train.optimizer, rank)
        for rank in range(mesh.world_size)
    ]
    initial = expected.weights("initial")
    return [
        compare_equal(run, "initial weights", initial, found.weights("initial")),
        compare_randomness(run, findings),
        compare_series(run, "loss", expected.metric("loss"), found.metric("loss"), limits.loss),
        compare_series(
            run, "gradient norm", expected.metric("grad_norm"), found.metric("grad_norm"), limits.gradient_norm
        ),
        compare_updates(
            run, initial, expected.weights("final"), found.weights("final"), limits.update, limits.of_each_tensor
        ),
        compare_checkpoint(run, found),
        *compare_at_rest(run, at_rest, [rank["at_rest"] for rank in findings]),
        *compare_collectives(run, mesh, plan.prediction.collectives, findings),
    ]
