"""From a job and a profile to a plan."""

from __future__ import annotations

from itertools import chain

from shardwright.planner.assumptions import assumptions
from shardwright.planner.candidates import Candidate, measure, timed
from shardwright.planner.divided import divided
from shardwright.planner.edited import checked_point
from shardwright.planner.explain import Explainer
from shardwright.planner.infeasible import infeasible
from shardwright.planner.model_facts import model_facts
from shardwright.planner.names import plan_name
from shardwright.planner.parallels import parallels
from shardwright.planner.pipelines.refused import no_pipeline
from shardwright.planner.pipelines.space import pipelines
from shardwright.planner.predict import Predictor
from shardwright.planner.recipe import check_recipe
from shardwright.planner.relax import pins, without
from shardwright.planner.search import Search
from shardwright.planner.space import block_count, configurations, decide, unshardable
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Infeasible, Plan
from shardwright.schemas.plan import Search as SearchReport
from shardwright.schemas.profile import ModelProfile


def make_plan(job: JobSpec, profile: ModelProfile, *, job_file: str, defaults: tuple[str, ...]) -> Plan | Infeasible:
    """The fastest plan that fits, or why none does.

    `profile` should hold the dtypes of `needed_dtypes(job)`: only what was profiled is considered. `job_file` is the
    job's path relative to the plan's folder, `defaults` the keys that the person left out. Raises InputError where the
    strategy leaves nothing to choose from.
    """
    _check_blocks(job, profile)
    check_recipe(job.train.optimizer, profile.parameters)
    predictor = Predictor(job, profile)
    found = Search(predictor)
    chosen = found.chosen()
    if chosen is not None:
        return _assemble(predictor, found, chosen, chosen, job_file, defaults)
    nearest = found.closest(lambda point: True)
    if nearest is None:
        raise InputError(_nothing_left(job, profile))
    return infeasible(predictor, found, nearest)


def evaluate(plan: Plan, profile: ModelProfile) -> Plan:
    """A plan whose decision may have been edited, checked and predicted anew; the planner's own choice is among the
    alternatives then. An untouched plan comes back equal. Raises InputError with keys `decision....`."""
    predictor = Predictor(plan.job, profile)
    point = checked_point(predictor, plan.decision)
    chosen = timed(predictor, measure(predictor, point))
    found = Search(predictor)
    return _assemble(predictor, found, chosen, found.chosen(), plan.job_file, plan.defaults)


def _assemble(
    predictor: Predictor,
    found: Search,
    chosen: Candidate,
    planned: Candidate | None,
    job_file: str,
    defaults: tuple[str, ...],
) -> Plan:
    """`planned` is the planner's own choice, where there is one."""
    job, profile, point = predictor.job, predictor.profile, chosen.point
    explainer = Explainer(predictor, found, chosen, planned)
    alternatives, reasons = explainer.alternatives(), tuple(explainer.reasons())
    return Plan(
        name=plan_name(point, block_count(profile)),
        job=job,
        defaults=defaults,
        job_file=job_file,
        profile_digest=profile.digest,
        model=model_facts(profile, point),
        decision=decide(point, job.cluster, block_count(profile)),
        prediction=predictor.prediction(point),
        search=SearchReport(
            considered=found.considered,
            measured=found.measured,
            feasible=len(found.feasible),
            alternatives=alternatives,
        ),
        reasons=reasons,
        assumptions=assumptions(point, job, profile),
    )


def _check_blocks(job: JobSpec, profile: ModelProfile) -> None:
    """Raises InputError for more checkpointed blocks than the model has."""
    blocks, choice = block_count(profile), job.strategy.checkpointing
    if choice == "auto":
        return
    if any(isinstance(value, int) and value > blocks for value in choice):
        suggestion = f"write `none`, `full`, or at most {blocks}" if blocks else "write `none`, or leave it out"
        message = f"the model has {blocks} repeated blocks to checkpoint"
        raise InputError(Diagnostic(key="strategy.checkpointing", message=message, suggestion=suggestion))


def _nothing_left(job: JobSpec, profile: ModelProfile) -> list[Diagnostic]:
    """Which restriction excludes every point: those that alone do, else all together."""

    def permits_something(relaxed: JobSpec) -> bool:
        return any(
            next(chain(configurations(*own, parallel), pipelines(*own, parallel)), None) is not None
            for parallel in parallels(relaxed, profile)
            for own in [divided(relaxed, profile, parallel)]
        )

    pinned = pins(job)
    refused = unshardable(profile, "fsdp2")
    if not permits_something(without(job, *pinned)):
        world, batch = job.cluster.world_size, job.train.global_batch_sequences
        if batch % world:
            # With pipeline stages fewer copies of the model would share it, where the model can be cut.
            message = f"{world} devices cannot share {batch} sequences equally"
            return [Diagnostic(key="train.global_batch", message=message)]
        return [
            Diagnostic(key="model", message=f"no engine can train the model here: {refused or 'no precision fits'}")
        ]
    alone = [key for key in pinned if permits_something(without(job, key))] or pinned
    refused = refused or no_pipeline(job, profile)
    why = f" ({refused})" if refused else ""
    stay = "as it is" if len(pinned) == 1 else "as they are"
    message = f"with {' and '.join(pinned)} {stay}, no engine can run the job{why}"
    return [Diagnostic(key=key, message=message, suggestion="leave it out, or write `auto`") for key in alone]
