"""Work that can be priced, and work that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from passes.models import profile_of, refusal

RECURRENT = """
class Recurrent(Block):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(16, 16, batch_first=True)
    def forward(self, x):
        return self.inner(x)[0]
class build(Model):
    block = Recurrent
"""
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


@pytest.mark.parametrize("inside", [True, False])
def test_a_fused_recurrent_operator_is_refused_not_miscounted(tmp_path: Path, inside: bool) -> None:
    source = RECURRENT
    if not inside:
        source += """
class build(Model):
    def __init__(self):
        super().__init__()
        self.last = nn.LSTM(16, 16, batch_first=True)
    def forward(self, tokens):
        return self.head(self.last(self.embed(tokens))[0])
"""
    said = refusal(tmp_path, source)
    assert said.key == "model.factory"
    assert ("module blocks.0.inner" if inside else "module last") in said.message
    assert "register_flop_formula" in said.suggestion


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
