"""Architectures of Hugging Face: every one is measured, and its units add up to the whole model."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Hashable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from passes import tiny
from passes.jobs import GPT2, USER, make_job
from passes.reference import measure_whole
from shardwright.passes import profile_model
from shardwright.passes.blocks import find_blocks
from shardwright.passes.build import build_model
from shardwright.passes.imports import user_code
from shardwright.schemas.diagnostics import InputError
from shardwright.schemas.job import JobSpec, ModelSpec
from shardwright.schemas.profile import ModelProfile

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
LENGTH = 64  # longer than the sliding windows
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hf": tiny.LLAMA_31},
    "qwen3": {"hf": tiny.QWEN3},
    "gemma3": {"hf": tiny.GEMMA3},
    "gpt-oss": {"hf": tiny.GPT_OSS},
    "smollm3": {"hf": tiny.SMOLLM3},
    "mixtral": {"hf": tiny.MIXTRAL},
    "deepseek-v3": {"hf": tiny.DEEPSEEK_V3},
    "qwen3-moe": {"hf": tiny.QWEN3_MOE},
    "bert": {"hf": tiny.BERT, **tiny.OWN_LOSS},
    "vit": {"hf": tiny.VIT, **tiny.OF_IMAGES},
    "t5": {"hf": tiny.T5, **tiny.OWN_LOSS},
}
BLOCKS = {"gemma3": "AAAAAB", "gpt-oss": "ABAB", "smollm3": "AAABA", "deepseek-v3": "ABB", "t5": "ABBCD"}
"""Which blocks are alike, where not all of them are."""
CAUSAL = {"deepseek-v3": "efficient", "bert": "none", "vit": "none", "t5": "none"}
"""Which attention kernel is called with `is_causal`; `flash` of the others."""


def job_of(model: str, length: int = LENGTH) -> JobSpec:
    data = {"dataset": "images:samples"} if model == "vit" else None
    return make_job(MODELS[model], length=length, data=data)


@cache
def profile_of(model: str, length: int = LENGTH) -> ModelProfile:
    return profile_model(job_of(model, length), USER, ("bf16",))


@pytest.mark.parametrize("model", ["gemma3", "gpt-oss", "mixtral", "deepseek-v3", "bert", "vit", "t5"])
def test_units_add_up_to_the_whole_model(model: str) -> None:
    profile = profile_of(model)
    blocks = len(profile.block_paths)
    plain = measure_whole(job_of(model), USER, profile.block_paths, 0, "bf16", 2)
    recomputed = measure_whole(job_of(model), USER, profile.block_paths, blocks, "bf16", 2)
    for policy, whole in (("none", plain), ("full", recomputed)):
        assert sum(unit.count * unit.costs["bf16"].saved[policy].at(2) for unit in profile.units) == whole.saved

    def unmasked(*phases: str) -> int:
        """Causal attention counted whole, as PyTorch's counter does."""
        return sum(
            unit.count * operator.flops.at(2) * (2 if CAUSAL.get(model, "flash") in operator.name else 1)
            for unit in profile.units
            for operator in unit.costs["bf16"].operators
            if operator.phase in phases
        )

    assert unmasked("forward") == plain.forward_flops
    assert unmasked("input_gradient", "weight_gradient") == plain.backward_flops


def letters(kinds: Iterable[Hashable]) -> str:
    """A for the first kind, B for the second."""
    seen: dict[Hashable, str] = {}
    return "".join(seen.setdefault(kind, string.ascii_uppercase[len(seen)]) for kind in kinds)


@pytest.mark.parametrize("model", BLOCKS)
def test_blocks_that_differ_are_told_apart(model: str) -> None:
    with user_code(USER) as code:
        module = build_model(job_of(model).model, code).module
    assert letters(block.fingerprint for block in find_blocks(module)) == BLOCKS[model]
    blocks = [unit for unit in profile_of(model).units if unit.kind == "block"]
    same_cost = "AAAA" if model == "gpt-oss" else BLOCKS[model]  # eager attention does the same with any mask
    assert letters(unit.costs["bf16"].operators for unit in blocks for _ in unit.paths) == same_cost


