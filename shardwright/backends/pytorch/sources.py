"""Files that go beside the script: the user's own, the model's configuration, the modules of the runtime."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from shardwright.backends.pytorch.imports import KNOWN
from shardwright.schemas import hugging_face
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.plan import Plan

RUNTIME = "shardwright_runtime"
RESERVED = frozenset({"train", "export", RUNTIME})
"""Modules of an emission that a user's module may not shadow."""


def local_files(plan: Plan, job_folder: Path) -> dict[str, str]:
    """The user's sources, as they are. Raises InputError where one is missing, lies outside or has a reserved name."""
    texts: dict[str, str] = {}
    problems: list[Diagnostic] = []
    for name in plan.model.local_sources:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            problems.append(
                Diagnostic(
                    key="model",
                    message=f"{name} lies outside the job's folder and cannot be brought along",
                    suggestion="move the file beside the job file, or install its package",
                )
            )
        elif path.parts[0].removesuffix(".py") in RESERVED:
            problems.append(
                Diagnostic(
                    key="model",
                    message=f"{name} would take the place of the emitted {path.parts[0]}",
                    suggestion="give your module another name",
                )
            )
        else:
            try:
                texts[name] = (job_folder / name).read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                problems.append(Diagnostic(key="model", message=f"cannot read {name}: {error}"))
    if problems:
        raise InputError(problems)
    return texts


def model_config(hf: str | dict[str, Any], job_folder: Path) -> str:
    """The Hugging Face configuration as JSON. Raises InputError when the file cannot be read."""
    if isinstance(hf, dict):
        return json.dumps(hf, indent=2) + "\n"
    path = job_folder / hf
    try:
        path = path / "config.json" if path.is_dir() else path
        return json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=2) + "\n"
    except (OSError, ValueError) as error:
        raise InputError(Diagnostic(key="model.hf", message=f"cannot read the configuration {hf}: {error}")) from error


def architecture(config: str) -> str | None:
    """The class of transformers that a configuration names, or None. Raises InputError for an impossible name."""
    name = hugging_face.architecture(json.loads(config))
    # Names of classes only: any other might be one that the script itself defines.
    if name is not None and (name in KNOWN or not re.fullmatch(r"x?[A-Z][A-Za-z0-9_]*", name)):
        raise InputError(Diagnostic(key="model.hf", message=f"architectures: {name!r} is not a model of transformers"))
    return name


def runtime_files(modules: Iterable[str]) -> dict[str, str]:
    """The named modules of the runtime and those that they import, under the folder that scripts import them from."""
    package = files("shardwright.backends.pytorch.runtime")
    texts: dict[str, str] = {}
    waiting = {"__init__", *modules}
    while waiting:
        name = waiting.pop()
        text = package.joinpath(f"{name}.py").read_text(encoding="utf-8")
        texts[f"{RUNTIME}/{name}.py"] = text
        imported = {
            node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level
        }
        waiting |= {module for module in imported if module and f"{RUNTIME}/{module}.py" not in texts}
    return texts
