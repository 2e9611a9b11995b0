"""What single processes hold of flat slices, and checkpoints whose optimizer states such a layout cannot take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwright.backends.pytorch.runtime.checkpoint import CheckpointError, Checkpoints, TrainState
from shardwright.backends.pytorch.runtime.held_flat import FlatHolder
from shardwright.backends.pytorch.runtime.index import check_cover
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates


class Odd(nn.Module):
    """Parameters of no dims, of no elements, and of three dims; a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.none = nn.Parameter(torch.empty(0, 4))
        self.cube = nn.Parameter(torch.arange(105.0).reshape(3, 5, 7))
        self.shift = nn.Parameter(torch.arange(9.0))
        self.frozen = nn.Parameter(torch.arange(11.0) / 3, requires_grad=False)

    def forward(self) -> Tensor:
        return (self.cube.sum() * self.scale).square() + self.shift.sum() + self.none.sum()


@contextmanager
def process(rank: int, world: int) -> Iterator[None]:
    """One of several processes, of which the others only seem to be there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(
    sizes: tuple[int, ...], o: int, dtype: torch.dtype = torch.float32, change: Callable[[Odd], object] = id
) -> tuple[Odd, ShardedStates, torch.optim.Optimizer]:
    """On a mesh of these axes, the fastest first."""
    names = tuple(f"dp_{index}" for index in range(len(sizes), 0, -1))
    mesh = init_device_mesh("cpu", tuple(reversed(sizes)), mesh_dim_names=names)
    model = Odd()
    change(model)
    states = ShardedStates(Levels(mesh, parameters=1, gradients=1, optimizer_states=o), dtype)
    states.shard(model, root=True)
    return model, states, torch.optim.AdamW(states.parameter_groups([{}, {}]), lr=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("o", [1, 2, 8])
def test_all_processes_together_hold_every_element_of_the_unrounded_values(o: int, dtype: torch.dtype) -> None:
    expected = dict(Odd().named_parameters())
    boxes: dict[str, list[Any]] = {name: [] for name in expected}
    turns: dict[int, set[tuple[int, int]]] = {}
    for rank in range(8):
        with process(rank, 8):
            model, states, _ = sharded((2, 4), o, dtype)
            holder = FlatHolder(states)
            for name, parameter in model.named_parameters():
                held = holder.held(parameter)
                assert (held.shape, held.dtype) == (tuple(parameter.shape), torch.float32)
                turns.setdefault(rank % o, set()).add(held.replica)
                for box, values in held.parts:
                    assert torch.equal(values, expected[name][tuple(map(slice, box.start, box.stop))]), name
                    boxes[name] += [box] if held.replica[0] == 0 else []
    for name, value in expected.items():
        check_cover(name, tuple(value.shape), boxes[name])
    assert turns == {slice_: {(copy, 8 // o) for copy in range(8 // o)} for slice_ in range(o)}


def save(folder: Path, *, apart: bool = False) -> dict[str, Tensor]:
    """A checkpoint of one plain process after two steps, one parameter without a gradient in the second if `apart`."""
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        torch.autograd.backward(model())
        if apart and step:
            model.scale.grad = None
        optimizer.step()
        optimizer.zero_grad()
    Checkpoints(folder, 1).save(TrainState(2, 2, 7), model, optimizer)
    return {name: value.detach() for name, value in model.named_parameters()}


def load(folder: Path, change: Callable[[Odd], object] = id) -> tuple[Odd, torch.optim.Optimizer]:
    with process(0, 1):
        model, states, optimizer = sharded((1,), 1, change=change)
        assert Checkpoints(folder, 1, FlatHolder(states)).load(model, optimizer, seed=7) == TrainState(2, 2, 7)
        return model, optimizer


def test_parameters_without_dims_or_elements_are_loaded(tmp_path: Path) -> None:
    expected = save(tmp_path)
    model, optimizer = load(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert [(float(state["step"]), state["step"].dim()) for state in optimizer.state.values()] == [(2.0, 0)] * 2
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == 105 + 9 + 1


def test_parameters_that_were_not_stepped_together_are_refused(tmp_path: Path) -> None:
    save(tmp_path, apart=True)
    with pytest.raises(CheckpointError, match="differ in step, and this layout steps them together"):
        load(tmp_path)


def test_parameters_without_states_beside_others_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "step_00000002" / "index.json"
    index = json.loads(path.read_text())
    index["tensors"] = {name: each for name, each in index["tensors"].items() if not name.endswith("exp_avg.scale")}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="optimizer states of some parameters only"):
        load(tmp_path)


def test_states_of_parameters_that_are_frozen_by_now_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(CheckpointError, match="not trained here"):
        load(tmp_path, lambda model: model.shift.requires_grad_(False))
