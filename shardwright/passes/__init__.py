"""What a model costs: built on the meta device, traced on fake tensors, summed up in a `ModelProfile`.

torch is imported when a profile is made, not with this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardwright.passes.serialise import profile_from_json, profile_to_json
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile

__all__ = ["profile_from_json", "profile_model", "profile_to_json"]


def profile_model(job: JobSpec, folder: Path, dtypes: Sequence[ComputeDtypeName] = ("fp32", "bf16")) -> ModelProfile:
    """Profiles the job's model. `folder` is that of the job file: the user's modules and files are found from there.
    `dtypes` are the compute dtypes to trace. Raises InputError if the model cannot be found, built or traced, breaks
    the model contract, or has work that cannot be priced."""
    from shardwright.passes.pipeline import run_passes

    return run_passes(job, folder, dtypes)
