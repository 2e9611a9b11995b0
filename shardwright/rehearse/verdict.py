"""All comparisons of one trial of a plan."""

from __future__ import annotations

from pathlib import Path

from shardwright.planner import at_rest_bytes
from shardwright.planner.groups import Groups
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
    run = of.name
    findings = found.findings()
    groups = Groups(profile)
    at_rest = [at_rest_bytes(plan.decision, groups, plan.job.train, rank) for rank in range(mesh.world_size)]
    randomness = compare_randomness(run, findings)
    return [
        compare_equal(run, "initial weights", expected.weights("initial"), found.weights("initial")),
        randomness,
        # Processes that draw, draw differently: their numbers cannot be compared.
        *(_compare_training(of, expected, found) if randomness.passed else ()),
        compare_checkpoint(run, found),
        *compare_at_rest(run, at_rest, [rank["at_rest"] for rank in findings]),
        *compare_collectives(run, mesh, plan.prediction.collectives, findings),
    ]


def _compare_training(of: Trial, expected: Outcome, found: Outcome) -> list[Check]:
    run, limits = of.name, of.tolerance
    norm, its_norm = expected.metric("grad_norm"), found.metric("grad_norm")
    initial, final = expected.weights("initial"), expected.weights("final")
    return [
        compare_series(run, "loss", expected.metric("loss"), found.metric("loss"), limits.loss),
        compare_series(run, "gradient norm", norm, its_norm, limits.gradient_norm),
        compare_updates(run, initial, final, found.weights("final"), limits.update, limits.of_each_tensor),
    ]
