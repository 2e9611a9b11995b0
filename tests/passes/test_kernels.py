"""The kernels taken for a device, and what they keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from passes.models import profile_of
from shardwright.passes.fake import fake_mode
from shardwright.passes.kernels import attention_kernel, kernels_of
from shardwright.schemas.profile import ComputeDtypeName

ATTENDING = """
class Attending(Block):
    heads, keys, size, causal, masked = 2, 2, 8, True, False
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, self.heads * self.size), nn.Linear(16, self.keys * self.size)
        self.out = nn.Linear(self.heads * self.size, 16)
    def forward(self, x):
        q, k = self.q(x).unflatten(-1, (self.heads, -1)), self.k(x).unflatten(-1, (self.keys, -1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool) if self.masked else None
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), attn_mask=mask, is_causal=self.causal,
            enable_gqa=self.heads != self.keys, dropout_p=DROPOUT,
        )
        return super().forward(x) + self.out(y.transpose(1, 2).flatten(2))
class build(Model):
    block = Attending
DROPOUT = 0.0
"""


@pytest.mark.parametrize(
    ("dtype", "change", "kernel"),
    [
        ("bf16", "", "flash"),
        ("fp32", "", "efficient"),
        ("bf16", "Attending.causal, Attending.masked = False, True", "efficient"),
        ("bf16", "Attending.heads = 4", "flash"),
        ("fp32", "Attending.heads = 4", "math"),
        ("bf16", "Attending.size = 7", "flash"),
        ("fp32", "Attending.size = 7", "math"),
        ("bf16", "Attending.size = 264", "efficient"),
        ("bf16", "DROPOUT = 0.1", "flash"),
        ("bf16", "Attending.forward = Block.forward", "none"),
    ],
)
def test_cuda(tmp_path: Path, dtype: ComputeDtypeName, change: str, kernel: str) -> None:
    profile = profile_of(tmp_path, ATTENDING + change, dtypes=(dtype,))
    assert profile.attention == {dtype: kernel}


@pytest.mark.parametrize(("change", "kernel"), [("", "cpu-flash"), ("DROPOUT = 0.1", "math")])
def test_cpu(tmp_path: Path, change: str, kernel: str) -> None:
    assert profile_of(tmp_path, ATTENDING + change, kind="cpu").attention == {"fp32": kernel}


def test_flash_keeps_no_scores(tmp_path: Path) -> None:
    short = profile_of(tmp_path, ATTENDING, dtypes=("bf16",), length=1024)
    long = profile_of(tmp_path, ATTENDING, dtypes=("bf16",), length=2048)
    slopes = [profile.units[1].costs["bf16"].saved["none"].slope for profile in (short, long)]
    assert slopes[1] == 2 * slopes[0]


def test_math_keeps_the_scores(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, ATTENDING + "Attending.heads = 4", length=256)
    assert profile.units[1].costs["fp32"].saved["none"].slope > 4 * 256 * 256 * 4


def test_causal_attention_counts_half(tmp_path: Path) -> None:
    causal = profile_of(tmp_path, ATTENDING)
    whole = profile_of(tmp_path, ATTENDING + "Attending.causal = False")

    def attention(profile: object) -> list[tuple[str, int]]:
        operators = profile.units[1].costs["fp32"].operators  # type: ignore[attr-defined]
        return [(o.phase, o.flops.at(3)) for o in operators if o.kind == "attention"]

    forward = 3 * 2 * (4 * 24 * 24 * 8)
    assert attention(whole) == [("forward", forward), ("input_gradient", forward * 5 // 2)]
    assert attention(causal) == [("forward", forward // 2), ("input_gradient", forward * 5 // 4)]


@pytest.mark.parametrize("unequal", [(1, 0), (0, 1)])
def test_unequal_lengths_are_not_for_flash_if_causal(unequal: tuple[int, int]) -> None:
    with fake_mode():
        q, k = (torch.empty(1, 2, 16 + more, 64, dtype=torch.bfloat16) for more in unequal)
    assert attention_kernel(q, k, k, masked=False, causal=True) == "efficient"
    assert attention_kernel(q, k, k, masked=False, causal=False) == "flash"


def test_fewer_key_heads_need_enable_gqa() -> None:
    with fake_mode():
        q, k = (torch.empty(1, heads, 16, 64, dtype=torch.bfloat16) for heads in (8, 1))
    assert attention_kernel(q, k, k, masked=False, causal=True, grouped=True) == "flash"
    assert attention_kernel(q, k, k, masked=False, causal=True) == "math"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_heads_of_another_size(dtype: torch.dtype) -> None:
    """As multi-head latent attention has them; the output has the size of the values."""
    with fake_mode(), kernels_of("cuda", []) as taken:
        q, v = (torch.empty(1, 4, 32, size, dtype=dtype, requires_grad=True) for size in (192, 128))
        output = torch.nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True)
    assert (taken, output.shape) == ({"efficient"}, (1, 4, 32, 128))


@pytest.mark.parametrize(("length", "row"), [(16, 16), (20, 24)])
@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_kept_of_a_mask(length: int, row: int, batch: int) -> None:
    """An additive mask in the query's dtype, rows of a multiple of 8 elements, for each sequence that the mask has."""
    with fake_mode(), kernels_of("cuda", []):
        q = torch.empty(3, 4, length, 16, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool)
        kept = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).grad_fn._saved_attn_bias
    assert kept.shape == (3, 4, length, length)
    assert (kept.dtype, kept.untyped_storage().nbytes()) == (torch.bfloat16, batch * length * row * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cuda_keeps_of_dropout_and_norms(dtype: torch.dtype) -> None:
    """A mask of one byte; two fp32 numbers a row; one fp32 number a row; and each time the input's kind of output."""
    with fake_mode(), kernels_of("cuda", []):
        x = torch.empty(4, 6, 32, dtype=dtype, requires_grad=True)
        weight = torch.empty(32, dtype=dtype, requires_grad=True)

        def kept(output: torch.Tensor) -> int:
            known = {tensor.untyped_storage()._cdata for tensor in (x, weight)}
            saved: set[torch.Tensor] = set()
            node = output.grad_fn
            for name in dir(node):
                value = getattr(node, name) if name.startswith("_saved") or name == "saved_tensors" else None
                saved |= {t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, torch.Tensor)}
            return sum(t.untyped_storage().nbytes() for t in saved if t.untyped_storage()._cdata not in known)

        assert kept(torch.nn.functional.dropout(x, 0.1)) == x.numel()
        assert kept(torch.nn.functional.layer_norm(x, (32,), weight, weight)) == 24 * 2 * 4
        assert kept(torch.nn.functional.rms_norm(x, (32,), weight)) == 24 * 4
        grown = torch.nn.functional.rms_norm(x, (32,), weight)
        gradients = torch.autograd.grad(grown, [x, weight], torch.empty_like(grown))
        assert [g.shape for g in gradients] == [x.shape, weight.shape]
