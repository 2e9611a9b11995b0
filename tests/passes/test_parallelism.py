"""What is done to every module under tensor parallelism, found in the dataflow: where values enter and leave, which
parameters have parts of gradients, which integers are divided; and what context and expert parallelism need to know."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from passes import exports, tiny
from passes.exports import HUGGING_FACE
from passes.jobs import USER, make_job
from passes.models import HEADER
from shardwright.passes.cache import ProfileCache
from shardwright.passes.imports import user_code
from shardwright.passes.pipeline import PASSES, Work
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ExpertLayer, Parameter

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS: dict[str, dict[str, Any]] = {
    **HUGGING_FACE,
    "qwen3-moe": {"hf": tiny.QWEN3_MOE},
    "opt": {"hf": tiny.OPT},
    "bytes_gpt": {"factory": "bytes_gpt:build"},
}
NEEDED = ("_build", "_check_contract", "_collect_parameters", "_follow_flow", "_find_roles", "_find_parallelism")


def found(job: JobSpec, folder: Path) -> Work:
    """What the passes know of a model before its parts are measured."""
    with user_code(folder) as code:
        work = Work(job=job, code=code, dtypes=("fp32",))
        for apply in PASSES:
            work = apply(work) if apply.__name__ in NEEDED else work
    return work


def job_of(model: str, *, devices: int = 2, length: int = 32, **strategy: Any) -> tuple[JobSpec, Path]:
    """The job of a small model on so many devices of one node."""
    folder = EXAMPLES if model == "bytes_gpt" else USER
    job = exports.job("vit")[0] if model == "vit" else make_job(MODELS[model], length=length)
    return changed(job, devices, **strategy), folder


def changed(job: JobSpec, devices: int = 2, **strategy: Any) -> JobSpec:
    """The job with so many devices, and a strategy."""
    values = job.model_dump(mode="json", exclude_unset=True)
    values["cluster"]["levels"][0]["size"] = devices
    return JobSpec.model_validate({**values, "strategy": strategy})


@cache
def work_of(model: str) -> Work:
    """A small model's, on two devices."""
    return found(*job_of(model))


def of_source(folder: Path, source: str, **strategy: Any) -> Work:
    """The passes' findings on the model of `models.HEADER` with more text after it."""
    (folder / "user.py").write_text(HEADER + dedent(source))
    return found(changed(make_job({"factory": "user:build"}, length=24), **strategy), folder)


def table(work: Work) -> dict[str, str]:
    """The styles, one line for modules of all layers that are alike."""
    lines: dict[str, str] = {}
    for style in work.tensor_parallelism.styles:
        words = [style.style, *(["enters"] if style.enters else []), *style.attributes]
        words += [] if style.sequence_dim is None else [f"@{style.sequence_dim}"]
        path = re.sub(r"\.\d+", ".*", style.path, count=1)
        assert lines.setdefault(path, " ".join(words)) == " ".join(words), style.path
    return lines


def attention(path: str, columns: str, row: str, counts: str = "") -> dict[str, str]:
    """A region of columns and a row, with the sequence divided between regions."""
    name, _, last = path.rpartition(".")
    inside = {f"{path}.{column}": "column" for column in columns.split()}
    return {f"{name}.{last}": f"region {counts} @1".replace("  ", " "), **inside, f"{path}.{row}": "row @1"}


