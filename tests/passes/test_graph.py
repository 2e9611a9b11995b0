"""Where the model could be divided."""

from __future__ import annotations

from pathlib import Path

from passes.jobs import GPT2, LLAMA, make_job
from passes.models import profile_of
from shardwright.passes import profile_model
from shardwright.schemas.profile import Cut

BLOCKS = ["embedding", "blocks.0", "blocks.1", "blocks.2"]
STREAM = 24 * 16 * 4


def test_a_chain_is_cut_at_one_tensor(tmp_path: Path) -> None:
    profile = profile_of(tmp_path)
    assert profile.cuts == tuple(Cut(after=path, tensors=1, bytes=STREAM) for path in BLOCKS)
    assert profile.warnings == ()


def test_masks_and_tables_are_not_carried(tmp_path: Path) -> None:
    for config in (LLAMA, {**GPT2, "n_layer": 5}):
        cuts = profile_model(make_job({"hf": config}), tmp_path, ("bf16",)).cuts
        assert {(cut.tensors, cut.bytes) for cut in cuts} == {(1, 32 * 64 * 4)}
        assert len(cuts) == 1 + (5 if config is not LLAMA else 3)


def test_everything_that_is_used_later_is_alive(tmp_path: Path) -> None:
    source = """
    class Pair(Block):
        def forward(self, x, skip):
            return super().forward(x), skip + x[..., :8]
    class build(Model):
        block = Pair
        def forward(self, tokens):
            x = first = self.embed(tokens)
            skip = x[..., :8] * 2
            for block in self.blocks:
                x, skip = block(x, skip)
            return self.head(x + F.pad(skip, (0, 8)) + first)
    """
    cuts = profile_of(tmp_path, source).cuts
    assert [(cut.tensors, cut.bytes) for cut in cuts] == [(2, STREAM * 3 // 2), *[(3, STREAM * 5 // 2)] * 3]


def test_different_blocks_have_their_own_cuts(tmp_path: Path) -> None:
    source = """
    class Half(Block):
        def __init__(self):
            super().__init__()
            self.smaller = nn.Linear(16, 8)
            self.larger = nn.Linear(8, 16)
        def forward(self, x):
            return self.smaller(super().forward(x if x.shape[-1] == 16 else self.larger(x)))
    class build(Model):
        block = Half
        def __init__(self):
            super().__init__(layers=5)
            self.head = nn.Linear(8, 256)
    """
    profile = profile_of(tmp_path, source)
    assert [cut.bytes for cut in profile.cuts] == [STREAM, *[STREAM // 2] * 5]


def test_what_export_cannot_trace_is_cut_at_module_boundaries(tmp_path: Path) -> None:
    source = """
    class Odd(Block):
        def forward(self, x):
            if torch.compiler.is_exporting():
                raise RuntimeError("not me")
            return super().forward(x)
    class build(Model):
        block = Odd
    """
    profile = profile_of(tmp_path, source)
    assert profile.cuts == tuple(Cut(after=path, tensors=1, bytes=STREAM) for path in BLOCKS)
    (warning,) = profile.warnings
    assert "(user.py:" in warning
    assert "not me" in warning
