"""Randomly composed models: blocks measured once, blocks measured each, and the whole model agree."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from passes.jobs import make_job
from passes.reference import measure_whole
from passes.totals import flops, peaks, saved
from passes.zoo_jobs import ZOO
from shardwright.passes import profile_model
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ModelProfile

LEAVES = ("linear", "norm", "rms", "gelu", "dropout", "attend", "wide", "in-place", "convolve", "views", "unused")
NESTED = ("chain", "residual", "twice", "frozen", "gated")
EXAMPLES = int(os.environ.get("RANDOM_MODULES", "8"))
"""More are for a run by hand."""

leaves = st.sampled_from(LEAVES).map(lambda name: [name])
pieces = st.recursive(
    leaves,
    lambda inner: st.tuples(st.sampled_from(NESTED), st.lists(inner, min_size=1, max_size=3)).map(
        lambda made: [made[0], *made[1]]
    ),
    max_leaves=5,
)
kinds = st.lists(
    st.tuples(st.lists(pieces, min_size=1, max_size=3), st.sampled_from(("tensor", "tuple", "dict"))).map(list),
    min_size=1,
    max_size=2,
)
models = kinds.flatmap(
    lambda made: st.tuples(st.just(made), st.lists(st.integers(0, len(made) - 1), min_size=2, max_size=4))
)


def job_of(made: list[Any], order: list[int], kind: str, share: bool) -> JobSpec:
    model = {"factory": "composed:build", "args": {"kinds": made, "order": order}, "profile": {"share": share}}
    return make_job(model, kind=kind, length=7)


def profile_of(made: list[Any], order: list[int], kind: str, share: bool) -> ModelProfile:
    return profile_model(job_of(made, order, kind, share), ZOO, ("fp32",))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 50,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(models, st.sampled_from(("cuda", "cpu")))
def test_shared_unshared_and_whole_agree(model: tuple[list[Any], list[int]], kind: str) -> None:
    made, order = model
    profile = profile_of(made, order, kind, share=True)
    assert profile.units == profile_of(made, order, kind, share=False).units
    assert profile.block_paths == tuple(f"blocks.{index}" for index in range(len(order)))
    whole = measure_whole(job_of(made, order, kind, True), ZOO, profile.block_paths, 0, "fp32", 2)
    recomputed = measure_whole(job_of(made, order, kind, True), ZOO, profile.block_paths, len(order), "fp32", 2)
    assert flops(profile, "fp32", 2, "forward") == whole.forward_flops - whole.forward_masked
    assert flops(profile, "fp32", 2, "input_gradient", "weight_gradient") == (
        whole.backward_flops - whole.backward_masked
    )
    assert saved(profile, "fp32", "none", 2) == whole.saved
    assert saved(profile, "fp32", "full", 2) == recomputed.saved
    peak = peaks(profile, "fp32", 2)
    assert peak["none"] >= whole.backward_peak
    assert peak["full"] >= recomputed.backward_peak