EMBEDDED = {"model.embed_tokens": "vocabulary", "lm_head": "column enters"}
NORMS = {"model.layers.*.input_layernorm": "shared", "model.layers.*.post_attention_layernorm": "shared"}
HEADS = attention("model.layers.*.self_attn", "q_proj k_proj v_proj", "o_proj")
GATED = attention("model.layers.*.mlp", "gate_proj up_proj", "down_proj")
NORMED_HEADS = {"model.layers.*.self_attn.q_norm": "shared", "model.layers.*.self_attn.k_norm": "shared"}
EXPERTS = {"model.layers.*.mlp.experts": "experts @0", "model.layers.*.mlp.gate": "shared"}
TABLES = {
    "llama": {**EMBEDDED, **NORMS, **HEADS, **GATED},
    "qwen3": {**EMBEDDED, **NORMS, **HEADS, **GATED, **NORMED_HEADS},
    "mixtral": {**EMBEDDED, **NORMS, **HEADS, **EXPERTS},
    "qwen3-moe": {**EMBEDDED, **NORMS, **HEADS, **EXPERTS, **NORMED_HEADS},
    "deepseek-v3": {
        **EMBEDDED,
        **NORMS,
        **EXPERTS,
        **attention("model.layers.*.self_attn", "q_b_proj kv_b_proj", "o_proj"),
        **{
            f"model.layers.*.self_attn.{latent}": "shared"
            for latent in ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")
        },
        **GATED,
        **attention("model.layers.*.mlp.shared_experts", "gate_proj up_proj", "down_proj"),
    },
    "gpt2": {
        "transformer.wte": "vocabulary",
        "lm_head": "column enters",
        "transformer.h.*.ln_1": "shared",
        "transformer.h.*.attn": "region split_size @1",
        "transformer.h.*.attn.c_attn": "column nf",
        "transformer.h.*.attn.c_proj": "row @1",
        "transformer.h.*.ln_2": "shared",
        "transformer.h.*.mlp": "region @1",
        "transformer.h.*.mlp.c_fc": "column nf",
        "transformer.h.*.mlp.c_proj": "row @1",
    },
    "opt": {
        "model.decoder.embed_tokens": "vocabulary",
        "lm_head": "column enters",
        **attention("model.decoder.layers.*.self_attn", "q_proj k_proj v_proj", "out_proj", "num_heads"),
        "model.decoder.layers.*.fc1": "column enters @0",
        "model.decoder.layers.*.fc2": "row @0",
        "model.decoder.layers.*.self_attn_layer_norm": "shared",
        "model.decoder.layers.*.final_layer_norm": "shared",
    },
    "bert": {
        "bert.embeddings.word_embeddings": "vocabulary",
        "cls.predictions.decoder": "column enters",
        "bert.encoder.layer.*.attention.self": "region @1",
        "bert.encoder.layer.*.attention.self.query": "column",
        "bert.encoder.layer.*.attention.self.key": "column",
        "bert.encoder.layer.*.attention.self.value": "column",
        "bert.encoder.layer.*.attention.output.dense": "row @1",
        "bert.encoder.layer.*.attention.output.LayerNorm": "shared",
        "bert.encoder.layer.*.intermediate.dense": "column enters @1",
        "bert.encoder.layer.*.output.dense": "row @1",
        "bert.encoder.layer.*.output.LayerNorm": "shared",
    },
    "bytes_gpt": {
        "embed": "vocabulary",
        "head": "column enters",
        "blocks.*.norm1": "shared",
        **attention("blocks.*.attention", "qkv", "out", "heads"),
        "blocks.*.norm2": "shared",
        "blocks.*.mlp": "region @1",
        "blocks.*.mlp.0": "column",
        "blocks.*.mlp.2": "row @1",
    },
}
"""Megatron-LM's: `f` and `g` around attention and MLP (arXiv 1909.08053, figure 3), with sequence parallelism the
all-gather and reduce-scatter in their place (arXiv 2205.05198, figure 5); parameters that every process applies to its
own heads or to its own part of the sequence add up their gradients (`average_gradients_across_tp_domain`,
megatron/core/transformer/transformer_config.py). OPT and BERT add residuals inside of their layers' modules, where the
columns are the entrance."""


@pytest.mark.parametrize("model", [name for name in TABLES if name != "deepseek-v3"])
def test_tables_are_megatrons(model: str) -> None:
    work = work_of(model)
    assert (work.tensor_parallelism.refused, work.tensor_parallelism.sequence_reason) == ("", "")
    assert table(work) == TABLES[model]


def test_layers_of_two_kinds_each_have_their_styles() -> None:
    styles = {style.path: style for style in work_of("deepseek-v3").tensor_parallelism.styles}
    lines = {
        path: f"{s.style}{' enters' * s.enters}{'' if s.sequence_dim is None else f' @{s.sequence_dim}'}"
        for path, s in styles.items()
    }
    for path, line in lines.items():
        pattern = re.sub(r"\.\d+", ".*", path, count=1)
        assert TABLES["deepseek-v3"][pattern] == line, path
    assert {re.sub(r"\.\d+", ".*", path, count=1) for path in lines} == set(TABLES["deepseek-v3"])
    assert "model.layers.0.mlp" in styles
    assert "model.layers.1.mlp" not in styles


