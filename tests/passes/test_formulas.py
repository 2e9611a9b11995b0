"""FLOPs and saved bytes against formulas and figures that others have published, every difference explained."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from passes.jobs import LLAMA_3_8B, LLAMA_3_70B, make_job
from passes.models import profile_of as profile_of_source
from shardwright.passes import profile_model
from shardwright.planner.keeping import Keeping, keep_nothing, keep_products
from shardwright.schemas.profile import ModelProfile, Operator, UnitCost

LLAMA_3_405B = {
    **LLAMA_3_8B,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
"""https://huggingface.co/meta-llama/Llama-3.1-405B/blob/main/config.json"""
GPT_2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
}
"""https://huggingface.co/openai-community/gpt2/blob/main/config.json"""
PHASES = ("forward", "input_gradient", "weight_gradient")
MIB = 2**20


@cache
def hugging_face(name: str) -> ModelProfile:
    """Two layers of a model, its sequences as long as it takes."""
    configs = {"8B": LLAMA_3_8B, "70B": LLAMA_3_70B, "405B": LLAMA_3_405B, "gpt2": GPT_2}
    layers, length = ("n_layer", 1024) if name == "gpt2" else ("num_hidden_layers", 8192)
    return profile_model(make_job({"hf": {**configs[name], layers: 2}}, length=length), Path(), ("bf16",))


def layer(profile: ModelProfile) -> UnitCost:
    return profile.units[1].costs["bf16"]


def unmasked(cost: UnitCost) -> list[int]:
    """FLOPs by phase with causal attention counted whole, as the published figures have it."""
    return [
        sum(op.flops.at(1) * (2 if op.kind == "attention" else 1) for op in cost.operators if op.phase == phase)
        for phase in PHASES
    ]


def matrices(config: dict[str, Any]) -> int:
    """Elements of the matrices of one Llama layer."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
    return 2 * width * width + 2 * width * narrow + 3 * width * inner


@pytest.mark.parametrize(
    ("name", "config", "published"),
    [
        ("8B", LLAMA_3_8B, (4.67, 6.32, 3.57)),
        ("70B", LLAMA_3_70B, (16.22, 19.52, 14.02)),
        ("405B", LLAMA_3_405B, (56.62, 63.22, 52.23)),
    ],
)
def test_flops_of_a_llama_layer(name: str, config: dict[str, Any], published: tuple[float, ...]) -> None:
    """2 FLOPs a weight and token in each phase (Kaplan et al., arXiv 2001.08361, section 2.1); attention makes two
    products of S x S x h forward and five backward, one of them again (Dao, arXiv 2307.08691, section 3)."""
    cost, tokens, width = layer(hugging_face(name)), 8192, config["hidden_size"]
    weights, products = 2 * matrices(config) * tokens, 2 * tokens**2 * width
    assert unmasked(cost) == [weights + 2 * products, weights + 5 * products, weights]
    causal = [weights + products, weights + 5 * products // 2, weights]
    assert [cost.flops(phase, 1) for phase in PHASES] == causal
    assert [round(flops / 1e12, 2) for flops in unmasked(cost)] == pytest.approx(published, abs=0.011)


def test_flops_of_a_gpt2_layer() -> None:
    """12 h^2 weights a layer: 24 S h^2 forward and as much in either gradient."""
    cost, tokens, width = layer(hugging_face("gpt2")), 1024, 768
    weights, products = 24 * tokens * width**2, 2 * tokens**2 * width
    assert unmasked(cost) == [weights + 2 * products, weights + 5 * products, weights]


@pytest.mark.parametrize("name", ["8B", "70B", "405B"])
def test_flops_of_a_model_by_the_formula_of_palm(name: str) -> None:
    """6 N + 12 L H Q T a token (arXiv 2204.02311, appendix B), but for: the embedding and the norms, which make no
    products; and the scores, which a flash kernel computes a second time."""
    profile, tokens, layers = hugging_face(name), 8192, 2
    width = {"8B": 4096, "70B": 8192, "405B": 16384}[name]
    counted = sum(unit.count * sum(unmasked(unit.costs["bf16"])) for unit in profile.units)
    palm = 6 * profile.numel + 12 * layers * width * tokens
    no_products = 6 * (128256 * width + (2 * layers + 1) * width)
    again = 2 * layers * width * tokens
    assert counted == tokens * (palm - no_products + again)


GPT = """
class Layer(nn.Module):
    def __init__(self, width, heads, drop, fused):
        super().__init__()
        self.heads, self.drop, self.fused = heads, drop, fused
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, query, key, value):
        if self.fused:
            return F.scaled_dot_product_attention(query, key, value, dropout_p=self.drop)
        weights = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1)
        return F.dropout(weights, self.drop) @ value

    def forward(self, x):
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1)]
        x = x + F.dropout(self.out(self.attend(*split).transpose(1, 2).flatten(2)), self.drop)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.drop)

