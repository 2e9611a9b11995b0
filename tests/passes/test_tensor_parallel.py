"""How tensor parallelism would divide parameters: Megatron-LM's plan, found in the dataflow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from passes.exports import HUGGING_FACE, graph_of
from passes.jobs import LLAMA, make_job
from passes.models import NOT_EXPORTED, profile_of
from passes.processes import Processes
from shardwright.passes import profile_model
from shardwright.passes.tensor_parallel import Division

WHOLE = Division("replicated")
VOCABULARY = Division("vocabulary", 0, 320)


def column(units: int, dim: int = 0, parts: tuple[int, ...] = ()) -> Division:
    return Division("column", dim, units, parts)


def row(units: int, dim: int = 1) -> Division:
    return Division("row", dim, units)


GATED = {"*.gate_proj.weight": column(160), "*.up_proj.weight": column(160), "*.down_proj.weight": row(160)}
HEADS_8_2 = {
    "*.self_attn.q_proj.weight": column(8),
    "*.self_attn.k_proj.weight": column(2),
    "*.self_attn.v_proj.weight": column(2),
    "*.self_attn.o_proj.weight": row(8),
}
LLAMA_LIKE = {
    "model.embed_tokens.weight": VOCABULARY,
    "lm_head.weight": VOCABULARY,
    **HEADS_8_2,
    "*norm.weight": WHOLE,
}
MEGATRON: dict[str, dict[str, Division]] = {
    "gpt2": {
        "transformer.wte.weight": VOCABULARY,
        "transformer.wpe.weight": WHOLE,
        "*.c_attn.weight": column(4, 1, (64, 64, 64)),
        "*.c_attn.bias": column(4, 0, (64, 64, 64)),
        "*.attn.c_proj.weight": row(4, 0),
        "*.c_fc.weight": column(256, 1),
        "*.c_fc.bias": column(256),
        "*.mlp.c_proj.weight": row(256, 0),
        "*.c_proj.bias": WHOLE,
        "*.ln_*": WHOLE,
    },
    "llama": {**LLAMA_LIKE, **GATED},
    "qwen3": {**LLAMA_LIKE, **GATED},
    "mixtral": {
        **LLAMA_LIKE,
        "*.mlp.gate.weight": WHOLE,
        "*.experts.gate_up_proj": column(160, 1, (160, 160)),
        "*.experts.down_proj": row(160, 2),
    },
    "t5": {
        "shared.weight": VOCABULARY,
        "*.[qkv].weight": column(4),
        "*.o.weight": row(4),
        "*.wi.weight": column(160),
        "*.wo.weight": row(160),
        "*.relative_attention_bias.weight": WHOLE,
        "*layer_norm.weight": WHOLE,
    },
    "opt": {
        "model.decoder.embed_tokens.weight": VOCABULARY,
        "*.embed_positions.weight": WHOLE,
        "*.project_*.weight": WHOLE,
        "*.[qkv]_proj.*": column(4),
        "*.out_proj.weight": row(4),
        "*.out_proj.bias": WHOLE,
        "*.fc1.*": column(160),
        "*.fc2.weight": row(160),
        "*.fc2.bias": WHOLE,
        "*layer_norm.*": WHOLE,
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight": VOCABULARY,
        "bert.embeddings.position_embeddings.weight": WHOLE,
        "bert.embeddings.token_type_embeddings.weight": WHOLE,
        "*.query.*": column(8),
        "*.key.*": column(8),
        "*.value.*": column(8),
        "*.attention.output.dense.weight": row(8),
        "*.intermediate.dense.*": column(160),
        "*.layer.[0-9].output.dense.weight": row(160),
        "*.output.dense.bias": WHOLE,
        "*LayerNorm.*": WHOLE,
        "cls.predictions.transform.dense.*": WHOLE,
        "cls.predictions.bias": VOCABULARY,
    },
    "vit": {
        "*.embeddings.*": WHOLE,
        "*.q_proj.*": column(8),
        "*.k_proj.*": column(8),
        "*.v_proj.*": column(8),
        "*.o_proj.weight": row(8),
        "*.o_proj.bias": WHOLE,
        "*.fc1.*": column(160),
        "*.fc2.weight": row(160),
        "*.fc2.bias": WHOLE,
        "*layernorm*": WHOLE,
        "classifier.*": WHOLE,
    },
}
"""Megatron-LM's plan: ColumnParallelLinear for query, key, value and the first matrix of an MLP, RowParallelLinear for
the projection after attention and the second matrix, VocabParallelEmbedding and the same for the output layer; whole
are biases of rows, norms, positions, token types, the router, the transformation of BERT's head, and all of ViT outside
its layers (megatron/core/models/{gpt,T5,bert,vision}, transformer/{attention,mlp}.py, tensor_parallel/layers.py)."""


@pytest.mark.parametrize("model", MEGATRON)
def test_plans_are_megatrons(model: str) -> None:
    plan = MEGATRON[model]
    met = set()
    for name, division in graph_of(model).divided.items():
        (pattern,) = [pattern for pattern in plan if fnmatchcase(name, pattern)] or [""]
        assert division == plan.get(pattern), name
        met.add(pattern)
    assert met == set(plan)


LATENT = {
    "*.q_a_proj.weight": WHOLE,
    "*.kv_a_proj_with_mqa.weight": WHOLE,
    "*.q_b_proj.weight": column(8),
    "*.kv_b_proj.weight": column(8),
    "*.o_proj.weight": row(8),
    "*.experts.gate_up_proj": column(32, 1, (32, 32)),
    "*.experts.down_proj": row(32, 2),
    "*.shared_experts.up_proj.weight": column(32),
    "*.shared_experts.down_proj.weight": row(32),
}
BEYOND: dict[str, dict[str, Division]] = {
    "deepseek-v3": LATENT,
    "phi3": {
        "*.qkv_proj.weight": column(2, 0, (64, 16, 16)),
        "*.gate_up_proj.weight": column(160, 0, (160, 160)),
        "*.down_proj.weight": row(160),
    },
    "bloom": {"*.query_key_value.*": column(4), "*.self_attention.dense.weight": row(4)},
    "gpt-oss": {
        "*.sinks": column(8),
        "*.k_proj.bias": column(2),
        "*.gate_up_proj": column(160, 2),
        "*.gate_up_proj_bias": column(160, 1),
        "*.experts.down_proj": row(160, 1),
        "*.down_proj_bias": WHOLE,
    },
    "transformer": {
        "*.multihead_attn.in_proj_*": column(4, 0, (32, 32, 32)),
        "*.multihead_attn.out_proj.weight": row(4),
    },
    "resnet": {"*": WHOLE},
}


@pytest.mark.parametrize("model", BEYOND)
def test_fused_latent_and_expert_matrices(model: str) -> None:
    divided = graph_of(model).divided
    for pattern, division in BEYOND[model].items():
        found = {name: each for name, each in divided.items() if fnmatchcase(name, pattern)}
        assert found == dict.fromkeys(found, division)
        assert found, pattern


def _weights(model: str) -> dict[str, torch.Tensor]:
    """Random weights and buffers for a graph."""
    exported, generator = graph_of(model).exported, torch.Generator().manual_seed(0)
    shapes = {name: node.meta["val"].shape for node, name in exported.parameters.items()}
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    signature = exported.program.graph_signature.inputs_to_buffers
    for node in exported.program.graph.find_nodes(op="placeholder"):
        if node.name in signature:
            value = node.meta["val"]
            ids = torch.arange(value.numel()).view(value.shape) * ("token_type" not in node.name)
            weights[signature[node.name]] = ids if not value.is_floating_point() else 1 / (1 + ids)
    return weights


def _run(model: str, divided: Mapping[str, Division], size: int) -> tuple[torch.Tensor, int]:
    """The logits that so many processes compute, and how many sums they took."""
    graph = graph_of(model)
    tokens = [torch.arange(32)[None] * 7 % 320, torch.arange(32)[None] * 5 % 320]
    processes = Processes(graph.exported, divided, size)
    with torch.no_grad():
        results = processes.run(_weights(model), tokens)
    shape = graph.exported.program.graph.find_nodes(op="output")[0].args[0][0].meta["val"].shape
    return results[0] if results[0].shape == shape else torch.cat(results, -1), processes.sums


@pytest.mark.parametrize("model", [name for name in HUGGING_FACE if name not in ("vit", "bloom")])
def test_two_processes_compute_what_one_does(model: str) -> None:
    divided = graph_of(model).divided
    one, _ = _run(model, dict.fromkeys(divided, WHOLE), 1)
    two, sums = _run(model, divided, 2)
    assert sums == 1 + sum(division.role == "row" for division in divided.values()) + (model == "t5")
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("transformer.h.0.attn.c_attn.weight", column(192, 1)),
        ("transformer.h.0.mlp.c_fc.bias", column(128, 0, (128, 128))),
    ],
)
def test_a_wrong_plan_computes_something_else(name: str, wrong: Division) -> None:
    divided = graph_of("gpt2").divided
    one, _ = _run("gpt2", dict.fromkeys(divided, WHOLE), 1)
    two, _ = _run("gpt2", {**divided, name: wrong}, 2)
    assert not torch.allclose(two, one, rtol=1e-2, atol=1e-2 * float(one.abs().max()))


def test_the_profile_tells_every_parameter(tmp_path: Path) -> None:
    profile = profile_model(make_job({"hf": {**LLAMA, "torch_dtype": "bfloat16"}}), tmp_path, ("fp32",))
    by_name = {parameter.name: parameter for parameter in profile.parameters}
    plan = MEGATRON["llama"]
    for name, parameter in by_name.items():
        (division,) = [each for pattern, each in plan.items() if fnmatchcase(name, pattern)]
        found = Division(
            parameter.tensor_parallel,
            parameter.tensor_parallel_dim,
            parameter.tensor_parallel_units,
            parameter.tensor_parallel_parts,
            parameter.tensor_parallel_reason,
        )
        assert found == division, name
    assert by_name["model.embed_tokens.weight"].role == "embedding"
    assert by_name["model.layers.2.mlp.up_proj.weight"].role == "matrix"
    assert by_name["model.layers.2.input_layernorm.weight"].role == "vector"


def _of(folder: Path, source: str) -> dict[str, tuple[str, int, str]]:
    profile = profile_of(folder, source)
    return {
        parameter.name: (parameter.tensor_parallel, parameter.tensor_parallel_units, parameter.tensor_parallel_reason)
        for parameter in profile.parameters
    }


def test_operators_without_a_rule_leave_matrices_unknown(tmp_path: Path) -> None:
    source = """
    class Odd(Block):
        def forward(self, x):
            return x + self.down(self.up(self.norm(x)).cummax(-1).values)
    class build(Model):
        block = Odd
    """
    found = _of(tmp_path, source)
    assert found["blocks.2.up.weight"] == ("unknown", 0, "aten.cummax in module blocks.0")
    assert found["blocks.0.down.weight"][0] == "unknown"
    assert found["blocks.0.norm.weight"][0] == "replicated"
    assert found["embed.weight"][0] == "vocabulary"


def test_a_normalised_hidden_layer_is_not_divided(tmp_path: Path) -> None:
    source = """
    class Normed(Block):
        def forward(self, x):
            return x + self.down(F.layer_norm(self.up(self.norm(x)), (32,)))
    class build(Model):
        block = Normed
    """
    assert {found[0] for name, found in _of(tmp_path, source).items() if "blocks" in name} == {"replicated"}


def test_columns_and_rows_alternate_in_a_chain(tmp_path: Path) -> None:
    source = """
    class Chain(Block):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(n, m) for n, m in ((16, 40), (40, 48), (48, 56), (56, 16))))
        def forward(self, x):
            y = self.norm(x)
            for layer in self.layers:
                y = F.relu(layer(y))
            return super().forward(x) + y
    class build(Model):
        block = Chain
    """
    found = _of(tmp_path, source)
    roles = [found[f"blocks.1.layers.{at}.{kind}"][:2] for at in range(4) for kind in ("weight", "bias")]
    whole = ("replicated", 0)
    assert roles == [
        *[("column", 40), ("column", 40), ("row", 40), whole],
        *[("column", 56), ("column", 56), ("row", 56), whole],
    ]


def test_entries_that_meet_are_not_divided(tmp_path: Path) -> None:
    source = """
    class Outer(Block):
        def forward(self, x):
            y = self.up(self.norm(x))
            return x + self.down((y[..., :, None] * y[..., None, :]).tanh().mean(-1))
    class build(Model):
        block = Outer
    """
    assert _of(tmp_path, source)["blocks.0.up.weight"][0] == "replicated"


def test_fused_projections_are_cut_in_parts(tmp_path: Path) -> None:
    source = """
    class Fused(Block):
        def __init__(self):
            super().__init__()
            self.fused = nn.Linear(16, 48 + 64)
            self.out = nn.Linear(16 + 32, 16)
        def forward(self, x):
            qkv, gate, up = self.fused(self.norm(x)).split([48, 32, 32], dim=-1)
            q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in qkv.chunk(3, -1))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            return super().forward(x) + self.out(torch.cat([mixed, F.silu(gate) * up], -1))
    class build(Model):
        block = Fused
    """
    profile = profile_of(tmp_path, source)
    by_name = {parameter.name: parameter for parameter in profile.parameters}
    fused, out = by_name["blocks.1.fused.weight"], by_name["blocks.1.out.weight"]
    assert (fused.tensor_parallel, fused.tensor_parallel_units) == ("column", 4)
    assert fused.tensor_parallel_parts == (16, 16, 16, 32, 32)
    assert (out.tensor_parallel, out.tensor_parallel_dim, out.tensor_parallel_parts) == ("row", 1, (16, 32))


def test_without_a_graph_every_matrix_is_unknown(tmp_path: Path) -> None:
    for role, units, reason in _of(tmp_path, NOT_EXPORTED).values():
        assert (role, units) == ("unknown", 0)
        assert re.search(r"user\.py:\d+.*not me", reason)


def test_experts_convolutions_and_what_is_unused_are_told_apart(tmp_path: Path) -> None:
    source = """
    class Kinds(Block):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.zeros(3, 16, 16))
            self.filter = nn.Conv1d(16, 16, 3, padding=1)
            self.scale, self.spare = nn.Parameter(torch.zeros(24, 16)), nn.Parameter(torch.zeros(4, 4))
        def forward(self, x):
            y = torch.bmm(x[:, :3].transpose(0, 1), self.experts).transpose(0, 1).mean(1, keepdim=True)
            return super().forward(x) * self.scale + self.filter(x.mT).mT + y
    class build(Model):
        block = Kinds
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(256, 16))
        def forward(self, tokens):
            x = self.embed(tokens) + self.table[tokens]
            for block in self.blocks:
                x = block(x)
            return self.head(x)
    """
    roles = {parameter.name: parameter.role for parameter in profile_of(tmp_path, source).parameters}
    assert {name: role for name, role in roles.items() if not name.startswith(("blocks.1", "blocks.2"))} == {
        "table": "embedding",
        "embed.weight": "embedding",
        "blocks.0.experts": "experts",
        "blocks.0.scale": "vector",
        "blocks.0.spare": "unused",
        "blocks.0.norm.weight": "vector",
        "blocks.0.norm.bias": "vector",
        "blocks.0.up.weight": "matrix",
        "blocks.0.up.bias": "vector",
        "blocks.0.down.weight": "matrix",
        "blocks.0.down.bias": "vector",
        "blocks.0.filter.weight": "convolution",
        "blocks.0.filter.bias": "vector",
        "head.weight": "matrix",
        "head.bias": "vector",
    }
    assert roles["blocks.2.experts"] == "experts"
