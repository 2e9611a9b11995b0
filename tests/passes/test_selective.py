"""What the profile says of checkpointing, under any choice of what is kept, against PyTorch's own checkpointing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from textwrap import dedent
from typing import Any

import pytest

from passes.checkpointed import Measured, Names, measure
from passes.jobs import GPT2, LLAMA, make_job
from passes.models import HEADER
from shardwright.passes import profile_model
from shardwright.planner.keeping import Keeping, can_keep, keep_nothing, keep_products
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import Affine, ComputeDtypeName, ModelProfile, Operator, UnitCost

RESIDUAL = """
class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(16, 24, 3, padding=1), nn.Conv1d(24, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(24)
    def forward(self, x):
        return F.relu(x + self.two(self.inner(x)))
    def inner(self, x):
        return F.relu(self.norm(self.one(x)))
class build(Model):
    block = Residual
    def forward(self, tokens):
        x = self.embed(tokens).transpose(1, 2).contiguous()
        for block in self.blocks:
            x = block(x)
        return self.head(x.transpose(1, 2))
"""
"""A block whose last operator saves its own result."""
IN_PLACE = RESIDUAL.replace("F.relu(self.norm(self.one(x)))", "F.relu_(self.one(x))")
PAIR = """
class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
    def forward(self, x, residual):
        residual = x + residual
        return self.down(torch.sigmoid(self.up(self.norm(residual)))), residual
class build(Model):
    block = Pair
    def forward(self, tokens):
        x, residual = self.embed(tokens), self.embed(tokens + 0)
        for block in self.blocks:
            x, residual = block(x, residual)
        return self.head(x + residual)
"""
"""A block that returns two tensors, one of them the result of a matrix product."""
STASH = """
class Stashing(Block):
    def forward(self, x):
        self.seen = x.detach() + 1
        return super().forward(x + self.seen)
class build(Model):
    block = Stashing
"""
"""A block that holds an activation which nobody saves."""

MODELS: dict[str, dict[str, Any] | str] = {
    "llama": LLAMA,
    "gpt2": {**GPT2, "tie_word_embeddings": False},
    "residual": RESIDUAL,
    "in-place": IN_PLACE,
    "pair": PAIR,
}
MICRO_BATCH = 5
RANDOM_CHOICES = 1
Choice = Callable[[Operator], bool]

every_case = pytest.mark.parametrize(
    ("model", "kind", "dtype"),
    [
        *(
            (model, kind, dtype)
            for model in ("llama", "gpt2")
            for kind in ("cuda", "cpu")
            for dtype in ("fp32", "bf16")
        ),
        ("residual", "cuda", "fp32"),
        ("residual", "cpu", "bf16"),
        ("in-place", "cuda", "fp32"),
        ("pair", "cuda", "fp32"),
        ("pair", "cpu", "bf16"),
    ],
)


@cache
def job_of(model: str, kind: str) -> tuple[JobSpec, Path]:
    source, folder = MODELS.get(model, STASH), Path(mkdtemp())
    if isinstance(source, dict):
        return make_job({"hf": source}, kind=kind, length=37), folder
    (folder / "user.py").write_text(HEADER + dedent(source))
    return make_job({"factory": "user:build"}, kind=kind, length=29), folder


@cache
def profile_of(model: str, kind: str) -> ModelProfile:
    return profile_model(*job_of(model, kind))


def blocks(model: str, kind: str, dtype: ComputeDtypeName) -> list[UnitCost]:
    units = profile_of(model, kind).units
    return [unit.costs[dtype] for unit in units if unit.kind == "block" for _ in unit.paths]


def run(model: str, kind: str, dtype: ComputeDtypeName, keep: Names | None) -> Measured:
    job, folder = job_of(model, kind)
    return measure(job, folder, profile_of(model, kind).block_paths, dtype, MICRO_BATCH, keep)


def names(cost: UnitCost, keep: Choice) -> set[tuple[str, str]]:
    """How the measurement tells operators."""
    return {(op.name, op.module) for op in cost.operators if can_keep(op) and keep(op)}


def choices(cost: UnitCost) -> Iterator[Choice]:
    """Full, selective, and some at random."""
    yield keep_nothing
    yield keep_products
    refused = {(op.name, op.module) for op in cost.operators if op.phase == "forward" and not can_keep(op)}
    candidates = sorted(names(cost, lambda _: True) - refused)
    chance = random.Random(len(candidates))
    for _ in range(RANDOM_CHOICES):
        chosen = set(chance.sample(candidates, chance.randint(1, len(candidates))))
        yield lambda op, chosen=chosen: (op.name, op.module) in chosen  # type: ignore[misc]


@every_case
def test_bytes_and_work_are_those_of_torch(model: str, kind: str, dtype: ComputeDtypeName) -> None:
    costs = blocks(model, kind, dtype)
    embedding, *_, head = (unit.costs[dtype].saved["full"].at(MICRO_BATCH) for unit in profile_of(model, kind).units)
    plain = run(model, kind, dtype, None)
    for keep in choices(costs[0]):
        measured = run(model, kind, dtype, names(costs[0], keep))
        kept = [Keeping.of(cost, keep) for cost in costs]
        predicted = embedding + head + sum(each.saved.at(MICRO_BATCH) for each in kept)
        assert measured.saved in (predicted, predicted + kept[-1].leaving.at(MICRO_BATCH))
        saved, peaks, again = embedding, [], Counter[str]()
        for cost, each in zip(costs, kept, strict=True):
            saved += each.saved.at(MICRO_BATCH)
            peaks.append(saved + cost.output.at(MICRO_BATCH) + each.backward_peak.at(MICRO_BATCH))
            for op in each.recomputed:
                again[op.name] += op.count
        assert [peak for _, peak in measured.reached] == peaks[::-1]
        known = {op.name for cost in costs for op in cost.operators}
        ran = {name: measured.ran[name] - plain.ran[name] for name in known}
        assert {name: count for name, count in ran.items() if count} == again


@every_case
def test_named_choices_are_the_policies_of_the_profile(model: str, kind: str, dtype: ComputeDtypeName) -> None:
    for cost in blocks(model, kind, dtype):
        for policy in ("none", "selective", "full"):
            named = Keeping.named(cost, policy)
            assert (named.saved, named.backward_peak) == (cost.saved[policy], cost.backward_peak[policy])
            assert named.backward_moments == cost.backward_moments[policy]


def test_selective_keeps_products_and_recomputes_the_rest() -> None:
    cost = blocks("llama", "cuda", "bf16")[0]
    tokens, width, inner = 37, 64, 160
    products = 2 * tokens * (2 * width + 2 * width // 4 + width + 2 * inner + width)
    attention = 2 * tokens * width + 4 * 8 * tokens
    generator = sum(op.results.constant for op in cost.operators if op.kind == "attention")
    assert cost.saved["selective"] == Affine(
        generator, cost.saved["full"].slope + products + attention - 2 * tokens * width
    )
    assert not [op for op in Keeping.named(cost, "selective").recomputed if op.kind != "elementwise"]


def test_results_that_are_written_into_cannot_be_kept() -> None:
    cost = blocks("in-place", "cuda", "fp32")[0]
    (first,) = [op for op in cost.operators if (op.name, op.module, op.phase) == ("convolution", "one", "forward")]
    assert not can_keep(first)
    with pytest.raises(RuntimeError, match="has been mutated"):
        run("in-place", "cuda", "fp32", {("convolution", "one")})


def test_what_the_module_itself_holds_is_never_dropped() -> None:
    costs = blocks("stash", "cuda", "fp32")
    measured = run("stash", "cuda", "fp32", ())
    units = profile_of("stash", "cuda").units
    assert measured.saved == sum(unit.count * unit.costs["fp32"].saved["full"].at(MICRO_BATCH) for unit in units)
    assert {cost.saved["full"].slope for cost in costs} == {2 * 29 * 16 * 4}
