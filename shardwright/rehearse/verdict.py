"""All comparisons of one trial of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwright.planner import at_rest_bytes
from shardwright.planner.at_rest import State
from shardwright.planner.pipelines.costs import pipe_of
from shardwright.planner.pipelines.prediction import Pipelines
from shardwright.planner.predict import Predictor
from shardwright.planner.schedules.text import from_text
from shardwright.planner.space import Point, parallel_of, point_of
from shardwright.rehearse.compare import (
    Outcome,
    compare_checkpoint,
    compare_equal,
    compare_randomness,
    compare_series,
    compare_updates,
)
from shardwright.rehearse.compare_layout import (
    Processes,
    compare_actions,
    compare_at_rest,
    compare_collectives,
    own_stages,
)
from shardwright.rehearse.report_types import Check
from shardwright.rehearse.trials import Trial, loss_tolerances
from shardwright.schemas.plan import Mesh, Plan
from shardwright.schemas.profile import ModelProfile


def check_pair(of: Trial, plan: Plan, folder: Path, alone: Path, profile: ModelProfile) -> list[Check]:
    """Compare what the plan's processes left in `folder` with what one process left in `alone`, and with the plan."""
    world = plan.decision.mesh.world_size
    found, expected = Outcome(folder, world), Outcome(alone, 1)
    run = of.name
    findings = found.findings()
    of_ranks = _predictors(plan, profile)
    at_rest = [at_rest_bytes(plan.decision, each.groups, plan.job.train, rank) for rank, each in enumerate(of_ranks)]
    randomness = compare_randomness(run, findings)
    return [
        compare_equal(run, "initial weights", expected.weights("initial"), found.weights("initial")),
        randomness,
        # Processes that draw, draw differently: their numbers cannot be compared.
        *(_compare_training(of, plan, expected, found) if randomness.passed else ()),
        compare_checkpoint(run, found),
        *_compare_layout(run, plan, of_ranks, at_rest, findings),
    ]


def _predictors(plan: Plan, profile: ModelProfile) -> list[Predictor]:
    """Of each process: those that share layers may have parts of different sizes."""
    whole, parallel = Predictor(plan.job, profile), parallel_of(plan.decision)
    parts = [whole.of_rank(parallel, rank) for rank in range(parallel.tp)]
    return parts * (plan.decision.mesh.world_size // parallel.tp)


def _compare_training(of: Trial, plan: Plan, expected: Outcome, found: Outcome) -> list[Check]:
    run, limits = of.name, of.tolerance
    norm, its_norm = expected.metric("grad_norm"), found.metric("grad_norm")
    loss, its_loss = expected.metric("loss"), found.metric("loss")
    initial, final = expected.weights("initial"), expected.weights("final")
    of_loss = loss_tolerances(of, plan.decision, loss, norm, expected.findings()[0]["moved"])
    return [
        compare_series(run, "loss", loss, its_loss, of_loss),
        compare_series(run, "gradient norm", norm, its_norm, limits.gradient_norm),
        compare_updates(run, initial, final, found.weights("final"), limits.update, limits.of_each_tensor, len(loss)),
    ]


def _compare_layout(
    run: str,
    plan: Plan,
    of_ranks: Sequence[Predictor],
    at_rest: Sequence[Mapping[State, int]],
    findings: Sequence[Mapping[str, Any]],
) -> list[Check]:
    mesh, point = plan.decision.mesh, point_of(plan.decision)
    held = [rank["at_rest"] for rank in findings]
    if point.pipe is None:
        who, actions = Processes(mesh, point.parallel), []
        predicted = [each.collectives(point) for each in of_ranks]
    else:
        pipeline, each_rank = plan.prediction.pipeline, point.copies * point.parallel.tp
        assert pipeline is not None, "a plan with stages predicts its pipeline"
        who = _processes(point, mesh, of_ranks[0].pipelines)
        predicted = [each.pipelines.collectives(point, rank // each_rank) for rank, each in enumerate(of_ranks)]
        timetable = from_text("\n".join(pipeline.timetable))
        actions = [compare_actions(run, who, timetable, point.pipe.layout, findings)]
    return [
        *actions,
        *compare_at_rest(run, who, at_rest, held),
        *compare_collectives(run, who, predicted, findings),
    ]


def _processes(point: Point, mesh: Mesh, pipelines: Pipelines) -> Processes:
    """The stages of each process, and with whom it shares parameters."""
    pipe, each_rank = pipe_of(point), point.copies * point.parallel.tp
    stages, ties = [], []
    for process in range(mesh.world_size):
        rank, copy = divmod(process, each_rank)
        shared = {unit.ranks for unit in pipelines.costs.owners.units(pipe, rank) if len(unit.ranks) > 1}
        stages.append(own_stages(pipe, mesh.world_size, process))
        ties.append(tuple(tuple(each * each_rank + copy for each in ranks) for ranks in sorted(shared)))
    return Processes(mesh, point.parallel, tuple(stages), tuple(ties))
