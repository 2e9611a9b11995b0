"""Models that are divided as their derived tables say compute what the whole ones do, gradients included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from passes.test_parallelism import MODELS, found, job_of
from support.launch import results_of

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
STYLES = {"experts": "TensorExperts"}
WHOLE_SEQUENCES = {"tensor_parallel": {"sequence": False}}


def _run(model: str, processes: int, **strategy: Any) -> dict[str, Any]:
    """One run of `derived_worker`."""
    work = found(*job_of(model, devices=processes, tp=processes, **strategy))
    divided = {
        name: parameter
        for parameter in work.parameters
        if parameter.tensor_parallel in ("column", "row", "vocabulary")
        for name in (parameter.name, *parameter.also)
    }
    table, head = {}, ""
    for style in work.tensor_parallelism.styles:
        own = {name.rpartition(".")[2]: p for name, p in divided.items() if name.rpartition(".")[0] == style.path}
        words = [p.tensor_parallel == "vocabulary" for p in own.values()]
        head = style.path if style.style == "column" and any(words) else head
        units = max((p.tensor_parallel_units for p in own.values()), default=0)
        settings = {
            "enters": style.enters,
            "sequence_dim": style.sequence_dim,
            "attributes": style.attributes,
            "dims": {name: p.tensor_parallel_dim for name, p in own.items()},
            "units": 0 if any(words) else units,
            "parts": {name: p.tensor_parallel_parts for name, p in own.items() if p.tensor_parallel_parts},
        }
        table[style.path] = (STYLES.get(style.style, style.style.capitalize()), settings)
    return {
        "config": MODELS[model]["hf"],
        "decoder": model == "t5",
        "table": table,
        "head": head,
        "sequence": work.tensor_parallelism.sequence,
        "blocks": [block.path for block in work.blocks],
    }


def test_divided_models_compute_what_whole_ones_do(tmp_path: Path) -> None:
    two = [_run(model, 2) for model in ("gpt2", "t5", "opt", "bert", "mixtral", "deepseek-v3")]
    two += [_run("deepseek-v3", 2, **WHOLE_SEQUENCES)]
    four = [_run("qwen3", 4), _run("qwen3", 4, **WHOLE_SEQUENCES)]  # two key-value heads, each in two processes
    launches = results_of([(2, two), (4, four)], tmp_path, "transformers", "derived_worker")
    assert [run["sequence"] for run in (*two, *four)] == [True, False, True, True, True, True, False, True, False]
    for processes in launches:
        for results in processes:
            for result in results:
                assert result["divided"] == pytest.approx(result["whole"], rel=1e-5)
                assert result["gradients"] < 1e-4
