"""From a plan to a folder of files that trains it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jinja2

from shardwright.backends.emission import Emission
from shardwright.backends.pytorch.engines import ENGINES, micro_batch_flags
from shardwright.backends.pytorch.headline import closing_lines, headline, launch_lines, plan_lines
from shardwright.backends.pytorch.imports import KNOWN, Import, imports_for
from shardwright.backends.pytorch.recipes import COMPUTE_DTYPES, OPTIMIZER_CONSTANTS, PRECISION_POLICIES, recipe_context
from shardwright.backends.pytorch.sources import RUNTIME, architecture, local_files, model_config, runtime_files
from shardwright.backends.pytorch.starting_weights import export_context, weights_context
from shardwright.backends.pytorch.text import (
    assignment,
    comment_lines,
    dotted,
    identifier,
    literal,
)
from shardwright.planner.engines import ENGINES as ENGINE_TRAITS
from shardwright.planner.optimizers import OPTIMIZERS as OPTIMIZER_TRAITS
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Decision, Plan, json_fields

_PARTS = ("parse_args", "build", "optimizer", "lr_schedule", "summed_loss", "evaluate", "train", "main")


def emit(plan: Plan, job_folder: Path, out: Path) -> Emission:
    """The files of a plan: train.py, its runtime, launchers, plan.json, the user's sources.

    Reads the user's sources and configuration below `job_folder` and nothing else; `out` only says from where relative
    paths are seen. Raises InputError when a source is missing or takes the name of an emitted file.
    """
    environment = _environment()
    _check_arguments(plan)
    hf = plan.job.model.hf
    config = None if hf is None else model_config(hf, job_folder)
    model_class = None if config is None else architecture(config)
    names = _user_names(plan)
    if model_class is not None:
        names[model_class] = Import(1, "transformers", model_class)
    context = _context(plan, environment, model_class, job_folder, out)
    known = {**KNOWN, **names}
    script, modules = _script(plan, environment, context, known)
    export, export_modules = _export_script(
        environment, {**context, **export_context(plan, config, job_folder, out)}, known
    )
    files = {
        "train.py": script,
        "export.py": export,
        "plan.json": json.dumps(json_fields(plan), indent=2, allow_nan=False) + "\n",
        "launch.sh": _render(environment, "launch/launch.sh.j2", context) + "\n",
        "train.slurm": _render(environment, "launch/train.slurm.j2", context) + "\n",
        **runtime_files(modules | export_modules),
    }
    if config is not None:
        files["model_config.json"] = config
    sources = local_files(plan, job_folder)
    taken = sorted(files.keys() & sources.keys())
    if taken:
        raise InputError(Diagnostic(key="model", message=f"{taken[0]} would take the place of an emitted file"))
    return Emission(files | sources, executable=frozenset({"launch.sh"}), packages=frozenset({RUNTIME}))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shardwright.backends.pytorch"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.globals.update(assign=assignment, literal=literal)
    return environment


def _render(environment: jinja2.Environment, template: str, context: dict[str, Any]) -> str:
    return environment.get_template(template).render(context).strip("\n")


def _script(
    plan: Plan, environment: jinja2.Environment, context: dict[str, Any], known: dict[str, Import]
) -> tuple[str, frozenset[str]]:
    """The text of train.py, and the modules of the runtime that it imports."""
    engine = plan.decision.engine.name
    templates = {
        "build": f"engines/{engine}/build.py.j2",
        "train": f"engines/{engine}/train.py.j2",
        "optimizer": f"optimizers/{plan.job.train.optimizer.name}.py.j2",
        "lr_schedule": f"lr_schedules/{plan.job.train.schedule.name}.py.j2",
    }
    parts = [name for name in _PARTS if name != "evaluate" or context["evaluates"]]
    constants = _render(environment, "parts/constants.py.j2", context)
    functions = [_render(environment, templates.get(name, f"parts/{name}.py.j2"), context) for name in parts]
    body = "\n\n\n".join([constants, *functions])
    imports, modules = imports_for(body, known)
    head = _render(environment, "parts/head.py.j2", context)
    return f"{head}\n\n{imports}\n\n{body}\n", modules


def _export_script(
    environment: jinja2.Environment, context: dict[str, Any], known: dict[str, Import]
) -> tuple[str, frozenset[str]]:
    """The text of export.py, and the modules of the runtime that it imports."""
    body = _render(environment, "export/body.py.j2", context)
    imports, modules = imports_for(body, known)
    return f"{_render(environment, 'export/head.py.j2', context)}\n\n{imports}\n\n{body}\n", modules


def _check_arguments(plan: Plan) -> None:
    """Raises InputError for arguments that are no plain values, or that are keyed by something else than strings."""
    for key, arguments in (("model.args", plan.job.model.args), ("data.args", plan.job.data.args)):
        try:
            literal(arguments)
        except TypeError as error:
            raise InputError(Diagnostic(key=key, message=str(error))) from error


def _user_names(plan: Plan) -> dict[str, Import]:
    """The user's functions that the script calls, each under a name of ours. Raises InputError for impossible ones."""
    model, data = plan.job.model, plan.job.data
    paths = {
        "create_model": ("model.factory", model.factory),
        "loss_function": ("model.loss", model.loss if ":" in model.loss else None),
        "make_dataset": ("data.dataset", data.dataset),
        "make_validation_dataset": ("data.validation_dataset", data.validation_dataset),
    }
    local = {Path(source).parts[0].removesuffix(".py") for source in plan.model.local_sources}
    names = {}
    for alias, (key, path) in paths.items():
        if path is not None:
            module, function = path.split(":")
            try:
                section = 2 if module.split(".")[0] in local else 1
                names[alias] = Import(section, dotted(module), identifier(function), alias)
            except ValueError as error:
                raise InputError(Diagnostic(key=key, message=str(error))) from error
    return names


