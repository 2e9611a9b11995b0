"""The profile as a whole: saved and read, the same everywhere, published numbers, speed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from passes.jobs import GPT2, LLAMA_3_8B, LLAMA_3_70B, USER, make_job
from shardwright.passes import profile_from_json, profile_model, profile_to_json
from shardwright.passes.pipeline import PASSES

GPT2_124M = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
"""https://huggingface.co/openai-community/gpt2/blob/main/config.json: the defaults of its class."""


def test_saved_and_read_again() -> None:
    profile = profile_model(make_job({"factory": "gpt:build"}), USER)
    text = json.dumps(profile_to_json(profile))
    assert profile_from_json(json.loads(text)) == profile
    with pytest.raises((KeyError, TypeError)):
        profile_from_json({"name": "only"})


def test_the_digest_is_the_same_in_every_process() -> None:
    code = (
        "from passes.jobs import USER, make_job\nfrom shardwright.passes import profile_model\n"
        "print(profile_model(make_job({'factory': 'gpt:build'}), USER).digest)"
    )
    path = [str(Path(__file__).parents[1]), *sys.path]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path}\n{code}"],
        env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == profile_model(make_job({"factory": "gpt:build"}), USER).digest


def test_the_digest_tells_models_apart() -> None:
    digests = {
        profile_model(make_job({"factory": "gpt:build", "args": args}), USER, ("fp32",)).digest
        for args in ({}, {"layers": 4}, {"dropout": 0.1}, {"tie": True})
    }
    assert len(digests) == 4


def test_importing_the_passes_does_not_import_torch() -> None:
    code = "import sys, shardwright.passes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_passes_are_named_and_documented_functions() -> None:
    assert len({apply.__name__ for apply in PASSES}) == len(PASSES)


@pytest.mark.parametrize(
    ("config", "length", "parameters"),
    [(GPT2_124M, 1024, 124_439_808), (LLAMA_3_8B, 8192, 8_030_261_248), (LLAMA_3_70B, 8192, 70_553_706_496)],
    ids=["gpt2-124m", "llama-3-8b", "llama-3-70b"],
)
def test_published_models(config: dict[str, Any], length: int, parameters: int, tmp_path: Path) -> None:
    assert profile_model(make_job({"hf": config}, length=length), tmp_path, ("bf16",)).numel == parameters


def test_a_llama_layer_costs_what_it_does_on_paper(tmp_path: Path) -> None:
    """Per token 2 FLOPs a parameter of a matrix and 2 s h of causal attention forward, twice the former and 2.5 times
    the latter backward (Kaplan et al., arXiv 2001.08361, table 1; Dao, arXiv 2307.08691, section 4)."""
    s, h, kv, wide = 8192, 4096, 1024, 14336
    matrices = 2 * h * h + 2 * h * kv + 3 * h * wide
    attention = 2 * s * s * h
    profile = profile_model(make_job({"hf": LLAMA_3_8B}, length=s), tmp_path, ("bf16",))
    embedding, block, head = profile.units
    cost = block.costs["bf16"]
    assert block.count == 32
    assert cost.flops("forward", 1) == 2 * s * matrices + attention
    assert cost.flops("input_gradient", 1) == 2 * s * matrices + attention * 5 // 2
    assert cost.flops("weight_gradient", 1) == 2 * s * matrices
    assert embedding.costs["bf16"].flops("forward", 1) == 0
    assert head.costs["bf16"].flops("forward", 1) == 2 * s * h * 128256
    norm = 4 * h + 4 + 2 * h + 2 * h  # fp32 input, inverse norm, what the weight scales, what the matrices read
    attend = 2 * h + 2 * 2 * kv + 2 * h + 4 * 32  # query, key and value, output, one fp32 a head
    gated = 4 * 2 * wide  # gate, its activation, up, their product
    assert cost.saved["none"].at(1) == s * (2 * norm + attend + gated) + 24  # and the kernel's random state
    assert cost.saved["full"].at(1) == 2 * s * h
    assert profile.attention == {"bf16": "flash"}


@pytest.mark.slow
def test_a_large_model_takes_no_longer_than_a_small_one(tmp_path: Path) -> None:
    def seconds(config: dict[str, Any], length: int) -> float:
        start = time.process_time()
        profile_model(make_job({"hf": config}, length=length), tmp_path, ("bf16",))
        return time.process_time() - start

    seconds(GPT2, 64)  # imports
    assert seconds(LLAMA_3_70B, 8192) < 10 * max(seconds(LLAMA_3_8B, 8192), 0.2)
