"""Work that can be priced, and work that cannot."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from passes.models import profile_of, refusal
from shardwright.passes.fake import fake_mode
from shardwright.passes.grouped import grouped_flops

MIXING = """
class Mixing(Block):
    def __init__(self):
        super().__init__()
        self.mixer = Mixer()
    def forward(self, x):
        return super().forward(x) + self.mixer(x)
class Mixer(nn.Module):
    weighted = True
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(16, 16))
    def forward(self, x):
        return torch.ops.shardwright_tests.mix(x, self.weight if self.weighted else x.mT @ x)
class build(Model):
    block = Mixing
"""


@torch.library.custom_op("shardwright_tests::mix", mutates_args=())
def mix(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


def _mix_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = ctx.saved_tensors
    return gradient @ weight.mT, (x.mT @ gradient).sum_to_size(weight.shape)


mix.register_fake(lambda x, weight: torch.empty_like(x))
mix.register_autograd(_mix_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

CONVOLUTION = """
class Convolving(Block):
    def __init__(self):
        super().__init__()
        self.along = nn.Conv1d(16, 16, 3, padding=1, groups=2)
    def forward(self, x):
        return x + self.along(x.transpose(1, 2)).transpose(1, 2)
class build(Model):
    block = Convolving
"""


def test_a_fused_operator_of_unknown_work_is_refused_not_miscounted(tmp_path: Path) -> None:
    said = refusal(tmp_path, MIXING)
    assert said.key == "model.factory"
    assert "operator shardwright_tests::mix in module blocks.0.mixer (Mixer, user.py:" in said.message
    line = int(said.message.split("user.py:")[1].split(")")[0])
    assert (tmp_path / "user.py").read_text().splitlines()[line - 1].strip() == "def forward(self, x):"
    assert "model.profile.moves_data: [shardwright_tests::mix]" in said.suggestion
    assert "register_flop_formula" in said.suggestion


def test_unknown_work_outside_the_blocks_is_refused_too(tmp_path: Path) -> None:
    source = (
        MIXING
        + """
    class build(Model):
        def __init__(self):
            super().__init__()
            self.last = Mixer()
        def forward(self, tokens):
            return self.head(self.last(self.embed(tokens)))
    """.replace("\n    ", "\n")
    )
    assert "module last (Mixer" in refusal(tmp_path, source).message


def test_the_job_says_that_an_operator_moves_data(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, MIXING, profile={"moves_data": ["shardwright_tests::mix"]})
    (mixed,) = [o for o in profile.units[1].costs["fp32"].operators if o.name == "shardwright_tests::mix"]
    assert (mixed.flops.at(1), mixed.bytes.at(1)) == (0, 4 * (2 * 24 * 16 + 16 * 16))
    assert profile.warnings == ()


def test_a_registered_formula_counts(tmp_path: Path) -> None:
    name = torch.ops.shardwright_tests.mix
    flop_counter.register_flop_formula(name)(lambda x, weight, out_shape=None: 2 * prod(x) * weight[-1])
    try:
        profile = profile_of(tmp_path, MIXING)
    finally:
        del flop_counter.flop_registry[name]
    (mixed,) = [o for o in profile.units[1].costs["fp32"].operators if o.name == "shardwright_tests::mix"]
    assert (mixed.flops.at(3), mixed.kind) == (2 * 3 * 24 * 16 * 16, "matmul")
    assert "unknown" in refusal(tmp_path, MIXING).message, "a formula that is gone is not remembered"


def test_unknown_work_on_activations_is_a_warning(tmp_path: Path) -> None:
    source = MIXING + "Mixer.weighted = False"
    (warning,) = profile_of(tmp_path, source).warnings
    assert "shardwright_tests::mix" in warning
    assert "module blocks.0.mixer (Mixer, user.py:" in warning
    assert profile_of(tmp_path, source, profile={"moves_data": ["shardwright_tests::mix"]}).warnings == ()


def test_a_name_in_moves_data_that_nothing_needs(tmp_path: Path) -> None:
    source = MIXING + "Mixer.weighted = False"
    warnings = profile_of(tmp_path, source, profile={"moves_data": ["shardwright_tests::mixed"]}).warnings
    assert any("did you mean 'shardwright_tests::mix'?" in warning for warning in warnings)


def test_operators_that_only_move_data_need_no_word(tmp_path: Path) -> None:
    source = """
    class Moving(Block):
        def __init__(self):
            super().__init__()
            self.slope = nn.PReLU(16)
        def forward(self, x):
            x = F.max_pool1d(F.softplus(self.slope(x.mT)), 3, 1, 1).mT
            return super().forward(x.sort(-1).values.scatter_(-1, x.argsort(-1), 0.0).cumsum(1))
    class build(Model):
        block = Moving
    """
    assert profile_of(tmp_path, source).warnings == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("a", "b", "groups"), [((12, 16), (4, 16, 8), 4), ((16, 24), (24, 8), 4), ((4, 16, 8), (8, 24), 4)]
)
def test_grouped_products(a: tuple[int, ...], b: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    """On fake tensors as on real ones; FLOPs are those of a product for each group."""
    ends = torch.arange(1, groups + 1, dtype=torch.int32) * (max(12, 24 * (24 in b or 24 in a)) // groups)
    x, y = torch.ones(a, dtype=dtype), torch.ones(b, dtype=dtype)
    real = F.grouped_mm(x, y, offs=ends)
    with fake_mode() as mode:
        fake = F.grouped_mm(*(mode.from_tensor(tensor) for tensor in (x, y)), offs=mode.from_tensor(ends))
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    with FlopCounterMode(display=False) as counter:
        for group in range(groups):
            rows = slice(int(ends[group - 1]) if group else 0, int(ends[group]))
            left = x[rows] if len(b) == 3 else x[group] if len(a) == 3 else x[:, rows]
            _ = left @ (y[group] if len(b) == 3 else y[:, rows] if len(a) == 3 else y[rows])
    assert grouped_flops(x, y) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [((12, 16), (4, 8, 8), "cannot multiply"), ((12, 15), (4, 15, 8), "16 bytes"), ((2, 4, 16), (2, 16, 8), "ends")],
)
def test_grouped_products_that_the_real_operator_refuses(a: tuple[int, ...], b: tuple[int, ...], words: str) -> None:
    x, y, ends = torch.ones(a), torch.ones(b), torch.arange(1, b[0] + 1, dtype=torch.int32)
    with pytest.raises(RuntimeError):
        F.grouped_mm(x, y, offs=ends)
    with fake_mode() as mode, pytest.raises(RuntimeError, match=words):
        F.grouped_mm(mode.from_tensor(x), mode.from_tensor(y), offs=mode.from_tensor(ends))


def test_unknown_work_on_a_cast_parameter_is_refused_too(tmp_path: Path) -> None:
    source = """
    class Odd(Block):
        def forward(self, x):
            values = torch.linalg.svdvals(torch.cat([self.up.weight.double(), self.up.weight.double()]))
            return x + values.float()
    class build(Model):
        block = Odd
    """
    assert "_linalg_svd" in refusal(tmp_path, source).message


def test_a_matrix_times_a_vector_counts(tmp_path: Path) -> None:
    source = """
    class Gated(Block):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.empty(16))
        def forward(self, x):
            return x * (x @ self.gate).unsqueeze(-1)
    class build(Model):
        block = Gated
    """
    cost = profile_of(tmp_path, source).units[1].costs["fp32"]
    assert cost.flops("forward", 5) == 2 * 5 * 24 * 16


def test_a_fused_convolution_backward_is_split(tmp_path: Path) -> None:
    cost = profile_of(tmp_path, CONVOLUTION).units[1].costs["fp32"]
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv1d(torch.empty(3, 16, 24), torch.empty(16, 8, 3), padding=1, groups=2)
    forward = counter.get_total_flops()
    assert forward == 2 * 3 * 24 * 16 * 8 * 3
    assert [cost.flops(phase, 3) for phase in ("forward", "input_gradient", "weight_gradient")] == [
        forward,
        forward,
        forward,
    ]


def test_work_is_told_by_module_and_phase(tmp_path: Path) -> None:
    cost = profile_of(tmp_path).units[1].costs["fp32"]
    products = {(o.phase, o.module): o.flops.at(1) for o in cost.operators if o.kind == "matmul"}
    one = 2 * 24 * 16 * 32
    phases = ("forward", "input_gradient", "weight_gradient")
    assert products == {(phase, module): one for phase in phases for module in ("up", "down")}
    up = next(o for o in cost.operators if o.kind == "matmul" and o.module == "up" and o.phase == "forward")
    assert up.shapes == ((32,), (24, 16), (16, 32))
    assert up.bytes.at(2) == 4 * (32 + 2 * 24 * 16 + 16 * 32 + 2 * 24 * 32)
    assert (up.name, up.dtype, up.count) == ("addmm", "float32", 1)
    assert [(o.name, o.module) for o in cost.not_recomputed] == [("addmm", "down"), ("add", "")]


def test_embeddings_read_their_rows_only(tmp_path: Path) -> None:
    embedding = profile_of(tmp_path).units[0].costs["fp32"]
    (lookup,) = [operator for operator in embedding.operators if operator.name == "embedding"]
    assert lookup.bytes.at(1) == 2 * 24 * 16 * 4 + 24 * 8