def _context(
    plan: Plan, environment: jinja2.Environment, model_class: str | None, job_folder: Path, out: Path
) -> dict[str, Any]:
    """Everything that the templates look up."""
    job, decision = plan.job, plan.decision
    train, checkpointing = job.train, decision.checkpointing
    engine = ENGINES[decision.engine.name]
    world = decision.mesh.world_size
    nodes = max(1, world // job.cluster.devices_per_node)
    policy = PRECISION_POLICIES[decision.precision]
    fused = not ENGINE_TRAITS[decision.engine.name].dtensors or OPTIMIZER_TRAITS[train.optimizer.name].fused_on_dtensors
    save, evaluation = train.save_every, train.evaluate_every
    evaluates = job.data.validation is not None or job.data.validation_dataset is not None
    checkpoints_some = 0 < checkpointing.blocks < checkpointing.of
    initializes = plan.model.init == "modules" and job.model.weights == "random"
    needs_blocks = engine.shards_blocks or initializes or checkpointing.blocks > 0
    context: dict[str, Any] = {
        "plan": plan,
        "job": job,
        "train": train,
        "decision": decision,
        "kind": job.cluster.device.kind,
        "world": world,
        "nodes": nodes,
        "per_node": world // nodes,
        "grouped": engine.grouped,
        "flat": ENGINE_TRAITS[decision.engine.name].flat,
        "init": plan.model.init,
        "initializes": initializes,
        "hugging_face": job.model.hf is not None,
        "architecture": model_class,
        "model_args": job.model.args or None,
        "accumulates": decision.accumulation > 1,
        "clips": train.optimizer.clip_grad_norm is not None,
        "evaluates": evaluates,
        "save_steps": save.value if save is not None and save.unit == "steps" else None,
        "save_seconds": save.value if save is not None and save.unit == "seconds" else None,
        "evaluate_steps": evaluation.value if evaluates and evaluation and evaluation.unit == "steps" else None,
        "evaluate_seconds": evaluation.value if evaluates and evaluation and evaluation.unit == "seconds" else None,
        "checkpointed": checkpointing.blocks > 0,
        "checkpoints_some": checkpoints_some,
        "has_blocks": bool(plan.model.block_paths),
        "implementation": "fused" if fused else "foreach",
        "micro_batch_flags": micro_batch_flags(decision),
        "policy": policy,
        "compute_dtype": COMPUTE_DTYPES[decision.precision],
        "mp_policy": "" if policy is None else ", mp_policy=precision",
        "batch_on_device": "to_device(batch, device)" if job.cluster.device.kind == "cuda" else "batch",
        "forward_arguments": _forward_arguments(plan),
        "optimizer_constants": OPTIMIZER_CONSTANTS[train.optimizer.name](train.optimizer),
        "plan_constants": _plan_constants(plan, needs_blocks, checkpoints_some),
        "predicted_step_s": float(f"{plan.prediction.step_time_s:.4g}"),
        "predicted_peak_bytes": plan.prediction.memory.peak_allocated_bytes,
        "slurm_name": re.sub(r"[^A-Za-z0-9_.-]+", "-", plan.model.name)[:64] or "train",
        "headline": headline(plan),
        "launch_lines": launch_lines(plan, nodes, engine.grouped),
        "plan_lines": plan_lines(plan),
        "closing_lines": closing_lines(plan, plan.model.local_sources),
        **recipe_context(train),
        **_data(plan, job_folder, out),
        **weights_context(plan, job_folder, out),
    }
    context["evaluate_condition"] = _evaluate_condition(context)
    context["create_model"] = _render(environment, "parts/create_model.py.j2", context)
    context["checkpoint_block"] = _render(environment, "parts/checkpoint_block.py.j2", context)
    return context


def _evaluate_condition(context: dict[str, Any]) -> str:
    if context["evaluate_steps"] is not None:
        return "state.step % EVALUATE_EVERY == 0 or state.step == last_step"
    if context["evaluate_seconds"] is not None:
        return "evaluating or state.step == last_step"
    return "state.step == last_step"


def _forward_arguments(plan: Plan) -> str:
    model = plan.job.model
    if model.inputs:
        return ", ".join(f"{identifier(name)}=batch[{literal(field)}]" for name, field in model.inputs.items())
    return 'input_ids=batch["input_ids"]' if model.hf is not None else 'batch["input_ids"]'


def _data(plan: Plan, job_folder: Path, out: Path) -> dict[str, Any]:
    """Where samples come from: the expressions that make them, and what their constants hold."""
    data = plan.job.data
    if data.synthetic is not None:
        samples = "SyntheticTokens(VOCABULARY, SEQUENCE_LENGTH, SEED)"
        return {"data_root": None, "train_samples": samples, "validation_samples": ""}
    if data.dataset is not None:
        arguments = "**DATASET_ARGS" if data.args else ""
        return {
            "data_root": None,
            "train_samples": f"make_dataset({arguments})",
            "validation_samples": f"make_validation_dataset({arguments})",
        }
    reader = "byte_files" if data.bytes is not None else "token_files"
    masks = ", TRAIN_MASKS" if data.mask else ""
    held_out_masks = ", VALIDATION_MASKS" if data.validation and data.validation.mask else ""
    root = os.path.relpath(job_folder.resolve(), out.resolve())
    return {
        "data_root": Path(root).as_posix(),
        "train_files": data.bytes or data.tokens,
        "train_samples": f"{reader}(args.data, TRAIN_FILES, SEQUENCE_LENGTH{masks})",
        "validation_samples": f"{reader}(args.data, VALIDATION_FILES, SEQUENCE_LENGTH{held_out_masks})",
    }


def _plan_constants(plan: Plan, needs_blocks: bool, checkpoints_some: bool) -> str:
    """Each decision's constants below the reasons for it."""
    decision = plan.decision
    accumulation = reshard = blocks = ""
    if decision.accumulation > 1:
        accumulation = assignment("ACCUMULATION", decision.accumulation, "micro-batches of one step on one device")
    if decision.engine.reshard_after_forward is not None and plan.model.block_paths:
        reshard = _reshard(decision)
    if needs_blocks and plan.model.block_paths:
        blocks = _blocks(plan.model.block_paths)
    if checkpoints_some:
        comment = "the first so many of BLOCKS are recomputed in backward"
        blocks += "\n" + assignment("CHECKPOINTED_BLOCKS", decision.checkpointing.blocks, comment)
    sections = {
        ("mesh",): assignment("WORLD_SIZE", decision.mesh.world_size, "processes, one a device"),
        ("engine.name", "states", "communication", "precision"): ENGINES[decision.engine.name].constants(decision),
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
