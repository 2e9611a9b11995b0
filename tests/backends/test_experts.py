"""What needs no other process: how experts are divided, what is refused, and shapes without values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.one_mesh import Mesh
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwright.backends.pytorch.runtime.divided import parts_of
from shardwright.backends.pytorch.runtime.experts import divide_experts
from shardwright.backends.pytorch.runtime.initialize import initialize, parameters_on_meta
from shardwright.backends.pytorch.runtime.meshes import by_mesh
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates

EXPERTS, WIDTH = 4, 6


class Layer(nn.Module):
    """Experts that each are one matrix and a bias."""

    def __init__(self, experts: int = EXPERTS) -> None:
        super().__init__()
        self.count = experts
        self.weight = nn.Parameter(torch.randn(experts, WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(experts, WIDTH))

    def reset_parameters(self) -> None:
        for expert in range(self.count):
            self.weight.data[expert].normal_()
            self.bias.data[expert].fill_(expert)

    def forward(self, tokens: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        assert self.count == len(self.weight)
        rows = torch.einsum("th,tkoh->tko", tokens, self.weight[indices]) + self.bias[indices]
        return (rows * weights[..., None]).sum(1)


class Model(nn.Module):
    def __init__(self, experts: int = EXPERTS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": Layer(experts)}) for _ in range(2))
        self.router = nn.Linear(WIDTH, experts)


PATTERNS = {"layers.*.experts": ("count",)}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """The second of two processes that share experts; whatever it sends or receives goes nowhere."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    finally:
        dist.destroy_process_group()


def called(layer: Any, device: str = "cpu", tokens: int = 5) -> Tensor:
    given = torch.randn(tokens, WIDTH, device=device)
    result: Tensor = layer(
        given, torch.zeros(tokens, 2, dtype=torch.int64, device=device), torch.rand(tokens, 2, device=device)
    )
    return result


def test_each_process_has_its_part_of_the_stacks(mesh: DeviceMesh) -> None:
    model = Model()
    whole = copy.deepcopy(model.state_dict())
    experts = divide_experts(model, PATTERNS, mesh)
    assert list(experts.layers) == ["layers.0.experts", "layers.1.experts"]
    assert experts.inside(model.layers[1]) == [model.get_submodule("layers.1.experts")]
    for path, layer in experts.layers.items():
        assert layer.count == EXPERTS // 2
        assert torch.equal(layer.get_parameter("weight"), whole[f"{path}.weight"][2:])
        assert torch.equal(layer.get_parameter("bias"), whole[f"{path}.bias"][2:])
        assert all(map(experts.has, layer.parameters()))
    assert not any(map(experts.has, model.router.parameters()))
    parts = parts_of(model)
    assert {name: part.shape for name, part in parts.items()} == {name: whole[name].shape for name in parts}
    assert len(parts) == 4


def test_initial_values_are_those_of_one_process(mesh: DeviceMesh) -> None:
    with parameters_on_meta():
        whole, model = Model(), Model()
    divide_experts(model, PATTERNS, mesh)
    for made in (whole, model):
        for path in ("layers.0", "layers.1", ""):
            initialize(made, path, seed=0, device=torch.device("cpu"))
    for name, values in model.named_parameters():
        expected = whole.get_parameter(name)
        assert torch.equal(values, expected[2:] if "experts" in name else expected)