class build(nn.Module):
    def __init__(self, width, heads, layers=2, drop=0.0, fused=False):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Layer(width, heads, drop, fused) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)
    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
"""
"""The layer of Korthikanti et al. (arXiv 2205.05198, figure 2), attention written out unless `fused`."""

sizes = pytest.mark.parametrize(("s", "h", "a"), [(24, 32, 2), (48, 64, 4)])


def gpt(folder: Path, s: int, h: int, a: int, **args: Any) -> ModelProfile:
    return profile_of_source(folder, GPT, dtypes=("bf16",), length=s, args={"width": h, "heads": a, **args})


def statistics(s: int) -> int:
    """Mean and inverse deviation of two layer norms, in 32 bit."""
    return 2 * 2 * 4 * s


@sizes
def test_flops_of_a_recomputed_gpt_by_the_formula_of_megatron(tmp_path: Path, s: int, h: int, a: int) -> None:
    """96 B s l h^2 (1 + s / 6h + V / 16 l h) (arXiv 2104.04473, equation 3), forward run twice."""
    profile, layers, vocabulary = gpt(tmp_path, s, h, a, drop=0.1), 2, 256
    counted = sum(
        unit.count * unit.costs["bf16"].flops(phase, 1) for unit in profile.units for phase in PHASES
    ) + layers * Keeping.of(layer(profile), keep_nothing).flops(1)
    assert counted * 6 == 96 * s * layers * h * (6 * h + s) + 36 * s * h * vocabulary


def test_the_last_product_runs_once_where_nothing_after_it_is_saved(tmp_path: Path) -> None:
    """Without dropout the formula counts the down projection once too often: PyTorch stops before it."""
    s, h, a = 24, 32, 2
    cost = layer(gpt(tmp_path, s, h, a))
    assert Keeping.of(cost, keep_nothing).flops(1) == cost.flops("forward", 1) - 8 * s * h**2


@sizes
def test_saved_bytes_of_a_gpt_layer(tmp_path: Path, s: int, h: int, a: int) -> None:
    """sbh (34 + 5 a s / h) in 16 bit (arXiv 2205.05198, equation 1): 11 sbh + 5 a s^2 b for attention, 19 sbh for the
    rest of the layer, 4 sbh for the norms, which leave out their statistics."""
    saved = layer(gpt(tmp_path, s, h, a, drop=0.1)).saved
    assert saved["none"].at(1) == 34 * s * h + 5 * a * s * s + statistics(s)
    assert saved["full"].at(1) == 2 * s * h


@sizes
def test_saved_bytes_without_dropout(tmp_path: Path, s: int, h: int, a: int) -> None:
    """Two masks of sbh less; of 5 a s^2 b, the mask (1) and the result of dropout (2) less."""
    saved = layer(gpt(tmp_path, s, h, a)).saved
    assert saved["none"].at(1) == 32 * s * h + 2 * a * s * s + statistics(s)


@pytest.mark.parametrize("drop", [0.0, 0.1])
@sizes
def test_saved_bytes_with_flash_attention(tmp_path: Path, s: int, h: int, a: int, drop: float) -> None:
    """No score is kept, but one logarithm of a sum for every query, in 32 bit (Dao et al., arXiv 2205.14135,
    algorithm 1), and the state of the generator."""
    saved = layer(gpt(tmp_path, s, h, a, drop=drop, fused=True)).saved["none"]
    masks = 2 * s * h if drop else 0
    assert saved.slope == 32 * s * h + masks + 4 * a * s + statistics(s)
    assert 0 <= saved.constant <= 64


@sizes
def test_saved_bytes_when_attention_is_recomputed(tmp_path: Path, s: int, h: int, a: int) -> None:
    """Selective recomputation in the paper keeps 34 sbh, all but what grows with s^2, and computes 4 s^2 h b again
    (sections 5 and A). PyTorch keeps whole operators: with the masks of two dropouts their results (4 sbh). And what it
    does not keep runs again, needed or not: the projections too, unless it keeps their results as well (10 sbh)."""
    cost = layer(gpt(tmp_path, s, h, a, drop=0.1))

    def needed(op: Operator) -> bool:
        return op.kept.slope > 0 and all(shape[-2:] != (s, s) for shape in op.shapes)

    paper = 34 * s * h + statistics(s)
    assert Keeping.of(cost, needed).saved.at(1) == paper + 4 * s * h
    keeping = Keeping.of(cost, lambda op: needed(op) or op.name == "addmm")
    assert keeping.saved.at(1) == paper + 14 * s * h
    assert keeping.flops(1) == 4 * s * s * h
    assert cost.saved["selective"].at(1) == 22 * s * h + 2 * a * s * s


def test_saved_bytes_of_a_llama_layer() -> None:
    """8,192 tokens of Llama 3 8B as Hugging Face computes it: 1,569.1 MiB."""
    cost, s, h, narrow, inner, heads = layer(hugging_face("8B")), 8192, 4096, 1024, 14336, 32
    terms = {
        "two norms: their input in 32 bit, before and after the weight in 16 bit": 2 * (4 + 2 + 2) * s * h,
        "two norms: the inverse root of the mean square, in 32 bit": 2 * 4 * s,
        "query, key and value": 2 * s * (h + 2 * narrow),
        "result of attention, which the output projection takes": 2 * s * h,
        "logarithm of the sum of every query, in 32 bit": 4 * heads * s,
        "gate, its activation, up and their product": 4 * 2 * s * inner,
    }
    assert cost.saved["none"].slope == sum(terms.values())
    assert cost.saved["none"].at(1) / MIB == pytest.approx(1569.1, abs=0.05)
    assert cost.saved["full"].at(1) == 2 * s * h
    kept = {
        "input": 2 * s * h,
        "query, key and value": 2 * s * (h + 2 * narrow),
        "attention": 2 * s * h + 4 * heads * s,
        "output": 2 * s * h,
        "gate and up": 2 * 2 * s * inner,
        "down": 2 * s * h,
    }
    assert cost.saved["selective"].slope == sum(kept.values())
    assert {op.kind for op in Keeping.of(cost, keep_products).recomputed} == {"elementwise"}


def test_bytes_of_a_product_in_each_phase() -> None:
    """All three read two matrices and write one, of the same three sizes, in 16 bit."""
    cost, tokens, width, inner = layer(hugging_face("8B")), 8192, 4096, 14336
    products = [op for op in cost.operators if op.module == "mlp.up_proj" and op.kind == "matmul"]
    assert sorted(op.phase for op in products) == sorted(PHASES)
    for op in products:
        assert op.bytes.at(1) == 2 * (tokens * width + width * inner + tokens * inner)
        assert op.flops.at(1) == 2 * tokens * width * inner
        assert sorted(op.shapes) == sorted(
            {
                "forward": [(tokens, width), (width, inner)],
                "input_gradient": [(tokens, inner), (inner, width)],
                "weight_gradient": [(inner, tokens), (tokens, width)],
            }[op.phase]
        )


def test_temporary_bytes_of_a_small_block(tmp_path: Path) -> None:
    """x + down(gelu(up(norm(x)))): forward ends with every result alive. Backward is at its highest when the gradients
    of both sides of gelu stand beside what is saved; the result of gelu itself is gone by then."""
    cost = profile_of_source(tmp_path, length=24).units[1].costs["fp32"]
    narrow, wide, rows = 4 * 24 * 16, 4 * 24 * 32, 4 * 24
    assert cost.forward_peak.at(1) == 3 * narrow + 2 * wide + 2 * rows
    assert cost.saved["none"].at(1) == 2 * narrow + 2 * wide + 2 * rows
    assert cost.backward_peak["none"].at(1) == 2 * wide - wide
