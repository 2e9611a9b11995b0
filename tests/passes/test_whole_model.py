"""The sum over the units is the whole model, to the byte and to the FLOP."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from passes.jobs import GPT2, LLAMA, USER, make_job
from passes.models import profile_of as small
from passes.reference import Whole, measure_whole
from shardwright.passes import profile_model
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile, UnitCost

LENGTH = 37  # no dimension of an activation is that of a parameter
BLOCKS = 3
GPT = {"factory": "gpt:build"}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": GPT,
    "gpt-dropout-tied": {**GPT, "args": {"dropout": 0.1, "tie": True}},
    "llama": {"hf": LLAMA},
    "gpt2": {"hf": GPT2},
}
MORE_MODELS = MODELS | {"olmo2": {"hf": {**LLAMA, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}}}
"""OLMo 2 gives its blocks rotary tables in fp32, which each of them casts."""

cases = [
    pytest.mark.parametrize("kind", ["cuda", "cpu"]),
    pytest.mark.parametrize("dtype", ["fp32", "bf16"]),
    pytest.mark.parametrize("model", MODELS),
]


def every_case(test: Any) -> Any:
    for case in cases:
        test = case(test)
    return test


def job_of(model: str, kind: str) -> JobSpec:
    return make_job(MORE_MODELS[model], kind=kind, length=LENGTH)


@cache
def profile_of(model: str, kind: str) -> ModelProfile:
    return profile_model(job_of(model, kind), USER)


@cache
def whole(model: str, kind: str, dtype: str, recomputed: int, micro_batch: int) -> Whole:
    paths = profile_of(model, kind).block_paths
    assert len(paths) == BLOCKS
    return measure_whole(job_of(model, kind), USER, paths, recomputed, dtype, micro_batch)


def costs(model: str, kind: str, dtype: ComputeDtypeName) -> list[tuple[str, UnitCost]]:
    """Every unit in order, repeated as often as it runs."""
    units = profile_of(model, kind).units
    return [(unit.kind, unit.costs[dtype]) for unit in units for _ in range(unit.count)]


@every_case
def test_saved_bytes(model: str, kind: str, dtype: ComputeDtypeName) -> None:
    for recomputed in (0, BLOCKS):
        check_saved_bytes(model, kind, dtype, recomputed, 2)


@pytest.mark.parametrize("model", ["llama", "olmo2"])
def test_saved_bytes_of_a_model_that_is_recomputed_in_part(model: str) -> None:
    for recomputed in range(BLOCKS + 1):
        check_saved_bytes(model, "cuda", "bf16", recomputed, 5)


def check_saved_bytes(model: str, kind: str, dtype: ComputeDtypeName, recomputed: int, micro_batch: int) -> None:
    total = 0
    for position, (_, cost) in enumerate(costs(model, kind, dtype)):
        is_recomputed = 1 <= position <= recomputed
        outside = position in (0, BLOCKS + 1) and recomputed > 0
        total += cost.saved["full" if is_recomputed or outside else "none"].at(micro_batch)
    assert total == whole(model, kind, dtype, recomputed, micro_batch).saved


def test_blocks_that_save_nothing_keep_nothing(tmp_path: Path) -> None:
    source = """
    class Shift(Block):
        def forward(self, x):
            return x + self.norm.bias
    class build(Model):
        block = Shift
    """
    profile = small(tmp_path, source)
    job = make_job({"factory": "user:build"}, length=24)
    for policy, recomputed in (("none", 0), ("full", BLOCKS)):
        total = sum(unit.count * unit.costs["fp32"].saved[policy].at(2) for unit in profile.units)
        assert total == measure_whole(job, tmp_path, profile.block_paths, recomputed, "fp32", 2).saved


@every_case
def test_flops(model: str, kind: str, dtype: ComputeDtypeName) -> None:
    def unmasked(*phases: str) -> int:
        """Causal attention counted whole, as PyTorch's counter does; its math kernel does all of it."""
        return sum(
            operator.flops.at(2) * (2 if operator.kind == "attention" else 1)
            for _, cost in costs(model, kind, dtype)
            for operator in cost.operators
            if operator.phase in phases
        )

    measured = whole(model, kind, dtype, 0, 2)
    assert unmasked("forward") == measured.forward_flops
    assert unmasked("input_gradient", "weight_gradient") == measured.backward_flops
    again = sum(
        operator.flops.at(2) * (2 if operator.kind == "attention" else 1) * sign
        for kind_of_unit, cost in costs(model, kind, dtype)
        for sign, operators in ((1, cost.operators), (-1, cost.not_recomputed))
        for operator in operators
        if kind_of_unit == "block" and operator.phase == "forward"
    )
    assert whole(model, kind, dtype, BLOCKS, 2).backward_flops - measured.backward_flops == again


@every_case
def test_peaks(model: str, kind: str, dtype: ComputeDtypeName) -> None:
    before, entering, forward, backward = 0, 0, 0, {"none": 0, "full": 0}
    kept = {"none": 0, "full": 0}
    for kind_of_unit, cost in costs(model, kind, dtype):
        forward = max(forward, before + entering + cost.forward_peak.at(2))
        before, entering = before + cost.saved["none"].at(2), cost.output.at(2)
        gradient = 0 if kind_of_unit == "head" else entering
        for policy in ("none", "full"):
            kept[policy] += cost.saved[policy].at(2)
            backward[policy] = max(backward[policy], kept[policy] + gradient + cost.backward_peak[policy].at(2))
    assert forward == whole(model, kind, dtype, 0, 2).forward_peak
    assert backward["none"] == whole(model, kind, dtype, 0, 2).backward_peak
    assert backward["full"] == whole(model, kind, dtype, BLOCKS, 2).backward_peak
