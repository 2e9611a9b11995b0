"""The constants of a script that the plan decides, each below the reasons for it."""

from __future__ import annotations

from shardwright.backends.pytorch.engines import ENGINES, pipeline_constants
from shardwright.backends.pytorch.parallel_constants import parallel_constants
from shardwright.backends.pytorch.text import assignment, comment_lines
from shardwright.planner.engines import ENGINES as ENGINE_TRAITS
from shardwright.schemas.plan import Decision, Plan


def plan_constants(plan: Plan, needs_blocks: bool, checkpoints_some: bool) -> str:
    """Each decision's constants below the reasons for it."""
    decision, pipeline = plan.decision, plan.decision.pipeline
    pipelined = pipeline.schedule != "none"
    accumulation = reshard = blocks = stages = ""
    if decision.accumulation > 1 or pipelined:
        of = "pipeline" if pipelined else "device"
        accumulation = assignment("ACCUMULATION", decision.accumulation, f"micro-batches of one step on one {of}")
    if decision.engine.reshard_after_forward is not None and plan.model.block_paths and not pipelined:
        reshard = _reshard(decision)
    if needs_blocks and plan.model.block_paths:
        blocks = _blocks(plan.model.block_paths)
    if checkpoints_some:
        comment = "the first so many of BLOCKS are recomputed in backward"
        blocks += "\n" + assignment("CHECKPOINTED_BLOCKS", decision.checkpointing.blocks, comment)
    if pipelined:
        stages = pipeline_constants(decision)
    if any(pipeline.checkpointed):
        comment = "of each stage, so many of its first blocks are recomputed in backward"
        blocks += "\n" + assignment("CHECKPOINTED", pipeline.checkpointed, comment)
    sections: dict[tuple[str, ...], str] = {
        ("mesh",): assignment("WORLD_SIZE", decision.mesh.world_size, "processes, one a device"),
        ("engine.name", "states", "communication", "precision"): ENGINES[decision.engine.name].constants(decision),
        ("pipeline",): stages,
        **{(key,): text for key, text in parallel_constants(plan).items()},
        ("engine.reshard_after_forward",): reshard,
        ("micro_batch",): assignment("MICRO_BATCH", decision.micro_batch, "samples of one forward on one device"),
        ("accumulation",): accumulation,
        ("checkpointing",): blocks,
        ("",): "",
    }
    whys: dict[tuple[str, ...], list[str]] = {keys: [] for keys in sections}
    for reason in plan.reasons:
        key = reason.key.removeprefix("decision.")
        owner = next((keys for keys in sections if key in keys or key.split(".")[0] in keys), ("",))
        whys[owner].append(comment_lines(f"Why {key} = {reason.value}: {reason.because}"))
    # A stretch of reasons begins with an empty line, so that one sees what it belongs to.
    lines = [
        line for keys, text in sections.items() for line in ([""] * bool(whys[keys]), whys[keys], [text] * bool(text))
    ]
    return "\n".join(line for group in lines for line in group).lstrip("\n")


def _reshard(decision: Decision) -> str:
    """`RESHARD_AFTER_FORWARD`; of fsdp2 a number where there is a second copy."""
    freed, secondary = decision.engine.reshard_after_forward, decision.states.secondary
    if secondary is None or ENGINE_TRAITS[decision.engine.name].flat:
        comment = "whether a block's gathered parameters are freed between its forward and its backward"
        return assignment("RESHARD_AFTER_FORWARD", freed, comment)
    comment = "devices that a block's parameters are spread over between its forward and its backward"
    return assignment("RESHARD_AFTER_FORWARD", secondary.degree, comment)


def _blocks(paths: tuple[str, ...]) -> str:
    """`BLOCKS`, short where the paths count up: `[f"model.layers.{index}" for index in range(32)]`."""
    prefix = paths[0].rpartition(".")[0]
    counted = tuple(f"{prefix}.{index}" for index in range(len(paths)))
    if (
        len(paths) > 2
        and paths == counted
        and all(part.isidentifier() and part.isascii() for part in prefix.split("."))
    ):
        return f'BLOCKS = [f"{prefix}.{{index}}" for index in range({len(paths)})]  # the repeated blocks, in order'
    return assignment("BLOCKS", list(paths), "the repeated blocks, in order")
