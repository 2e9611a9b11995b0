"""Drawings of a plan: what was decided, what it is predicted to cost, and why."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text

from shardwright.planner.constants import device_budget
from shardwright.report.layout import (
    Bar,
    Cell,
    Column,
    Footnotes,
    Grid,
    Row,
    duration,
    facts,
    heading,
    page,
    percent,
    plural,
)
from shardwright.report.memory import against_limit, draw_memory
from shardwright.report.parallel import draw_sharing, parallel_lines
from shardwright.report.pipeline import draw_pipeline, pipeline_parts, schedule_line
from shardwright.report.search import draw_alternatives, draw_why
from shardwright.report.stages import copies_of, piped
from shardwright.report.states import draw_states
from shardwright.report.time import draw_collectives, draw_time
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Decision, Pipeline, Plan, StateSharding
from shardwright.schemas.units import human_count, human_seconds

_PRECISIONS = {
    "fp32": "fp32 throughout",
    "bf16_mixed": "bf16_mixed: computes in bf16, reduces gradients and updates parameters in fp32",
}
_STATES = ("parameters", "gradients", "optimizer_states")


def draw_summary(plan: Plan) -> Group:
    """The plan in a dozen lines: decided above, predicted below."""
    decided = facts((("model", _model(plan)), ("cluster", cluster_line(plan.job.cluster)), *_decided(plan)))
    predicted = facts(_predicted(plan))
    return Group(Text(plan.name, style="bold green"), Text(), decided, Text(), heading("Predicted"), predicted)


def device_limit(job: JobSpec) -> int:
    """Bytes that the allocator may reserve on one device."""
    return device_budget(job.cluster, job.budget.device_memory)


def _model(plan: Plan) -> str:
    attention = "" if plan.model.attention == "none" else f", {plan.model.attention} attention"
    return f"{plan.model.name}, {human_count(plan.model.parameters)} parameters{attention}"


def cluster_line(cluster: ClusterSpec) -> str:
    """`8 x h100-sxm-80gb (node of 8)`, levels fastest first."""
    levels = " x ".join(f"{level.name} of {level.size}" for level in cluster.levels)
    return f"{cluster.world_size} x {cluster.device.name} ({levels})"


def _decided(plan: Plan) -> Iterable[tuple[str, str]]:
    decision = plan.decision
    yield "engine", _engine(decision)
    yield "mesh", " x ".join(_axis(axis.name, axis.size, axis.levels) for axis in decision.mesh.axes) or "one process"
    staged = decision.pipeline.schedule != "none"
    if staged:
        yield "pipeline", _pipeline(decision.pipeline)
    yield from parallel_lines(decision)
    for name in _STATES:
        yield name.replace("_", " "), _sharding(getattr(decision.states, name), decision)
        if name == "parameters" and decision.states.secondary is not None:
            yield "second copy", f"{_sharding(decision.states.secondary, decision)}, for backward"
    for name, axes in decision.communication:
        if axes:
            yield name.replace("_", " "), f"over {', '.join(axes)}"
    yield "global batch", _batch(plan)
    yield "checkpointing", _checkpointing(decision)
    yield "precision", _PRECISIONS[decision.precision]


def _engine(decision: Decision) -> str:
    kept = {None: "", True: ", parameters freed after forward", False: ", parameters kept after forward"}
    return decision.engine.name + kept[decision.engine.reshard_after_forward]


def _pipeline(pipeline: Pipeline) -> str:
    each = f", {plural(pipeline.chunks, 'stage')} each" if pipeline.chunks > 1 else ""
    stages = plural(len(pipeline.cuts) + 1, "stage")
    late = ", late step" if pipeline.late_step else ""
    return f"{stages} on {plural(pipeline.ranks, 'rank')}{each}, schedule {pipeline.schedule}{late}"


def _axis(name: str, size: int, levels: tuple[str, ...]) -> str:
    return f"{name} {size}" + (f" over {', '.join(levels)}" if levels else "")


def _sharding(state: StateSharding, decision: Decision) -> str:
    of = ["its part of every layer"] if decision.tensor_parallel.degree > 1 else []
    of += ["its stages"] if decision.pipeline.schedule != "none" else []
    whose = f"of {' of '.join(of)}, " if of else ""
    if state.degree == 1:
        return f"{whose}whole on each device"
    over = f", one copy over {', '.join(state.levels)}" if state.levels else ""
    return f"{whose}1/{state.degree} on each device{over}"


def _batch(plan: Plan) -> str:
    decision, train = plan.decision, plan.job.train
    sequences = train.global_batch_sequences
    if decision.pipeline.schedule == "none":
        times = plural(decision.accumulation, "accumulation step")
        split = f"{_readers(decision)} x micro-batch {decision.micro_batch} x {times}"
    else:
        times = plural(decision.accumulation, "micro-batch", "micro-batches")
        split = f"{_readers(decision)} x {times} of {decision.micro_batch}"
    return f"{plural(sequences, 'sequence')} = {split}; {human_count(sequences * train.sequence_length)} tokens"


def _readers(decision: Decision) -> str:
    """What has samples of its own: `8 devices`, `4 pipelines`, or `4 groups of 2 devices`."""
    piped = decision.pipeline.schedule != "none"
    shared = decision.context_parallel.degree
    readers = copies_of(decision) // shared
    together = shared if piped else shared * decision.tensor_parallel.degree
    noun = "pipeline" if piped else "device"
    if together == 1:
        return plural(readers, noun)
    return f"{plural(readers, 'group')} of {plural(together, noun)}"


def _checkpointing(decision: Decision) -> str:
    chosen = decision.checkpointing
    if chosen.policy == "none" or chosen.blocks == 0:
        return "none"
    return f"{chosen.blocks} of {plural(chosen.of, 'block')} recomputed in backward"


def _predicted(plan: Plan) -> list[tuple[str, Cell]]:
    prediction, train = plan.prediction, plan.job.train
    reserved, limit = prediction.memory.peak_reserved_bytes, device_limit(plan.job)
    rate = f"{human_count(prediction.tokens_per_s)} tokens/s, MFU {percent(prediction.mfu)}"
    tokens = train.total_steps * train.global_batch_sequences * train.sequence_length
    schedule = schedule_line(plan)
    return [
        ("step", f"{human_seconds(prediction.step_time_s)}, {rate}"),
        *([("schedule", schedule)] if schedule else []),
        (
            "run",
            f"{plural(train.total_steps, 'step')}, {human_count(tokens)} tokens,"
            f" {duration(train.total_steps * prediction.step_time_s)}",
        ),
        ("memory", Text.assemble(against_limit(reserved, limit), " reserved")),
        ("", Bar(reserved / limit, 32, track=True)),
    ]


def draw_reasons(plan: Plan) -> Group:
    """Why each key of the decision has its value, in one sentence each."""
    rows = [Row((reason.key.removeprefix("decision."), first_sentence(reason.because))) for reason in plan.reasons]
    title = heading("Why", "`inspect --why KEY` says more")
    return Group(title, Grid((Column("decision"), Column("because", "prose")), rows))


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    sentence, stop, _ = text.partition(". ")
    return sentence + stop.strip()


def draw_assumptions(plan: Plan) -> Group:
    """Numbers that the prediction rests on, with their origin."""
    notes = Footnotes()
    columns = (Column("assumed"), Column("value", "prose"), Column("origin"))
    rows = [Row((one.name, one.value, one.origin + notes.mark(one.source))) for one in plan.assumptions]
    return Group(heading("Assumptions"), Grid(columns, rows), Text(), notes.drawn())


def draw_plan(plan: Plan) -> Group:
    """What `plan` shows: the summary, the reasons, what came closest."""
    pipe = piped(plan)
    drawn = [draw_pipeline(pipe)] if pipe else []
    return page(draw_summary(plan), *drawn, draw_reasons(plan), draw_alternatives(plan, most=3))


def draw_inspection(plan: Plan) -> Group:
    """Everything in the plan."""
    pipe, limit, sharing = piped(plan), device_limit(plan.job), draw_sharing(plan)
    parts: tuple[RenderableType, ...] = (
        draw_summary(plan),
        *(pipeline_parts(pipe, limit) if pipe else ()),
        *([sharing] if sharing else []),
        draw_states(plan),
        draw_memory(plan.prediction.memory, limit),
        draw_time(plan.prediction),
        draw_collectives(plan.prediction.collectives),
        draw_why(plan),
        draw_alternatives(plan),
        draw_assumptions(plan),
    )
    return page(*parts)
