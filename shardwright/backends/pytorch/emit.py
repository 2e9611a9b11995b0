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
from shardwright.backends.pytorch.parallel import parallel_context
from shardwright.backends.pytorch.pipelines import PROGRAM, pipeline_context, programs
from shardwright.backends.pytorch.plan_constants import plan_constants
from shardwright.backends.pytorch.recipes import COMPUTE_DTYPES, OPTIMIZER_CONSTANTS, PRECISION_POLICIES, recipe_context
from shardwright.backends.pytorch.sources import RUNTIME, architecture, local_files, model_config, runtime_files
from shardwright.backends.pytorch.starting_weights import export_context, weights_context
from shardwright.backends.pytorch.text import (
    assignment,
    dotted,
    identifier,
    literal,
)
from shardwright.planner.engines import ENGINES as ENGINE_TRAITS
from shardwright.planner.optimizers import OPTIMIZERS as OPTIMIZER_TRAITS
from shardwright.planner.schedules.text import program_to_text
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Plan, json_fields

_PARTS = ("parse_args", "build", "optimizer", "lr_schedule", "summed_loss", "evaluate", "log_step", "train", "main")


def emit(plan: Plan, job_folder: Path, out: Path) -> Emission:
    """The files of a plan: train.py, its runtime, launchers, plan.json, a pipeline's programs, the user's sources.

    Reads the user's sources and configuration below `job_folder` and nothing else; `out` only says from where relative
    paths are seen. Raises InputError when a source is missing or takes the name of an emitted file, and for a timetable
    that is not right.
    """
    environment = _environment()
    _check_arguments(plan)
    hf = plan.job.model.hf
    config = None if hf is None else model_config(hf, job_folder)
    model_class = None if config is None else architecture(config)
    names = _user_names(plan)
    if model_class is not None:
        names[model_class] = Import(1, "transformers", model_class)
    lowered = programs(plan)
    context = _context(plan, environment, model_class, job_folder, out) | pipeline_context(plan, lowered)
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
    if lowered:
        files[PROGRAM] = program_to_text(lowered)
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
    engine = "pipeline" if context["pipelined"] else plan.decision.engine.name
    templates = {
        "build": f"engines/{engine}/build.py.j2",
        "train": f"engines/{engine}/{'train_late' if context['late'] else 'train'}.py.j2",
        "optimizer": f"optimizers/{plan.job.train.optimizer.name}.py.j2",
        "lr_schedule": f"lr_schedules/{plan.job.train.schedule.name}.py.j2",
    }
    absent = [name for name, key in (("evaluate", "evaluates"), ("log_step", "late")) if not context[key]]
    parts = [name for name in _PARTS if name not in absent]
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
    pipelined = decision.pipeline.schedule != "none"
    checkpoints_some = 0 < checkpointing.blocks < checkpointing.of and not pipelined
    initializes = plan.model.init == "modules" and job.model.weights == "random"
    grouped = engine.grouped or world > 1
    parallel = parallel_context(plan)
    needs_blocks = engine.shards_blocks or initializes or checkpointing.blocks > 0 or parallel["divides_sequence"]
    context: dict[str, Any] = {
        "plan": plan,
        "job": job,
        "train": train,
        "decision": decision,
        "kind": job.cluster.device.kind,
        "world": world,
        "nodes": nodes,
        "per_node": world // nodes,
        "grouped": grouped,
        "needs_mesh": engine.shards_blocks,
        "flat": ENGINE_TRAITS[decision.engine.name].flat,
        "init": plan.model.init,
        "initializes": initializes,
        "hugging_face": job.model.hf is not None,
        "architecture": model_class,
        "model_args": job.model.args or None,
        "accumulates": decision.accumulation > 1 or pipelined,
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
        "plan_constants": plan_constants(plan, needs_blocks, checkpoints_some),
        "predicted_step_s": float(f"{plan.prediction.step_time_s:.4g}"),
        "predicted_peak_bytes": plan.prediction.memory.peak_allocated_bytes,
        "slurm_name": re.sub(r"[^A-Za-z0-9_.-]+", "-", plan.model.name)[:64] or "train",
        "headline": headline(plan),
        "launch_lines": launch_lines(plan, nodes, grouped),
        "plan_lines": plan_lines(plan),
        "closing_lines": closing_lines(plan, plan.model.local_sources),
        **parallel,
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
