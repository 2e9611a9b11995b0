"""What the passes measure of a model's parts is what real processes keep and tell one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from passes.divided import Parts
from passes.jobs import GPT2, LLAMA, USER, make_job
from passes.tiny import MIXTRAL
from support.launch import results_of

from shardwright.schemas.job import StrategySpec, TensorParallelSpec
from shardwright.schemas.profile import Unit

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WORLD, LENGTH, MICRO_BATCH = 2, 32, 2
CASES: Mapping[str, tuple[dict[str, Any], bool]] = {
    "gpt, tied": ({"factory": "gpt:build", "args": {"tie": True}}, False),
    "llama": ({"hf": LLAMA}, True),
    "gpt2": ({"hf": {**GPT2, "attn_pdrop": 0.0}}, True),
    "gpt2, whole sequences": ({"hf": {**GPT2, "attn_pdrop": 0.0}}, False),
    "mixtral": ({"hf": MIXTRAL}, True),
}
"""Models, and whether the sequence is divided."""


def run_of(name: str, parts: Parts, model: dict[str, Any]) -> dict[str, Any]:
    """What a process of `divided_worker` is told of a case."""
    table: dict[str, tuple[str, dict[str, Any]]] = {}
    for style in parts.styles:
        prefix = f"{style.path}."
        own = {
            path.removeprefix(prefix): parameter
            for parameter in parts.work.parameters
            for path in (parameter.name, *parameter.also)
            if path.rpartition(".")[0] == style.path and parameter.tensor_parallel in ("column", "row", "vocabulary")
        }
        given: dict[str, Any] = {"attributes": style.attributes, "sequence_dim": style.sequence_dim}
        given["enters"] = style.enters
        if own and style.style != "shared":
            given["dims"] = {path: parameter.tensor_parallel_dim for path, parameter in own.items()}
            given["parts"] = {path: parameter.tensor_parallel_parts for path, parameter in own.items()}
            whole = any(parameter.tensor_parallel == "vocabulary" for parameter in own.values())
            given["units"] = 0 if whole else min(parameter.tensor_parallel_units for parameter in own.values())
        table[style.path] = "TensorExperts" if style.style == "experts" else style.style.capitalize(), given
    head = next(style.path for style in parts.styles if style.enters and ".blocks." not in f".{style.path}")
    blocks = [block.path for block in parts.work.blocks] if parts.sequence else []
    sizes = {"length": LENGTH, "micro_batch": MICRO_BATCH}
    return {"name": name, "model": model, "table": table, "head": head, "blocks": blocks, **sizes}


def exchanges(units: tuple[Unit, ...]) -> list[list[Any]]:
    """As the worker counts them."""
    found: Counter[tuple[str, str, int]] = Counter()
    for unit in units:
        for one in unit.divided[WORLD]["fp32"].exchanges:
            found[one.phase, one.kind, one.bytes.at(MICRO_BATCH)] += one.count * unit.count
    return sorted([*key, count] for key, count in found.items())


def test_processes_keep_and_send_what_was_measured(tmp_path: Path) -> None:
    parts = {}
    for name, (model, sequence) in CASES.items():
        job = make_job(model, kind="cpu", length=LENGTH)
        strategy = StrategySpec(tensor_parallel=TensorParallelSpec(sequence=sequence))
        parts[name] = Parts(job.model_copy(update={"strategy": strategy}), USER, None, dtype="fp32")
        assert parts[name].sequence == sequence, name
    runs = [run_of(name, parts[name], model) for name, (model, _) in CASES.items()]
    found = results_of([(WORLD, runs)], tmp_path, "transformers", "divided_worker")[0]
    for name in CASES:
        measured = parts[name].measured(WORLD)
        assert not measured.warnings, name
        saved = sum(unit.count * unit.divided[WORLD]["fp32"].saved["none"].at(MICRO_BATCH) for unit in measured.units)
        told = exchanges(measured.units)
        assert told, name
        for process in found:
            assert process[name]["exchanges"] == told, name
            assert process[name]["saved"] == saved, name
            assert process[name]["loss"] == pytest.approx(found[0][name]["loss"])
