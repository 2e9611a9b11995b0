"""The docstring of a script: how to start it, and the plan in a few lines with what it is predicted to cost."""

from __future__ import annotations

from textwrap import fill

from shardwright.backends.pytorch.text import docstring_text, prose
from shardwright.planner.constants import device_budget
from shardwright.planner.engines import ENGINES
from shardwright.planner.precisions import PRECISIONS
from shardwright.schemas.plan import Decision, Plan
from shardwright.schemas.units import human_bytes, human_count, human_seconds

_WIDTH = 116
_LEFT = 62


def headline(plan: Plan) -> str:
    """What is trained on what, with which plan: one line where it fits."""
    source = plan.job.model.factory or plan.model.name
    return _wrapped(f"Train {source} on {plan.decision.mesh.world_size} x {plan.job.cluster.device.name}: {plan.name}.")


def launch_lines(plan: Plan, nodes: int, grouped: bool) -> str:
    """The commands that start and resume it; where it starts from a folder of weights, also how one comes out."""
    if plan.job.cluster.launcher == "slurm":
        start = "sbatch train.slurm"
    elif not grouped:
        start = "python train.py"
    elif nodes == 1:
        start = "./launch.sh"
    else:
        start = "HEAD=node0 ./launch.sh"
    where = "" if nodes == 1 or "sbatch" in start else f" on each of the {nodes} nodes"
    resume, export = f"{start} --resume", "python export.py FOLDER"
    loads = plan.job.model.weights != "random"
    width = max(len(resume), len(export) * loads) + 4
    lines = [
        f"    {start:<{width}}# start{where}: checkpoints and metrics.jsonl go to ./out",
        f"    {resume:<{width}}# go on from the newest checkpoint there",
    ]
    lines += [f"    {export:<{width}}# write the model of the newest one as safetensors files"] if loads else []
    return "\n".join(lines)


def plan_lines(plan: Plan) -> str:
    """Two columns: what was decided, and what it is predicted to cost."""
    left = _decided(plan.decision, plan.job.train.global_batch_sequences)
    right = _predicted(plan)
    rows = [("Plan (plan.json)", "Predicted")]
    for number in range(max(len(left), len(right))):
        key, value = left[number] if number < len(left) else ("", "")
        other, cost = right[number] if number < len(right) else ("", "")
        rows.append((f"  {key:<13} {value}", f"{other:<12} {cost}"))
    lines = [f"{a:<{_LEFT}}{b}" if len(a) < _LEFT else f"{a}\n{'':<{_LEFT}}{b}" for a, b in rows]
    return docstring_text("\n".join(line.rstrip() for line in lines))


def closing_lines(plan: Plan, local: tuple[str, ...]) -> str:
    """What the script needs, and whose it is; of an engine of our own, on which hardware it has been run."""
    packages = ", ".join(("torch", *plan.model.packages))
    beside = ", ".join(("shardwright_runtime/", *local))
    engine = plan.decision.engine.name
    run_on = f" The engine {engine}: {ENGINES[engine].run_on}." if ENGINES[engine].flat else ""
    return _wrapped(
        f"Compiled by shardwright from {plan.job_file}. The file is yours to read and change: it needs {packages}, and "
        f"beside it {beside}.{run_on}"
    )


def _decided(decision: Decision, global_batch: int) -> list[tuple[str, str]]:
    mesh, states, recomputed = decision.mesh, decision.states, decision.checkpointing
    axes = " x ".join(f"{axis.name} {axis.size}" for axis in mesh.axes) or "one process"
    pipeline, pipelined = decision.pipeline, decision.pipeline.schedule != "none"
    freed = None if pipelined else decision.engine.reshard_after_forward
    kept = {True: ", freed after forward", False: ", kept gathered", None: ""}[freed]
    degrees = (
        f"parameters /{states.parameters.degree}, gradients /{states.gradients.degree}, "
        f"optimizer /{states.optimizer_states.degree}"
    )
    second = "" if states.secondary is None else f"parameters /{states.secondary.degree}, for backward"
    gathers, reductions = decision.communication.int8_gathers, decision.communication.int4_reductions
    tensor, context, experts = decision.tensor_parallel, decision.context_parallel, decision.expert_parallel
    copies = mesh.world_size // (pipeline.ranks * tensor.degree * context.degree)
    batch = f"{global_batch} = {copies} x {decision.micro_batch} x {decision.accumulation} micro-batches"
    stages = f"{pipeline.schedule}, {len(pipeline.cuts) + 1} stages{', late step' * pipeline.late_step}"
    whole = "whole on every process of a stage" if pipelined else "every process holds all states"
    return [
        ("engine", f"{decision.engine.name}{kept}"),
        ("mesh", axes),
        *([("pipeline", stages)] if pipelined else []),
        *([("tensors", f"/{tensor.degree}{', the sequence too' * tensor.sequence}")] if tensor.degree > 1 else []),
        *([("sequences", f"/{context.degree}, {context.method}")] if context.degree > 1 else []),
        *([("experts", f"/{experts.degree}")] if experts.degree > 1 else []),
        ("shards", degrees if states.optimizer_states.degree > 1 else f"none: {whole}"),
        *([("second copy", second)] if second else []),
        *([("int8", f"gathers over {', '.join(gathers)}")] if gathers else []),
        *([("int4", f"reductions over {', '.join(reductions)}")] if reductions else []),
        ("batch", batch),
        ("precision", PRECISIONS[decision.precision].summary.split(",")[0]),
        ("recomputed", f"{recomputed.blocks} of {recomputed.of} blocks"),
    ]


def _predicted(plan: Plan) -> list[tuple[str, str]]:
    prediction, memory = plan.prediction, plan.prediction.memory
    limit = device_budget(plan.job.cluster, plan.job.budget.device_memory)
    largest = max(prediction.time, key=lambda part: part.seconds, default=None)
    part = f"{largest.name} ({human_seconds(largest.seconds)})" if largest else "unknown"
    pipeline = prediction.pipeline
    return [
        ("step time", human_seconds(prediction.step_time_s)),
        ("tokens/s", human_count(prediction.tokens_per_s)),
        ("MFU", f"{prediction.mfu:.1%}"),
        ("allocated", human_bytes(memory.peak_allocated_bytes)),
        ("reserved", f"{human_bytes(memory.peak_reserved_bytes)} of {human_bytes(limit)}"),
        ("most time", part),
        *([] if pipeline is None else [("bubble", f"{pipeline.bubble_rate:.1%}")]),
    ]


def _wrapped(text: str) -> str:
    return docstring_text(fill(prose(text), _WIDTH, break_long_words=False, break_on_hyphens=False))