def test_blocks_of_two_kinds_are_told_apart_also_where_they_cost_the_same() -> None:
    blocks = [unit for unit in profile_of("gpt-oss").units if unit.kind == "block"]
    assert letters(unit.fingerprint for unit in blocks for _ in unit.paths) == "ABAB"


@pytest.mark.parametrize(
    ("model", "kind", "kernel"),
    [("mixtral", "cuda", "math"), ("mixtral", "cpu", "cpu-flash"), ("gpt-oss", "cpu", "eager"), ("t5", "cpu", "math")],
)
def test_either_device_in_full_precision(model: str, kind: str, kernel: str) -> None:
    profile = profile_model(make_job(MODELS[model], kind=kind, length=LENGTH), USER, ("fp32",))
    assert profile.attention == {"fp32": kernel}


@pytest.mark.parametrize("model", MODELS)
def test_no_warnings_but_of_attention(model: str) -> None:
    warnings = profile_of(model).warnings
    assert [warning for warning in warnings if "eager attention" not in warning] == []
    assert bool(warnings) == (model == "gpt-oss")


@pytest.mark.parametrize(
    ("config", "attention", "warns"),
    [
        (tiny.OPT, "flash", False),
        (tiny.PHI, "flash", False),
        (tiny.FALCON, "math", False),  # one key head, without enable_gqa
        (tiny.GEMMA2, "eager", True),
        (tiny.BLOOM, "eager", True),
        ({**tiny.LLAMA_31, "attn_implementation": "eager"}, "eager", True),
    ],
)
def test_other_architectures(config: dict[str, Any], attention: str, warns: bool) -> None:
    profile = profile_model(make_job({"hf": config}, length=LENGTH), USER, ("bf16",))
    assert profile.attention == {"bf16": attention}
    assert bool(profile.warnings) == warns
    assert len(profile.block_paths) == config.get("num_hidden_layers", 2)


@pytest.mark.slow
def test_recurrent_models_are_measured_as_written(capfd: pytest.CaptureFixture[str]) -> None:
    profile = profile_model(make_job({"hf": tiny.MAMBA}, length=8), USER, ("bf16",))
    assert profile.attention == {"bf16": "none"}
    assert "kernels of its own" in profile.warnings[0]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("model", "masked"), [("llama", False), ("gemma3", True)])
def test_only_sliding_windows_keep_a_mask(model: str, masked: bool) -> None:
    """Twice the sequence, twice the bytes: no block of Llama keeps anything of sequence length squared; those of Gemma
    with a window keep a mask in the compute dtype, those without do not."""
    short, long = profile_of(model), profile_of(model, 2 * LENGTH)
    grown = []
    for before, after in zip(short.units, long.units, strict=True):
        if before.kind == "block":
            small, large = (unit.costs["bf16"].saved["none"] for unit in (before, after))
            grown += [large.slope - 2 * small.slope] * before.count
    square = 2 * (2 * LENGTH) ** 2 - 2 * 2 * LENGTH**2
    assert grown == ([square] * 5 + [0] if masked else [0] * 3)


def llama(hidden: int, intermediate: int, layers: int, heads: int) -> int:
    """Touvron et al. 2023 (arXiv 2302.13971), section 2.2, with 8 key heads and 128,256 tokens as Llama 3."""
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads * 8)
    return layers * (attention + 3 * hidden * intermediate + 2 * hidden) + 2 * 128256 * hidden + hidden


def mixtral() -> int:
    """Jiang et al. 2024 (arXiv 2401.04088), table 1: eight gated feed-forward networks and a router a layer."""
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    return 32 * (attention + 8 * 3 * 4096 * 14336 + 8 * 4096 + 2 * 4096) + 2 * 32000 * 4096 + 4096


