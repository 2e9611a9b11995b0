"""Parts of parameters, without any processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardwright.backends.pytorch.runtime.divided import (
    Part,
    Span,
    divide_counts,
    holders,
    narrow,
    parts_by_parameter,
    parts_of,
    whole_counts,
)
from shardwright.backends.pytorch.runtime.pieces import Box
from shardwright.backends.pytorch.runtime.pieces import whole as whole_box
from shardwright.backends.pytorch.runtime.tensor_parallel import Column, Region, Tied, Vocabulary, matching
from shardwright.backends.pytorch.runtime.wrappers import Wrapper, in_place_of, innermost, replace_innermost


def linear(outputs: int, inputs: int = 3) -> nn.Linear:
    """With a weight of distinct numbers."""
    layer = nn.Linear(inputs, outputs)
    layer.weight = nn.Parameter(torch.arange(1.0, outputs * inputs + 1).view(outputs, inputs))
    return layer


def together(parts: list[Part], values: list[torch.Tensor]) -> torch.Tensor:
    """The whole, put together from the boxes of all processes."""
    made = torch.full(parts[0].shape, torch.nan)
    for part, value in zip(parts, values, strict=True):
        for box, here in part.boxes(whole_box(value.shape)):
            made[box.within(whole_box(made.shape))] = value[here.within(whole_box(value.shape))]
    return made


@pytest.mark.parametrize(
    ("outputs", "size", "settings", "rows"),
    [
        (8, 2, {}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (7, 2, {}, [[0, 1, 2, 3], [4, 5, 6]]),
        (7, 2, {"units": 7}, [[0, 1, 2, 3], [4, 5, 6]]),
        (12, 2, {"parts": (4, 8), "units": 4}, [[0, 1, 4, 5, 6, 7], [2, 3, 8, 9, 10, 11]]),
        (6, 4, {"units": 2}, [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]),
        (12, 4, {"parts": (8, 4), "units": 2}, [[0, 1, 2, 3, 8, 9]] * 2 + [[4, 5, 6, 7, 10, 11]] * 2),
    ],
)
def test_every_process_keeps_its_rows(outputs: int, size: int, settings: dict[str, object], rows: object) -> None:
    weight, found, parts, values = linear(outputs).weight.detach(), [], [], []
    for rank in range(size):
        layer = linear(outputs)
        part = narrow(layer, "weight", 0, rank=rank, size=size, **settings)  # type: ignore[arg-type]
        found.append([int(row[0] - 1) // 3 for row in layer.weight])
        assert part.local_shape == tuple(layer.weight.shape)
        assert parts_by_parameter(layer) == {layer.weight: part}
        parts.append(part)
        values.append(layer.weight.detach())
    assert found == rows
    assert torch.equal(together(parts, values), weight)
    copies = size // len({tuple(each) for each in found})
    assert [part.turn for part in parts] == [(rank % copies, copies) for rank in range(size)]


def test_two_axes_divide_two_dims() -> None:
    weight, parts, values = linear(8, 6).weight.detach(), [], []
    for expert in range(2):
        for rank in range(3):
            layer = linear(8, 6)
            narrow(layer, "weight", 1, rank=rank, size=3)
            part = narrow(layer, "weight", 0, rank=expert, size=2, units=8, axis="ep")
            assert part.local_shape == tuple(layer.weight.shape) == (4, 2)
            assert holders(part, 3) == 1
            parts.append(part)
            values.append(layer.weight.detach())
    assert torch.equal(together(parts, values), weight)


def test_holders_count_processes_with_the_same_elements() -> None:
    layer = linear(8)
    assert holders(None, 4) == 4
    assert holders(narrow(layer, "weight", 0, rank=1, size=2, units=8, axis="ep"), 4) == 4
    assert holders(narrow(layer, "weight", 1, rank=0, size=3, units=3), 3) == 1
    assert holders(narrow(layer, "bias", 0, rank=3, size=4, units=2), 4) == 2


def test_a_box_of_what_lies_here_is_cut_where_the_whole_has_gaps() -> None:
    part = Part((10, 2), ((Span(0, 2), Span(6, 9)), (Span(0, 2),)))
    found = list(part.boxes(Box((1, 0), (4, 2))))
    assert found == [(Box((1, 0), (2, 2)), Box((1, 0), (2, 2))), (Box((6, 0), (8, 2)), Box((2, 0), (4, 2)))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": 3, "size": 2}, "3 units of weight cannot be divided among 2"),
        ({"units": 4, "size": 6}, "4 units of weight cannot be divided among 6"),
        ({"parts": (3, 4), "size": 2}, r"3 \+ 4 are not a dim of 8"),
        ({"parts": (3, 5), "units": 4, "size": 2}, "3 cannot be divided into 2 equal"),
        ({"size": 5}, "of 8 indices some of 5 processes would have none"),
    ],
)
def test_parts_that_cannot_be_made_are_refused_on_every_process(settings: dict[str, object], message: str) -> None:
    for rank in range(2):
        with pytest.raises(ValueError, match=message):
            narrow(linear(8), "weight", 0, rank=rank, **settings)  # type: ignore[arg-type]


def test_a_parameter_is_divided_along_an_axis_once() -> None:
    layer = linear(8)
    narrow(layer, "weight", 0, rank=0, size=2)
    with pytest.raises(ValueError, match="divided along tp or dim 1 already"):
        narrow(layer, "weight", 1, rank=0, size=3)


def test_tied_parameters_stay_one() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "head": linear(8, 4)})
    model["head"].weight = model["table"].weight
    for module in model.values():
        narrow(module, "weight", 0, rank=1, size=2)
    assert model["head"].weight is model["table"].weight
    assert model["head"].weight.shape == (4, 4)
    assert parts_of(model).keys() == {"table.weight", "head.weight"}


def test_counts_are_divided_and_whole_for_a_while() -> None:
    module = nn.Module()
    module.heads, module.groups, module.kv = 8, 4, 2  # type: ignore[assignment]
    divide_counts(module, ("heads", "kv"), 4)
    divide_counts(module, {"groups": 2}, 4)
    assert (module.heads, module.groups, module.kv) == (2, 2, 1)
    with whole_counts(module):
        assert (module.heads, module.groups, module.kv) == (8, 4, 2)
    assert (module.heads, module.groups, module.kv) == (2, 2, 1)
    module.width = 8  # type: ignore[assignment]
    with pytest.raises(ValueError, match="width of Module is 8, which is no multiple of 3"):
        divide_counts(module, ["width"], 3)


def blocks() -> nn.Module:
    """Layers of which only one has an `extra`."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(2, 2)}) for _ in range(3))
    model.layers[1]["extra"] = nn.Linear(2, 2)
    return model


