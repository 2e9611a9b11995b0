"""Which modules are blocks, and which are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from passes.models import profile_of
from shardwright.passes.alike import numbers_read
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
    within = find_blocks(model, frozenset({"layers.0", "layers.1", "layers.2"}))
    assert [block.path for block in within] == [f"layers.{i}.experts.{j}" for i in (0, 1) for j in (0, 1)]


def test_one_block_may_be_passed_over() -> None:
    model = nn.Sequential(layer(), layer(), layer())
    assert [block.path for block in find_blocks(model, frozenset({"1"}))] == ["0", "2"]


class Stage(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.shrink, self.blocks = nn.Linear(width, width), nn.ModuleList(layer(width) for _ in range(depth))


@pytest.mark.parametrize(
    ("stages", "paths"),
    [
        (nn.Sequential(nn.Sequential(Stage(4, 1), Stage(4, 1)), nn.Sequential(Stage(8, 1))), ["0.0", "0.1", "1.0"]),
        (
            nn.ModuleList([Stage(4, 2), Stage(8, 3)]),
            [f"0.blocks.{i}" for i in (0, 1)] + [f"1.blocks.{i}" for i in range(3)],
        ),
        (nn.ModuleList([Stage(8, 2), Stage(8, 2)]), ["0", "1"]),
        (nn.ModuleDict({"a": layer(), "b": layer()}), ["a", "b"]),
    ],
    ids=["lists of lists", "stages that differ", "layers with a list each", "a dictionary"],
)
def test_blocks_of_stages(stages: nn.Module, paths: list[str]) -> None:
    assert [block.path for block in find_blocks(stages)] == paths


def test_modules_of_a_blocks_class_are_blocks_wherever_they_are() -> None:
    model = nn.Module()
    model.down = nn.ModuleList([Stage(4, 1), Stage(4, 1)])
    model.middle = Stage(4, 1)
    assert [block.path for block in find_blocks(model)] == ["down.0", "down.1", "middle"]


def test_blocks_kept_in_attributes() -> None:
    model = nn.Module()
    model.enter, model.first, model.second, model.leave = nn.Linear(4, 4), Stage(4, 1), Stage(4, 1), layer()
    assert [block.path for block in find_blocks(model)] == ["first", "second"]
    wrapped = nn.Module()
    wrapped.model = model
    assert [block.path for block in find_blocks(wrapped)] == ["model.first", "model.second"]


def test_without_sharing_every_block_is_of_its_own_kind() -> None:
    model = nn.Sequential(layer(), layer())
    assert len({block.fingerprint for block in find_blocks(model)}) == 1
    assert len({block.fingerprint for block in find_blocks(model, share=False)}) == 2


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


NUMBERED = """
counter = 0
class Odd(Block):
    def __init__(self, index):
        super().__init__()
        self.layer_idx = index
    def forward(self, x):
        {line}
        return super().forward(x)
class build(Model):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Odd(index) for index in range(6))
"""


@pytest.mark.parametrize(
    ("line", "odd"),
    [
        ("x = x * 2 if self.layer_idx % 2 else x", (1, 3, 5)),
        ("x = x @ x.transpose(1, 2) @ x if self.layer_idx == 1 else x", (1,)),
        ("x = x.detach() if self.layer_idx == 4 else x", (4,)),
        ("x = x * 2 if id(self) == id(self.last[0]) else x", (5,)),
        ("x = x * (self.layer_idx + 1)", ()),
    ],
    ids=["every other", "one", "other gradients", "identity", "other numbers"],
)
def test_blocks_that_decide_by_what_cannot_be_seen_are_told_apart(
    tmp_path: Path, line: str, odd: tuple[int, ...]
) -> None:
    source = (
        NUMBERED.format(line=line)
        + """
        for block in self.blocks:
            block.last = Hidden([self.blocks[-1]])
class Hidden(list):
    pass
"""
    )
    shared = profile_of(tmp_path, source)
    assert shared.units == profile_of(tmp_path, source, profile={"share": False}).units
    forwards = [unit.fingerprint for unit in shared.units for _ in unit.paths]
    usual = forwards[next(index for index in range(6) if index not in odd)]
    assert {index for index in odd if forwards[index] == usual} == set()


def test_reading_its_number_leaves_a_class_as_it_was(tmp_path: Path) -> None:
    source = NUMBERED.format(line="x = x * (self.layer_idx + 1); assert type(self).__dict__.keys() >= {'forward'}")
    assert len(profile_of(tmp_path, source).block_paths) == 6


def test_what_numbers_layers_is_watched_and_put_back() -> None:
    module = layer(layer_idx=3)
    module.idx = 4
    with numbers_read(module) as reads:
        assert module.layer_idx == 3
        module.layer_idx = 5
        assert module.layer_idx == 5
    assert reads == {"layer_idx"}
    assert not {"layer_idx", "idx"} & vars(nn.Sequential).keys()
    assert vars(module)["layer_idx"] == 5


def test_a_block_that_returns_its_input_costs_nothing(tmp_path: Path) -> None:
    source = """
    class Same(Block):
        def forward(self, x):
            return x
    class build(Model):
        block = Same
    """
    unit = profile_of(tmp_path, source).units[1]
    assert unit.count == 3
    assert unit.costs["fp32"].operators == ()
    assert unit.costs["fp32"].saved["none"] == (0, 0)