def test_an_encoder_decoder_enters_at_columns_where_a_bias_comes_along() -> None:
    work = work_of("t5")
    styles = {style.path: style for style in work.tensor_parallelism.styles}
    first, second = (styles[f"encoder.block.{at}.layer.0.SelfAttention"] for at in range(2))
    assert (first.style, first.attributes) == ("region", ("n_heads",))
    assert (second.style, second.attributes) == ("shared", ("n_heads",))
    for column in "qkv":
        assert not styles[f"encoder.block.0.layer.0.SelfAttention.{column}"].enters
        assert styles[f"encoder.block.1.layer.0.SelfAttention.{column}"].enters
        assert not styles[f"decoder.block.1.layer.1.EncDecAttention.{column}"].enters
    assert styles["decoder.block.1.layer.1.EncDecAttention"].style == "region"
    for stack in ("encoder", "decoder"):
        assert styles[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"].style == "scatter"
        assert styles[f"{stack}.embed_tokens"].style == "vocabulary"
    assert not work.tensor_parallelism.sequence
    assert "more than one chain" in work.tensor_parallelism.sequence_reason
    assert all(style.sequence_dim is None for style in styles.values())
    assert "more than one chain" in work.context_parallelism.refused


def test_whole_sequences_where_the_job_wants_them() -> None:
    job, folder = job_of("llama", tensor_parallel={"sequence": False})
    parallelism = found(job, folder).tensor_parallelism
    assert not parallelism.sequence
    assert {style.style for style in parallelism.styles} == {"vocabulary", "region", "column", "row"}
    assert all(style.sequence_dim is None for style in parallelism.styles)


def _refused(job: JobSpec, folder: Path) -> Diagnostic:
    with pytest.raises(InputError) as raised:
        found(job, folder)
    (diagnostic,) = raised.value.diagnostics
    return diagnostic


def test_divided_sequences_that_are_impossible_are_told() -> None:
    diagnostic = _refused(*job_of("t5", tensor_parallel={"sequence": True}))
    assert diagnostic.key == "strategy.tensor_parallel.sequence"
    assert "decoder.block and encoder.block" in diagnostic.message
    assert found(*job_of("llama", length=33)).tensor_parallelism.sequence_reason == (
        "sequences of 33 tokens are not divisible by 2"
    )


def test_degrees() -> None:
    assert found(*job_of("llama", devices=8)).tensor_parallelism.degrees == (2, 4, 8)  # key heads on four each
    assert found(*job_of("gpt2", devices=8)).tensor_parallelism.degrees == (2, 4)
    assert found(*job_of("llama", devices=8, tp=[1, 4])).tensor_parallelism.degrees == (4,)
    diagnostic = _refused(*job_of("gpt2", devices=8, tp=8))
    assert (diagnostic.key, diagnostic.suggestion) == ("strategy.tp", "write strategy.tp: 4")
    assert "transformer.h.0.attn.c_attn has 4 heads" in diagnostic.message


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            "phi3",
            r"module model\.layers\.0\.self_attn \(Phi3Attention\) failed",
        ),  # it reads the number of heads from the config
        ("gpt-oss", r"module model\.layers\.0\.mlp\.experts does add on the sums of its rows"),
        ("bloom", r"arange in module transformer has values of its own for each head"),
    ],
)
def test_models_that_cannot_be_divided(model: str, reason: str) -> None:
    parallelism = found(*job_of(model)).tensor_parallelism
    assert re.search(reason, parallelism.refused)
    assert parallelism.degrees == ()
    diagnostic = _refused(*job_of(model, tp=2))
    assert diagnostic.key == "strategy.tp"
    assert re.search(reason, diagnostic.message)


def test_bare_functional_calls_are_refused(tmp_path: Path) -> None:
    source = """
    class Bare(Block):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(32, 16))
        def forward(self, x):
            return x + self.down(F.gelu(F.linear(self.norm(x), self.w)))
    class build(Model):
        block = Bare
    """
    reason = of_source(tmp_path, source).tensor_parallelism.refused
    assert reason.startswith("module blocks.0 calls an operator on blocks.0.w itself")


def test_a_gradient_that_would_be_a_part_is_refused(tmp_path: Path) -> None:
    source = """
    class Scaled(Block):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(16, 1)
        def forward(self, x):
            y = self.norm(x)
            return x + self.down(F.gelu(self.up(y)) * self.gate(y)) + y
    class build(Model):
        block = Scaled
    """
    reason = of_source(tmp_path, source).tensor_parallelism.refused
    assert reason.startswith("in module blocks.0 mul takes a result of linear beside what is divided")


