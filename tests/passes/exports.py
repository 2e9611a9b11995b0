"""Exported graphs of small models, and how their parameters are divided."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from passes import tiny
from passes.jobs import GPT2, LLAMA, USER, make_job
from passes.zoo_jobs import MODELS, ZOO, job_of
from shardwright.passes.build import build_model
from shardwright.passes.contract import make_contract
from shardwright.passes.flow import Flow
from shardwright.passes.graph import Exported, divide, export
from shardwright.passes.imports import user_code
from shardwright.passes.tensor_parallel import Division
from shardwright.passes.trace import Tracer
from shardwright.schemas.job import JobSpec

TRANSLATION = {"inputs": {"input_ids": "input_ids", "decoder_input_ids": "targets"}}
PHI3 = {**tiny.SIZES, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
OPT = {**tiny.OPT, "word_embed_proj_dim": 32}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "gpt2": {"hf": GPT2},
    "llama": {"hf": LLAMA},
    "qwen3": {"hf": tiny.QWEN3},
    "t5": {"hf": tiny.T5, **TRANSLATION},
    "opt": {"hf": OPT},
    "bert": {"hf": tiny.BERT},
    "mixtral": {"hf": tiny.MIXTRAL},
    "deepseek-v3": {"hf": tiny.DEEPSEEK_V3},
    "gpt-oss": {"hf": tiny.GPT_OSS},
    "phi3": {"hf": PHI3},
    "bloom": {"hf": tiny.BLOOM},
    "vit": {"hf": tiny.VIT, **tiny.OF_IMAGES},
}


@dataclass(frozen=True)
class Graph:
    """A model's graph, whole or with one block of each kind."""

    job: JobSpec
    flow: Flow
    exported: Exported
    divided: dict[str, Division]


def job(model: str) -> tuple[JobSpec, Path]:
    """The job of a model of `HUGGING_FACE` or of the zoo, and its folder."""
    if model in MODELS:
        return job_of(model), ZOO
    data = {"dataset": "images:samples"} if model == "vit" else None
    return make_job(HUGGING_FACE[model], data=data), USER


@cache
def graph_of(model: str, *, whole: bool = False) -> Graph:
    """Exports a model."""
    spec, folder = job(model)
    with user_code(folder) as code:
        built = build_model(spec.model, code)
        contract = make_contract(spec, built, code)
        tracer = Tracer(built, contract, code, "cuda", spec.model.profile)
        chosen = tracer.choose_blocks()
        flow = tracer.watch_flow(chosen.blocks, chosen.draw)
        like = {path: path for path in flow.like} if whole else flow.like
        with tracer.as_forward_runs(chosen.draw):
            exported = export(built, contract, like)
    return Graph(spec, flow, exported, divide(exported, next_token=spec.model.loss == "next_token"))