def test_has_finds_the_parameters_that_took_the_places(mesh: DeviceMesh) -> None:
    model = Model()
    experts = divide_experts(model, PATTERNS, mesh)
    layer, before = model.get_submodule("layers.0.experts"), model.get_parameter("layers.0.experts.weight")
    layer.weight = nn.Parameter(before.detach().clone())
    assert experts.has(layer.weight)
    assert not experts.has(before)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_without_values_the_shapes_are_right_and_nothing_is_sent(
    device: str, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    divide_experts(model, PATTERNS, mesh)
    monkeypatch.setattr(dist, "all_to_all_single", lambda *_, **__: pytest.fail("something is sent"))
    if device == "meta":
        found = called(model.to("meta").get_submodule("layers.0.experts"), "meta")
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            made = copy.deepcopy(model, {id(each): nn.Parameter(mode.from_tensor(each)) for each in model.parameters()})
            found = called(made.get_submodule("layers.0.experts"))
    assert found.shape == (5, WIDTH)


def test_a_copy_dispatches_to_its_own_experts(mesh: DeviceMesh) -> None:
    model = Model()
    divide_experts(model, PATTERNS, mesh)
    made = copy.deepcopy(model)
    forward = vars(made.get_submodule("layers.0.experts"))["forward"]
    assert forward.forward.__self__ is made.get_submodule("layers.0.experts")
    assert forward.group is mesh.get_group()


def test_an_expert_that_is_not_there_is_refused(mesh: DeviceMesh) -> None:
    model = Model()
    divide_experts(model, PATTERNS, mesh)
    beyond = torch.full((5, 2), EXPERTS)
    with pytest.raises(ValueError, match="goes to expert 4, and there are 4"):
        model.get_submodule("layers.0.experts")(torch.randn(5, WIDTH), beyond, torch.rand(5, 2))


@pytest.mark.parametrize(
    ("patterns", "experts", "message"),
    [
        ({"layers.*.mlp": ()}, 4, "no module of the model has a path like layers"),
        (PATTERNS, 5, "the 5 experts of layers.0.experts cannot be divided among 2"),
        ({"layers.*": ()}, 4, "no stacks of equally many experts"),
        ({"router": ()}, 5, "the 5 experts of router cannot be divided"),
        ({"layers.*.experts": ("width",)}, 4, "width"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    patterns: dict[str, tuple[str, ...]], experts: int, message: str, mesh: DeviceMesh
) -> None:
    model = Model(experts)
    for layer in model.layers:
        layer.get_submodule("experts").width = 7
    with pytest.raises(ValueError, match=message):
        divide_experts(model, patterns, mesh)


def levels(sizes: tuple[int, ...], p: int, g: int, o: int) -> Levels:
    return Levels(Mesh(sizes), parameters=p, gradients=g, optimizer_states=o)  # type: ignore[arg-type]


def test_levels_of_experts_are_what_sharing_them_leaves() -> None:
    whole, rest = levels((2, 4), 2, 1, 8), levels((4,), 1, 1, 4)
    dtype = torch.float32
    ShardedStates(whole, dtype, experts=rest, is_expert=lambda _: False, share_of=lambda _: 1.0)
    with pytest.raises(ValueError, match="the optimizer_states of experts are sharded otherwise"):
        ShardedStates(whole, dtype, experts=levels((4,), 1, 1, 1), is_expert=bool, share_of=lambda _: 1.0)
    with pytest.raises(ValueError, match=r"the axes of the experts, \(2,\), are not the slowest ones"):
        ShardedStates(whole, dtype, experts=levels((2,), 1, 1, 2), is_expert=bool, share_of=lambda _: 1.0)
    with pytest.raises(ValueError, match="`is_expert` and `share_of` must be given"):
        ShardedStates(whole, dtype, experts=rest)


def test_experts_have_buckets_of_their_own() -> None:
    """Trained ones, then frozen ones; of the experts behind all others."""
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(4, 4)) for name in ("a", "expert a", "b", "expert b")})
    model["b"].requires_grad_(False)
    model["expert b"].requires_grad_(False)
    own = {model["expert a"], model["expert b"]}
    states = ShardedStates(
        levels((2, 4), 1, 1, 1),
        torch.float32,
        experts=levels((4,), 1, 1, 1),
        is_expert=own.__contains__,
        share_of=lambda _: 1.0,
    )
    states.take(model.parameters())
    (buckets,) = states.units
    found = [(bucket.places[0].parameter, bucket.levels.sizes) for bucket in buckets]
    order, sizes = ("a", "b", "expert a", "expert b"), ((2, 4), (2, 4), (4,), (4,))
    assert [parameter is model[name] for (parameter, _), name in zip(found, order, strict=True)] == [True] * 4
    assert tuple(each for _, each in found) == sizes


def test_groups_of_one_mesh_stay_as_they_are() -> None:
    parameters = list(Model().parameters())
    assert by_mesh([{"params": parameters, "lr": 1.0}]) == [{"params": parameters, "lr": 1.0}]