ODD = """
class Odd(Block):
    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).cummax(-1).values)
class build(Model):
    block = Odd
"""


def test_unknown_operators_are_refused_unless_the_job_gives_roles(tmp_path: Path) -> None:
    reason = of_source(tmp_path, ODD).tensor_parallelism.refused
    assert reason.startswith("how to divide module blocks.0.up is unknown, because of aten.cummax in module blocks.0")
    assert reason.endswith("strategy.tensor_parallel.overrides can say what it is")
    roles = {"blocks.*.up": "column", "blocks.*.down": "row", "head": "replicated"}
    work = of_source(tmp_path, ODD, tensor_parallel={"overrides": roles})
    assert work.tensor_parallelism.refused == ""
    assert table(work)["blocks.*.up"] == "column enters @1"
    assert table(work)["blocks.*.down"] == "row @1"
    assert "head" not in table(work)
    parameters: dict[str, Parameter] = {parameter.name: parameter for parameter in work.parameters}
    up, bias, down = (parameters[f"blocks.1.{name}"] for name in ("up.weight", "up.bias", "down.weight"))
    assert [each.local_shape(2) for each in (up, bias, down)] == [(16, 16), (16,), (16, 16)]
    assert parameters["head.weight"].tensor_parallel == "replicated"


def test_modules_left_whole_by_the_job() -> None:
    job, folder = job_of("llama", tensor_parallel={"overrides": {"*.mlp.*_proj": "replicated"}})
    lines = table(found(job, folder))
    assert lines["model.layers.*.self_attn"] == "region @1"
    assert lines["model.layers.*.mlp.up_proj"] == "shared"  # sees its part of the sequence
    assert "model.layers.*.mlp" not in lines


def test_positions_that_mix_outside_attention(tmp_path: Path) -> None:
    source = """
    class Mixer(Block):
        def forward(self, x):
            y = x.cumsum(1)
            return y + self.down(F.gelu(self.up(self.norm(y))))
    class build(Model):
        block = Mixer
    """
    work = of_source(tmp_path, source)
    assert work.tensor_parallelism.sequence_reason == "aten.cumsum in module blocks.0 may mix positions"
    assert work.tensor_parallelism.refused == ""
    assert work.context_parallelism.refused.startswith("the model calls no fused attention")


def test_context_parallelism() -> None:
    llama = work_of("llama").context_parallelism
    assert (llama.refused, llama.head, llama.causal, llama.heads, llama.kv_heads) == ("", "", True, 8, 2)
    assert work_of("bytes_gpt").context_parallelism.refused == ""
    assert "drops out 0.1" in work_of("gpt2").context_parallelism.refused
    assert "loss is model" in work_of("vit").context_parallelism.refused


def test_logits_of_a_part_where_the_model_states_how_many_positions_there_are() -> None:
    """GPT-2 views the last hidden states in the shape of the token ids: they must be whole until the head."""
    config = MODELS["gpt2"]["hf"] | {"attn_pdrop": 0.0}
    context = found(changed(make_job({"hf": config}, length=32)), USER).context_parallelism
    assert (context.refused, context.head) == ("", "lm_head")


def test_a_mask_is_no_context_parallelism(tmp_path: Path) -> None:
    source = """
    class Masked(Block):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            near = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(-4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
            return super().forward(x + self.out(y.transpose(1, 2).flatten(2)))
    class build(Model):
        block = Masked
    """
    assert of_source(tmp_path, source).context_parallelism.refused.startswith("its attention has a mask")


def test_expert_layers() -> None:
    work = work_of("deepseek-v3")
    assert work.expert_layers == tuple(
        ExpertLayer(
            path=f"model.layers.{at}.mlp.experts", experts=8, chosen=2, features=64, attributes=("num_experts",)
        )
        for at in (1, 2)
    )
    counted = {parameter.name: parameter.experts for parameter in work.parameters if parameter.experts}
    assert counted == {
        f"model.layers.{at}.mlp.experts.{name}": 8 for at in (1, 2) for name in ("gate_up_proj", "down_proj")
    }
    assert work_of("llama").expert_layers == ()


def test_kept_profiles_are_told_apart(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    jobs = [
        job_of("llama", **settings)[0]
        for settings in ({}, {"devices": 4}, {"tp": 2}, {"tensor_parallel": {"sequence": False}})
    ]
    assert len({cache._path(job, tmp_path, ("fp32",), False) for job in jobs}) == len(jobs)