def test_patterns_match_what_there_is() -> None:
    mlp, extra = Region(), Column()
    found = matching(blocks(), {"layers.*.mlp": mlp, "layers.*.extra": extra})
    assert found == {**{f"layers.{number}.mlp": mlp for number in range(3)}, "layers.1.extra": extra}
    with pytest.raises(ValueError, match=r"no module of Module is at layers\.\*\.attention"):
        matching(blocks(), {"layers.*.attention": mlp})
    with pytest.raises(
        ValueError, match=r"two patterns of the table match layers\.0\.mlp, the second is layers\.0\.\*"
    ):
        matching(blocks(), {"layers.*.mlp": mlp, "layers.0.*": extra})


def test_modules_with_the_same_parameter_follow() -> None:
    model = nn.ModuleDict({"unused": nn.Embedding(8, 4), "table": nn.Embedding(8, 4), "other": nn.Module()})
    model["unused"].weight = model["table"].weight
    model["other"].bias = model["table"].weight
    found = matching(model, {"table": Vocabulary()})
    assert found["unused"] == Tied(dims={"weight": 0}, parts={"weight": ()})
    assert found["other"] == Tied(dims={"bias": 0}, parts={"bias": ()})


class Twice(Wrapper):
    """Doubles."""

    def __call__(self, *args: object) -> object:
        """The module's forward."""
        return self.inner(*args) * 2


def test_wrappers_lie_around_a_forward_that_can_be_replaced() -> None:
    layer = nn.Identity()
    own = layer.forward
    Twice(layer)
    Twice(layer)
    assert innermost(layer) == own
    assert layer(torch.tensor(1.0)) == 4
    replace_innermost(layer, lambda x: x + 1)
    assert layer(torch.tensor(1.0)) == 8


def test_a_parameter_reads_as_another_tensor_for_a_while() -> None:
    layer = linear(2)
    weight = layer.weight
    with in_place_of(layer, {"bias": None, "weight": torch.ones(2)}):
        assert layer.bias is None
        assert torch.equal(layer.weight, torch.ones(2))
    assert layer.weight is weight
    assert isinstance(layer.bias, nn.Parameter)
    with pytest.raises(ZeroDivisionError), in_place_of(layer, {"weight": torch.ones(2)}):
        raise ZeroDivisionError
    assert layer.weight is weight
