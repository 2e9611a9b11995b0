"""What a script says of real weights: where it starts from, and in which form they leave it again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from shardwright.schemas.plan import Plan
from shardwright.schemas.weights import stored_dtype, weights_folder

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def weights_context(plan: Plan, job_folder: Path, out: Path) -> dict[str, Any]:
    """`weights`: the folder that training starts from, as seen from the script; None for random ones."""
    written = weights_folder(plan.job.model, job_folder)
    return {"weights": None if written is None else _from_script(written, job_folder, out)}


def export_context(plan: Plan, config: str | None, job_folder: Path, out: Path) -> dict[str, Any]:
    """What the templates of export.py look up: `export_dtype` and where it comes from, `companions`."""
    model = plan.job.model
    written = weights_folder(model, job_folder)
    beside = written
    if beside is None and isinstance(model.hf, str) and (job_folder / model.hf).is_dir():
        beside = model.hf
    content = {} if config is None else json.loads(config)
    configured = content.get("dtype", content.get("torch_dtype"))
    stored = None if written is None else stored_dtype(job_folder / written)
    dtype, of = "float32", "of floating-point numbers, as they are trained"
    if stored in _DTYPES:
        dtype, of = _DTYPES[stored], "of floating-point numbers, as the initial weights have it"
    elif configured in _DTYPES.values():
        dtype, of = str(configured), "of floating-point numbers, as the configuration has it"
    companions = None if beside is None or config is None else _from_script(beside, job_folder, out)
    return {"export_dtype": dtype, "export_dtype_of": of, "companions": companions}


def _from_script(path: str, job_folder: Path, out: Path) -> str:
    """A path of the job as the script sees it; an absolute one stays."""
    if Path(path).is_absolute():
        return path
    return Path(os.path.relpath(job_folder.resolve() / path, out.resolve())).as_posix()
