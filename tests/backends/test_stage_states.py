"""Which parameters a process of a pipeline has, and its states without data-parallel axes; in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny import build
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime.data import Batch
from shardwright.backends.pytorch.runtime.held_flat import FlatHolder
from shardwright.backends.pytorch.runtime.initialize import allocate, initialize, parameters_on_meta
from shardwright.backends.pytorch.runtime.stage_states import StageStates
from shardwright.backends.pytorch.runtime.stages import stages_of
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates

CPU = torch.device("cpu")
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
BATCH = {"input_ids": torch.arange(24).view(2, 12), "targets": torch.arange(24).view(2, 12)}


def forward(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten(), reduction="sum")


def alone() -> Levels:
    return Levels(None, parameters=1, gradients=1, optimizer_states=1)


def placed(
    rank: int, ranks: tuple[int, ...], cuts: tuple[int, ...], dtype: torch.dtype = torch.float32, **arguments: Any
) -> tuple[nn.Module, StageStates]:
    """As `build_model` of a script does it."""
    with parameters_on_meta():
        model: nn.Module = build(**arguments)
        model.unused = nn.Linear(3, 3)
    own = [stage for stage, at in enumerate(ranks) if at == rank]
    states = ShardedStates(alone(), dtype)
    made = StageStates(model, states, stages_of(model, BLOCKS, cuts, own, forward, BATCH, dtype), ranks, rank)
    for paths in made.blocks.values():
        for path in paths:
            initialize(model, path, seed=0, device=CPU)
            made.take_block(path)
    initialize(model, "", seed=0, device=CPU, without=BLOCKS)
    made.take_rest(CPU)
    return model, made


def whole(**arguments: Any) -> dict[str, Tensor]:
    with parameters_on_meta():
        model: nn.Module = build(**arguments)
        model.unused = nn.Linear(3, 3)
    for path in (*BLOCKS, ""):
        initialize(model, path, seed=0, device=CPU)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def names_of(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def here(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}


def of_unit(model: nn.Module, made: StageStates, unit: int) -> set[str]:
    places = {place.parameter for bucket in made.states.units[unit] for place in bucket.places}
    return {name for name, parameter in model.named_parameters() if parameter in places}


def test_a_process_has_what_its_stages_use_and_the_first_one_the_rest() -> None:
    first, states = placed(0, (0, 1), (1,))
    assert here(first) == names_of(first, "embed", "positions", "blocks.0.", "unused")
    second, others = placed(1, (0, 1), (1,))
    assert here(second) == names_of(second, "blocks.1.", "blocks.2.", "norm", "head")
    assert states.blocks == {0: ("blocks.0",)}
    assert others.blocks == {1: ("blocks.1", "blocks.2")}
    assert [of_unit(second, others, unit) for unit in others.units[1]] == [
        names_of(second, "blocks.1."),
        names_of(second, "blocks.2."),
        names_of(second, "norm", "head"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_initial_values_are_those_of_the_whole_model(dtype: torch.dtype, tied: bool) -> None:
    expected, seen = whole(tied=tied), set()
    for rank in (0, 1):
        model, made = placed(rank, (0, 1), (2,), dtype, tied=tied)
        holder = FlatHolder(made.states)
        for name, parameter in model.named_parameters():
            held = holder.held(parameter)
            assert held.dtype == torch.float32
            assert held.shape == tuple(parameter.shape)
            assert bool(held.parts) == (name in here(model))
            for box, values in held.parts:
                seen.add(name)
                part = tuple(slice(*span) for span in zip(box.start, box.stop, strict=True))
                assert torch.equal(values, expected[name][part]), name
    assert seen == expected.keys()


def test_what_two_ranks_share_is_a_unit_that_one_of_them_counts() -> None:
    for rank in (0, 1):
        model, made = placed(rank, (0, 1), (1,), tied=True)
        shared = made.units[rank][-1]
        assert of_unit(model, made, shared) == {"embed.weight"}
        assert [bucket.copy for bucket in made.states.units[shared]] == [rank == 1]
        holder = FlatHolder(made.states)
        assert holder.held(model.get_parameter("embed.weight")).written == (rank == 0)


def test_what_two_stages_of_a_rank_share_is_in_the_unit_of_the_first() -> None:
    model, made = placed(0, (0, 1, 1, 0), (1, 2, 3), tied=True)
    root = names_of(model, "embed", "positions", "unused")
    assert [of_unit(model, made, unit) for unit in made.units[0]] == [names_of(model, "blocks.0."), root]
    assert [of_unit(model, made, unit) for unit in made.units[3]] == [root, names_of(model, "norm")]
    assert not any(bucket.copy for unit in made.states.units for bucket in unit)


def test_what_is_left_on_meta_has_the_dtype_of_forward() -> None:
    model, _ = placed(1, (0, 1), (1,), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_parameter("embed.weight").is_meta


class Orthogonal(nn.Module):
    """Its initial values cannot be drawn in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 4)
        self.turn = Orthogonal()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 40)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.turn(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def test_what_another_stage_has_is_drawn_in_its_own_dtype() -> None:
    blocks, ranks = ["blocks.0", "blocks.1"], (0, 1)
    with parameters_on_meta():
        model = Model()
    states = ShardedStates(alone(), torch.bfloat16)
    made = StageStates(model, states, stages_of(model, blocks, (1,), [1], forward, BATCH, torch.bfloat16), ranks, 1)
    initialize(model, "blocks.1", seed=0, device=CPU)
    made.take_block("blocks.1")
    initialize(model, "", seed=0, device=CPU, without=blocks)
    made.take_rest(CPU)
    assert here(model) == {"blocks.1.weight", "blocks.1.bias", "head.weight", "head.bias"}


def test_blocks_that_are_left_out_stay_on_meta() -> None:
    for fill in (
        lambda model: initialize(model, "", seed=0, device=CPU, without=BLOCKS[1:]),
        lambda model: allocate(model, CPU, without=BLOCKS[1:]),
    ):
        with parameters_on_meta():
            model = build()
        fill(model)
        assert here(model) == names_of(model, "embed", "positions", "blocks.0", "norm", "head")


def test_states_without_axes_train_as_plain_parameters_do() -> None:
    """Without a mesh nothing is sent."""
    torch.manual_seed(0)
    plain, model = nn.Linear(5, 3), nn.Linear(5, 3)
    model.load_state_dict(plain.state_dict())
    states = ShardedStates(alone(), torch.float32)
    unit = states.take(model.parameters())
    optimizer = torch.optim.SGD(states.parameter_groups([{}, {}]), lr=0.1)
    expected = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        inputs = torch.randn(4, 5)
        states.gather(unit)
        states.wait(unit)
        torch.autograd.backward(model(inputs).square().sum())
        torch.autograd.backward(plain(inputs).square().sum())
        states.release(unit)
        states.reduce(unit, last=True)
        states.finish()
        assert torch.equal(states.gradient_norm(), nn.utils.get_total_norm([p.grad for p in plain.parameters()])), step
        optimizer.step()
        states.publish()
        expected.step()
        expected.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
