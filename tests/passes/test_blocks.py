"""Which modules are blocks, and which are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from passes.models import profile_of
from shardwright.passes.blocks import find_blocks, fingerprint


def layer(width: int = 8, **attributes: Any) -> nn.Module:
    module = nn.Sequential(nn.Linear(width, width), nn.ReLU())
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def runs(profile: Any) -> list[tuple[str, ...]]:
    return [unit.paths for unit in profile.units if unit.kind == "block"]


def test_equal_modules_have_equal_fingerprints() -> None:
    assert fingerprint(layer(), {}) == fingerprint(layer(), {})
    assert fingerprint(layer(layer_idx=1), {}) == fingerprint(layer(layer_idx=2), {})


@pytest.mark.parametrize(
    "other",
    [
        layer(9),
        layer(window=4),
        layer().eval(),
        layer().double(),
        layer().requires_grad_(False),
        layer(scale={"a": [1, 2]}),
        layer(activation=torch.relu),
        nn.Sequential(nn.Linear(8, 8), nn.GELU()),
    ],
)
def test_different_modules_have_different_fingerprints(other: nn.Module) -> None:
    assert fingerprint(layer(), {}) != fingerprint(other, {})


def test_functions_are_told_apart_by_their_code_and_what_they_capture() -> None:
    def scaled(by: float) -> Any:
        return lambda x: x * by

    assert fingerprint(layer(f=scaled(2.0)), {}) == fingerprint(layer(f=scaled(2.0)), {})
    assert fingerprint(layer(f=scaled(2.0)), {}) != fingerprint(layer(f=scaled(3.0)), {})


def test_an_object_shared_by_modules_is_described_alike_each_time() -> None:
    known: dict[int, Any] = {}
    config = {"width": 8, "more": [1, 2, 3]}
    first, second = layer(config=config), layer(config=config)
    assert fingerprint(first, known) == fingerprint(second, known)


def test_blocks_are_the_entries_of_the_outermost_lists() -> None:
    inner = nn.Module()
    inner.experts = nn.ModuleList([layer(), layer()])
    model = nn.Module()
    model.single = nn.ModuleList([layer()])
    model.layers = nn.ModuleList([inner, inner.__class__(), layer()])
    model.layers[1].experts = nn.ModuleList([layer(), layer()])
    assert [block.path for block in find_blocks(model)] == ["layers.0", "layers.1", "layers.2"]
    within = find_blocks(model, frozenset({"layers"}))
    assert [block.path for block in within] == [f"layers.{i}.experts.{j}" for i in (0, 1) for j in (0, 1)]


def test_consecutive_equal_blocks_are_one_unit(tmp_path: Path) -> None:
    source = """
    class build(Model):
        def __init__(self):
            super().__init__(layers=6)
            for index in (2, 5):
                self.blocks[index].down = nn.Linear(32, 16, bias=False)
    """
    profile = profile_of(tmp_path, source)
    equal = [("blocks.0", "blocks.1"), ("blocks.2",), ("blocks.3", "blocks.4"), ("blocks.5",)]
    assert runs(profile) == equal
    fingerprints = [unit.fingerprint for unit in profile.units if unit.kind == "block"]
    assert fingerprints[0] == fingerprints[2] != fingerprints[1] == fingerprints[3]


@pytest.mark.parametrize(
    "forward",
    ["for _ in range(3): x = self.blocks[0](x)", "for b in self.blocks: x = x + b.down(b.up(b.norm(x)))", "x = x * 2"],
    ids=["one block again and again", "blocks taken apart", "blocks not used"],
)
def test_lists_that_are_not_called_once_each_are_no_blocks(tmp_path: Path, forward: str) -> None:
    source = f"""
    class build(Model):
        def forward(self, tokens):
            x = self.embed(tokens)
            {forward}
            return self.head(x)
    """
    profile = profile_of(tmp_path, source)
    assert [unit.kind for unit in profile.units] == ["head"]
    assert {parameter.unit for parameter in profile.parameters} == {-1}


def test_a_block_that_stops_gradients_differs(tmp_path: Path) -> None:
    source = """
    class build(Model):
        def __init__(self):
            super().__init__()
            self.embed.requires_grad_(False)
            self.blocks[0].requires_grad_(False)
    """
    profile = profile_of(tmp_path, source)
    assert runs(profile) == [("blocks.0",), ("blocks.1",), ("blocks.2",)]
    frozen, first, second = (unit.costs["fp32"] for unit in profile.units if unit.kind == "block")
    assert frozen.flops("input_gradient", 1) == frozen.flops("weight_gradient", 1) == 0
    assert frozen.saved["none"].at(1) == 0
    assert first.flops("weight_gradient", 1) > second.flops("weight_gradient", 1) == second.flops("forward", 1)
