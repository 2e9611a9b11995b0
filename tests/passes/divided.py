"""Models in parts, for tests: styles written by hand, and what the passes measure of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from shardwright.passes.divided_run import Divided, LocalRun, measure_divided, runs_locally
from shardwright.passes.imports import user_code
from shardwright.passes.pipeline import PASSES, Work
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ComputeDtypeName, ModuleStyle, TensorParallelism

Table = Mapping[str, Sequence[Mapping[str, Any]]]
"""Patterns of paths, each with the arguments of the styles of such modules."""


class Parts:
    """The work of the passes on a job, up to what parameters do, and its parts."""

    def __init__(
        self,
        job: JobSpec,
        folder: Path,
        table: Table | None,
        *,
        dtype: ComputeDtypeName = "bf16",
        sequence: bool = False,
    ) -> None:
        """Without a table, the styles are those that the passes find."""
        self.folder, self.sequence = folder, sequence
        last = "_find_parallelism" if table is None else "_find_roles"
        with user_code(folder) as code:
            work = Work(job=job, code=code, dtypes=(dtype,))
            for apply in PASSES[: [each.__name__ for each in PASSES].index(last) + 1]:
                work = apply(work)
        self.work = work
        if table is None:
            self.styles, self.sequence = work.tensor_parallelism.styles, work.tensor_parallelism.sequence
            return
        self.styles = tuple(
            ModuleStyle(path=path, **style)
            for path, _ in work.built.module.named_modules()
            for pattern, styles in table.items()
            if fnmatchcase(path, pattern) and path.count(".") == pattern.count(".")
            for style in styles
        )

    def measured(self, *degrees: int) -> Divided:
        """The units, measured for these degrees."""
        parallelism = TensorParallelism(degrees=degrees, styles=self.styles, sequence=self.sequence)
        work = self.work
        with user_code(self.folder):
            return measure_divided(work.tracer, work.blocks, work.draw, work.units, work.parameters, parallelism)

    def tried(self, degree: int) -> LocalRun:
        """A trial run."""
        work = self.work
        with user_code(self.folder):
            return runs_locally(
                work.tracer, work.blocks, work.draw, work.parameters, self.styles, degree, sequence=self.sequence
            )


def with_sequence(table: Table, norms: Sequence[str]) -> Table:
    """The table where the sequence is divided, too, between the norms of blocks and what enters after them."""
    inside = {
        path: [
            {**style, "sequence_dim": 1} if ".*." in path and style["style"] in ("region", "row") else style
            for style in styles
        ]
        for path, styles in table.items()
    }
    return {**inside, **{norm: [{"style": "shared"}] for norm in norms}}


COLUMN, ROW, REGION = {"style": "column"}, {"style": "row"}, {"style": "region"}
LLAMA: Table = {
    "model.embed_tokens": [{"style": "vocabulary"}],
    "lm_head": [{**COLUMN, "enters": True}],
    "model.layers.*.self_attn": [REGION],
    "model.layers.*.self_attn.[qkv]_proj": [COLUMN],
    "model.layers.*.self_attn.o_proj": [ROW],
    "model.layers.*.mlp": [REGION],
    "model.layers.*.mlp.[gu]*_proj": [COLUMN],
    "model.layers.*.mlp.down_proj": [ROW],
}
LLAMA_NORMS = ("model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm")
