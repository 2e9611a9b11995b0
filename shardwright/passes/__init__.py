"""What a model costs: built on the meta device, traced on fake tensors, summed up in a `ModelProfile`.

torch is imported when a profile is made, not with this package.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright.passes.serialise import profile_from_json, profile_to_json
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["model_graph", "profile_from_json", "profile_model", "profile_to_json"]


def profile_model(
    job: JobSpec,
    folder: Path,
    dtypes: Sequence[ComputeDtypeName] = ("fp32", "bf16"),
    *,
    compiled: bool = False,
) -> ModelProfile:
    """Profiles the job's model. `folder` is that of the job file: the user's modules and files are found from there.
    `dtypes` are the compute dtypes to trace. With `compiled` the units also tell their costs under `torch.compile`,
    which takes some seconds more; a block for which they cannot be told is named in `warnings`. Raises InputError if
    the model cannot be found, built or traced, breaks the model contract, or has work that cannot be priced."""
    from shardwright.passes.pipeline import run_passes

    with _no_collection():
        return run_passes(job, folder, dtypes, compiled=compiled)


def model_graph(job: JobSpec, folder: Path) -> nx.DiGraph[str]:
    """The job's model as a graph of operators, parameters and inputs, with one block of each kind; its attributes are
    those of `passes.graph.make_graph`. Raises InputError as `profile_model` does, and whatever `torch.export` raises
    for a model that it cannot trace."""
    with _no_collection():
        from shardwright.passes.pipeline import run_graph

        return run_graph(job, folder)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected: reference cycles in the user's code then keep what they hold in every run alike, and the
    collector does not walk the whole of torch again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