def deepseek_v3() -> int:
    """DeepSeek-AI 2024 (arXiv 2412.19437), sections 2.1 and 4.2, without the biases of the routers and without
    multi-token prediction: queries through 1536 dimensions with a norm, keys and values through 512 with a norm, 64
    dimensions of rotary keys, 128 heads of 128 + 64 and 128."""
    queries = 7168 * 1536 + 1536 + 1536 * 128 * (128 + 64)
    keys_and_values = 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128)
    attention = queries + keys_and_values + 128 * 128 * 7168 + 2 * 7168
    experts = (256 + 1) * 3 * 7168 * 2048 + 256 * 7168
    return 61 * attention + 3 * 3 * 7168 * 18432 + 58 * experts + 2 * 129280 * 7168 + 7168


PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "llama3-8b": llama(4096, 14336, 32, 32),
    "llama3-70b": llama(8192, 28672, 80, 64),
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-405b": llama(16384, 53248, 126, 128),
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma3-1b": 999_885_952,
    "gpt-oss-20b": 20_914_757_184,
    "smollm3-3b": 3_075_098_624,
    "mixtral-8x7b": mixtral(),
    "deepseek-v3": deepseek_v3(),
    "bert-large": 336_226_108 - (1024 * 1024 + 1024) - (2 * 1024 + 2),  # without pooler and next-sentence head
    "vit-base": 86_567_656,
    "t5-base": 222_903_552,
}
"""By file of examples/configs; its README.md names the sources."""


def test_published_figures() -> None:
    assert llama(4096, 14336, 32, 32) == 8_030_261_248
    assert llama(8192, 28672, 80, 64) == 70_553_706_496
    assert llama(16384, 53248, 126, 128) == 405_853_388_800
    assert mixtral() == 46_702_792_704
    assert deepseek_v3() + 58 * 256 == 671_026_419_200


def test_parameters_of_the_configurations() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == PUBLISHED.keys()
    table = (CONFIGS / "README.md").read_text()
    for name, parameters in PUBLISHED.items():
        content = json.loads((CONFIGS / f"{name}.json").read_text())
        inputs = {"input_ids": "input_ids", "labels": "targets"}
        with user_code(USER) as code:
            built = build_model(ModelSpec(hf=content, inputs=inputs), code)
        assert sum(parameter.numel() for parameter in built.module.parameters()) == parameters, name
        assert re.search(rf"`{re.escape(name)}.json` \| \S+ \| {parameters:,} ", table), name


@pytest.mark.parametrize(("model", "words"), [("vit", "pixel_values"), ("t5", "targets as well")])
def test_inputs_that_a_model_needs_are_named(model: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        profile_model(make_job({"hf": MODELS[model]["hf"]}), USER, ("fp32",))
    assert caught.value.diagnostics[0].key == "model.inputs"
    assert "labels: targets" in caught.value.diagnostics[0].suggestion


@pytest.mark.parametrize(("config", "refused"), [(GPT2, True), (tiny.MIXTRAL, True), (tiny.BERT, False)])
def test_only_causal_models_shift_their_labels(config: dict[str, Any], refused: bool) -> None:
    job = make_job({"hf": config, **tiny.OWN_LOSS})
    if not refused:
        assert profile_model(job, USER, ("bf16",)).block_paths
        return
    with pytest.raises(InputError, match="shifted already"):
        profile_model(job, USER, ("bf16",))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"hf": tiny.QWEN3, "inputs": {"input_ids": "input_ids", "position_ids": "input_ids"}}, "packed sequences"),
        ({"hf": {**tiny.QWEN3, "quantization_config": {"quant_method": "fp8"}}}, "trained unquantised"),
        ({"hf": tiny.GEMMA3_WITH_IMAGES}, "on tokens alone"),
    ],
    ids=["packed", "quantised", "images"],
)
def test_what_is_assumed_is_said(model: dict[str, Any], words: str) -> None:
    with user_code(USER) as code:
        (warning,) = build_model(make_job(model).model, code).warnings
    assert words in warning


def test_attention_that_the_configuration_asks_for_is_what_the_script_runs(tmp_path: Path) -> None:
    """The script reads the same file with the same keyword; neither names an attention of its own."""
    from transformers import AutoConfig

    content = {**tiny.LLAMA_31, "attn_implementation": "eager"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(tmp_path / "config.json", use_cache=False)
    with user_code(USER) as code:
        built = build_model(ModelSpec(hf=content), code)
    assert built.attention == config._attn_implementation == "eager"
