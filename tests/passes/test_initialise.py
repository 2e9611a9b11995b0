"""How weights start."""

from __future__ import annotations

from pathlib import Path

import pytest

from passes.jobs import LLAMA, make_job
from passes.models import profile_of, refusal
from shardwright.passes import profile_model

GATED = """
class Gated(Block):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(16))
        self.register_buffer("table", torch.ones(16))
class build(Model):
    block = Gated
"""


def test_small_models_of_a_factory_are_constructed(tmp_path: Path) -> None:
    assert profile_of(tmp_path).init == "constructor"
    assert profile_of(tmp_path, GATED).init == "constructor"


def test_large_ones_initialise_their_modules(tmp_path: Path) -> None:
    large = "build = lambda: Model(vocabulary=40_000_000)"
    assert profile_of(tmp_path, large).init == "modules"
    assert profile_of(tmp_path, large, init="constructor").init == "constructor"


def test_hugging_face_models_initialise_their_modules(tmp_path: Path) -> None:
    assert profile_model(make_job({"hf": LLAMA}), tmp_path, ("bf16",)).init == "modules"
    constructed = make_job({"hf": LLAMA, "init": "constructor"})
    assert profile_model(constructed, tmp_path, ("bf16",)).init == "constructor"


def test_what_is_loaded_needs_no_initialiser_and_no_whole_model(tmp_path: Path) -> None:
    assert profile_of(tmp_path, GATED, weights="stored").init == "modules"
    assert profile_of(tmp_path, GATED, weights="stored", init="modules").init == "modules"
    assert profile_of(tmp_path, GATED, weights="stored", init="constructor").init == "constructor"


def test_a_parameter_that_nothing_initialises(tmp_path: Path) -> None:
    said = refusal(tmp_path, GATED, init="modules")
    assert said.key == "model.init"
    assert said.message.startswith("nothing initialises gate of module blocks.0 (Gated)")


@pytest.mark.parametrize(
    "able",
    [
        "Gated.reset_parameters = lambda self: nn.init.ones_(self.gate)",
        "Gated._reset_parameters = lambda self: self.gate.data.fill_(1.0)",
        "build._init_weights = lambda self, module: [p.normal_() for p in module.parameters(recurse=False)]",
    ],
)
def test_ways_to_initialise_it(tmp_path: Path, able: str) -> None:
    assert profile_of(tmp_path, GATED + able, init="modules").init == "modules"


def test_a_rule_that_forgets_some_modules(tmp_path: Path) -> None:
    rule = "build._init_weights = lambda self, m: nn.init.zeros_(m.weight) if isinstance(m, nn.Embedding) else None"
    assert "nothing initialises weight of module blocks.0.norm" in refusal(tmp_path, rule, init="modules").message


def test_an_initialiser_that_fails(tmp_path: Path) -> None:
    said = refusal(tmp_path, GATED + "Gated.reset_parameters = lambda self: self.gate[99].zero_()", init="modules")
    assert said.key == "model.init"
    assert "initialising module blocks.0 failed: IndexError" in said.message
