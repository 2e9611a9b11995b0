"""Small models as text, written beside a job by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

from passes.jobs import make_job
from shardwright.passes import profile_model
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.profile import ComputeDtypeName, ModelProfile

HEADER = """
import torch
from torch import nn
import torch.nn.functional as F

class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)
    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))

class Model(nn.Module):
    block = Block
    def __init__(self, vocabulary=256, layers=3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16)
        self.blocks = nn.ModuleList(self.block() for _ in range(layers))
        self.head = nn.Linear(16, vocabulary)
    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

build = Model
"""

NOT_EXPORTED = """
class Odd(Block):
    def forward(self, x):
        if torch.compiler.is_exporting():
            raise RuntimeError("not me")
        return super().forward(x)
class build(Model):
    block = Odd
"""
"""More of it, which `torch.export` refuses."""


def profile_of(
    folder: Path,
    source: str = "",
    *,
    dtypes: Sequence[ComputeDtypeName] = ("fp32",),
    kind: str = "cuda",
    length: int = 24,
    data: dict[str, Any] | None = None,
    **model: Any,
) -> ModelProfile:
    """Profiles `user:build`, the model above with more text after it."""
    (folder / "user.py").write_text(HEADER + dedent(source))
    job = make_job({"factory": "user:build", **model}, kind=kind, length=length, data=data)
    return profile_model(job, folder, dtypes)


def refusal(folder: Path, source: str = "", **job: Any) -> Diagnostic:
    """The one diagnostic with which a model is refused."""
    try:
        profile = profile_of(folder, source, **job)
    except InputError as error:
        (diagnostic,) = error.diagnostics
        return diagnostic
    raise AssertionError(f"not refused: {profile.name}")
