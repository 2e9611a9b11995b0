"""What hooks of `ShardedStates` find in the outputs of modules, and what they refuse, in one process."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.one_mesh import Mesh
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast

from shardwright.backends.pytorch.runtime.hooks import tensors_of
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates

ONE, TWO = torch.ones(1), torch.zeros(2)


@dataclass
class Pair:
    """No registered pytree."""

    first: Any
    second: Any = None


Named = namedtuple("Named", "first second")


@pytest.mark.parametrize(
    "output",
    [
        (ONE, TWO),
        [ONE, (None, TWO)],
        {"a": ONE, "b": {"c": TWO}},
        OrderedDict(a=ONE, b=TWO),
        Named(ONE, TWO),
        Pair(ONE, Pair([TWO])),
        {"a": Pair(ONE, 3), "b": TWO},
        BaseModelOutput(last_hidden_state=ONE, hidden_states=(TWO,)),
        (BaseModelOutputWithPast(last_hidden_state=ONE), TWO),
    ],
    ids=lambda output: type(output).__name__,
)
def test_tensors_are_found_wherever_they_are(output: Any) -> None:
    assert [id(found) for found in tensors_of(output)] == [id(ONE), id(TWO)]


@pytest.mark.parametrize("output", [None, 3, Pair, object(), {}])
def test_there_may_be_none(output: Any) -> None:
    assert list(tensors_of(output)) == []


class Model(nn.Module):
    """One unit, whose output is wrapped."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.unit, self.wrap = nn.Linear(2, 2), wrap
        linear = self.unit.forward
        self.unit.forward = lambda x: wrap(linear(x))  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Any:
        return self.unit(x)


def sharded(wrap: Any) -> tuple[Model, ShardedStates]:
    model, mesh = Model(wrap), Mesh()
    states = ShardedStates(Levels(mesh, parameters=1, gradients=1, optimizer_states=1), torch.float32)  # type: ignore[arg-type]
    states.shard(model.unit)
    states.shard(model, root=True)
    return model, states


def test_an_output_without_tensors_is_refused() -> None:
    model, _ = sharded(lambda x: SimpleBox(x))
    with pytest.raises(TypeError, match="unit 0 returns a SimpleBox in which no tensors are found"):
        model(torch.ones(2))


class SimpleBox:
    """Hides a tensor."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_backward_is_the_engines() -> None:
    model, _ = sharded(lambda x: x)
    with pytest.raises(RuntimeError, match=r"outside `ShardedStates\.backward`"):
        model(torch.ones(2)).sum().backward()


def test_a_gradient_that_backward_leaves_in_a_parameter_is_the_sum_of_its_uses() -> None:
    """Two forwards, one of them of a micro-batch before: all add up in the optimizer's parameters."""
    model, states = sharded(lambda x: x)
    for last in (False, True):
        states.backward(model(torch.ones(2)).sum(), last=last)
    assert [parameter.grad.tolist() for parameter in states.parameters() if parameter.grad is not None] == [
        [2.0] * 4,
        [2.0] * 2,
    ]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("which", ["int8_gathers", "int4_reductions"])
def test_an_axis_that_the_mesh_has_not_is_refused(which: str) -> None:
    mesh: Any = Mesh((2, 2))
    with pytest.raises(ValueError, match="none of the name dp_3"):
        Levels(mesh, parameters=1, gradients=1, optimizer_states=4, **{which: ("dp_1", "dp_3")})


@pytest.mark.parametrize(("degrees", "message"), [((2, 2, 3), "a shard degree of 3"), ((4, 2, 2), "wider than")])
def test_levels_that_are_none_are_refused(degrees: tuple[int, int, int], message: str) -> None:
    mesh: Any = Mesh((2, 2))
    with pytest.raises(ValueError, match=message):
        Levels(mesh, parameters=degrees[0], gradients=degrees[1], optimizer_states=degrees[2])
