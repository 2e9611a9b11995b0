"""The constants of tensor, context and expert parallelism in a script: the table of what is divided, second meshes."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from shardwright.backends.pytorch.text import LINE_LENGTH, assignment, literal
from shardwright.planner.space import TENSOR_AXIS
from shardwright.schemas.plan import Decision, Division, Plan

STYLES = {
    "region": "Region",
    "column": "Column",
    "row": "Row",
    "vocabulary": "Vocabulary",
    "scatter": "Scatter",
    "shared": "Shared",
    "experts": "TensorExperts",
}
"""The runtime's class of each style."""
_AMONG = "among the processes with the same parts"


def data_processes(decision: Decision) -> int:
    """Processes that have the same part of every layer and the same stages."""
    return decision.mesh.world_size // (decision.pipeline.ranks * decision.tensor_parallel.degree)


def parallel_constants(plan: Plan) -> dict[str, str]:
    """The constants of each kind of parallelism, by the key of the decision."""
    decision = plan.decision
    tp, cp, ep = degrees(decision)
    copies, pipelined = data_processes(decision), decision.pipeline.schedule != "none"
    constants = {"tensor_parallel": "", "context_parallel": "", "expert_parallel": ""}
    if tp > 1:
        head = divided_head(plan)
        lines = [assignment("TENSOR_RANKS", tp, "neighbouring processes that share every layer")]
        if copies > 1 and not pipelined:
            comment = "processes that have the same part of every layer, each with its own samples"
            lines.append(assignment("COPIES", copies, comment if cp == 1 else comment.split(",")[0]))
        comment = "the module that makes the logits, which are never whole"
        named = [assignment("HEAD", head, comment)] if head else []
        constants["tensor_parallel"] = "\n".join([*lines, tensor_table(plan.model.divisions), *named])
    if cp > 1:
        comment, is_named = "the module that makes the logits, of own positions only", tp > 1 and divided_head(plan)
        constants["context_parallel"] = "\n".join(
            [
                assignment("CONTEXT_RANKS", cp, f"neighbours {_AMONG} share each sequence"),
                assignment("CONTEXT_METHOD", decision.context_parallel.method, "how they attend to all of it"),
                *_second_mesh("CONTEXT", decision, {"outer": copies // cp, "cp": cp}),
                *([assignment("HEAD", plan.model.head, comment)] if plan.model.head and not is_named else []),
            ]
        )
    if ep > 1:
        constants["expert_parallel"] = "\n".join(_expert_constants(plan))
    return constants


def tensor_table(divisions: tuple[Division, ...]) -> str:
    """`TENSOR_PARALLEL`: what is done to the modules of each pattern, one a line."""
    lines = [
        "# Of the modules that each pattern names: how their parameters are divided, and what enters and leaves there.",
        "TENSOR_PARALLEL: dict[str, ParallelStyle] = {",
        *(_entry(division) for division in divisions),
        "}",
    ]
    return "\n".join(lines)


def _entry(division: Division) -> str:
    """One line of the table where it fits, else one line an argument, as `ruff format` leaves it."""
    values = {
        "enters": division.enters or None,
        "sequence_dim": division.sequence_dim,
        "attributes": division.attributes or None,
        "dims": division.dims or None,
        "units": division.units or None,
        "parts": division.parts or None,
    }
    head = f"    {literal(division.pattern)}: {STYLES[division.style]}("
    given = {name: value for name, value in values.items() if value is not None}
    flat = ", ".join(f"{name}={literal(value)}" for name, value in given.items())
    if len(head) + len(flat) + 2 <= LINE_LENGTH:
        return f"{head}{flat}),"
    if 8 + len(flat) <= LINE_LENGTH and "\n" not in flat:
        return f"{head}\n        {flat}\n    ),"
    lines = (f"        {name}={_indented(value, 8, len(name) + 9)}," for name, value in given.items())
    return "\n".join([head, *lines, "    ),"])


def _indented(value: Any, indent: int, column: int) -> str:
    """A literal whose lines after the first are moved right."""
    return literal(value, column + 1).replace("\n", "\n" + " " * indent)


def degrees(decision: Decision) -> tuple[int, int, int]:
    """Of tensor, context and expert parallelism."""
    return decision.tensor_parallel.degree, decision.context_parallel.degree, decision.expert_parallel.degree


def _second_mesh(name: str, decision: Decision, axes: dict[str, int]) -> list[str]:
    """Constants of the same processes with other axes, between those of the pipeline and of tensor parallelism."""
    ranks, tp = decision.pipeline.ranks, decision.tensor_parallel.degree
    axes = ({"pp": ranks} if ranks > 1 else {}) | axes | ({TENSOR_AXIS: tp} if tp > 1 else {})
    return [
        assignment(f"{name}_MESH", tuple(axes.values())),
        assignment(f"{name}_AXES", tuple(axes)),
    ]


def _expert_constants(plan: Plan) -> list[str]:
    decision = plan.decision
    ep, copies = decision.expert_parallel.degree, data_processes(decision)
    layers = {each.pattern: each.attributes for each in plan.model.expert_modules}
    table = literal(layers, len("EXPERT_LAYERS: dict[str, tuple[str, ...]] = "))
    return [
        assignment("EXPERT_RANKS", ep, f"neighbours {_AMONG} share the experts of each layer"),
        *_second_mesh("EXPERT", decision, expert_axes(decision, copies, ep)),
        "# Modules that hold experts, and their attributes that count these.",
        f"EXPERT_LAYERS: dict[str, tuple[str, ...]] = {table}",
    ]


def expert_axes(decision: Decision, copies: int, ep: int) -> dict[str, int]:
    """Of fsdp2 the experts' own sharding: a shard degree divided by `ep`, down to 1, and the rest are replicas."""
    if decision.engine.name != "fsdp2":
        return {"outer": copies // ep, "ep": ep}
    shard = max(1, decision.states.parameters.degree // ep)
    replicate = copies // ep // shard
    return ({"expert_replicate": replicate} if replicate > 1 else {}) | {"expert_shard": shard, "ep": ep}


def divided_head(plan: Plan) -> str:
    """Path of the module whose logits are divided, if there is one: columns outside of the blocks."""
    columns = (each.pattern for each in plan.model.divisions if each.style == "column" and each.enters)
    outside = [pattern for pattern in columns if not any(_below(pattern, path) for path in plan.model.block_paths)]
    return outside[0] if len(outside) == 1 else ""


def _below(pattern: str, path: str) -> bool:
    """Whether modules of the pattern are in the block."""
    parts, block = pattern.split("."), path.split(".")
    return len(parts) > len(block) and all(map(fnmatchcase, block, parts))
