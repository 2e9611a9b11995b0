"""`ShardedStates` under every legal triple of shard degrees, on four processes, against one process and the planner."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
from support.launch import run_all
from support.states_worker import ACCUMULATION, BLOCKS, CLIP, OPTIMIZERS, STEPS, Block, Model, build, loss_of
from torch import Tensor, nn

from shardwright.planner.flat import Bucket, Chain, buckets, chain, step_sends
from shardwright.schemas.profile import Parameter

pytestmark = [pytest.mark.processes, pytest.mark.slow]

WORLD = 4
MESHES = ((2, 2), (4,))
FAULTS = ("scale", "lost micro-batch", "stale bucket")
BOUNDS = {"sgd": 2e-6, "adamw": 1e-4}
"""Largest difference of a parameter in fp32, by the order of sums. AdamW divides small gradients by their own size."""


def layouts() -> Iterator[tuple[tuple[int, ...], tuple[int, int, int], int | None]]:
    """Sizes, degrees of parameters, gradients and optimizer states, and of the second copy."""
    for sizes in MESHES:
        degrees = [prod(sizes[:level]) for level in range(len(sizes) + 1)]
        for p, g, o in itertools.product(degrees, repeat=3):
            if max(p, g) <= o:
                yield sizes, (p, g, o), None
                yield from ((sizes, (p, g, o), second) for second in degrees[1:] if second < p)


def run(sizes: tuple[int, ...], degrees: tuple[int, int, int], second: int | None, **changes: Any) -> dict[str, Any]:
    base = {"optimizer": "sgd", "dtype": "float32", "reshard": True, "recomputed": False, "clips": True} | changes
    name = " ".join(map(str, (sizes, degrees, second, *base.values())))
    return {"name": name, "sizes": sizes, "degrees": [*degrees, second], **base}


RUNS = [
    run(*layout, **changes)
    for layout in layouts()
    for changes in (
        {},
        {"optimizer": "adamw", "recomputed": True},
        {"reshard": False},
        {"dtype": "bfloat16", "clips": False},
    )
]
FAULTY = [run((2, 2), (2, 2, 4), None) | {"name": fault, "fault": fault} for fault in FAULTS]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the processes compute: with more threads, products of bf16 numbers are summed in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, by the name of the run."""
    folder = tmp_path_factory.mktemp("states")
    codes = run_all(WORLD, [*RUNS, *FAULTY], folder, timeout=300, program="states_worker.py")
    assert codes == [0] * WORLD, (folder / f"log-{WORLD}-0.txt").read_text()[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[dict[str, Tensor], list[float]]]:
    """Parameters and gradient norms of one process that trains on every batch, by optimizer."""
    return {name: train_plainly(name) for name in OPTIMIZERS}


def train_plainly(optimizer_name: str) -> tuple[dict[str, Tensor], list[float]]:
    model = build(recomputed=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer, norms = OPTIMIZERS[optimizer_name](groups), []
    for step in range(STEPS):
        for micro, rank in itertools.product(range(ACCUMULATION), range(WORLD)):
            torch.autograd.backward(loss_of(model, step, micro, rank, WORLD))
        for parameter in trained:  # what no batch uses has a gradient of zero, so that it decays as the others do
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(nn.utils.clip_grad_norm_(trained, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}, norms


def difference(found: dict[str, list[float]], expected: dict[str, Tensor]) -> float:
    pairs = [(torch.tensor(found[name]), value.double().flatten()) for name, value in expected.items()]
    return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("case", [each for each in RUNS if each["dtype"] == "float32"], ids=lambda each: each["name"])
def test_equals_one_process(case: dict[str, Any], results: Any, plain: Any) -> None:
    found, (parameters, norms) = results[0][case["name"]], plain[case["optimizer"]]
    assert found["norms"] == pytest.approx(norms, rel=1e-6)
    assert min(norms) > CLIP, "clipping acts in every step"
    assert difference(found["parameters"], parameters) < BOUNDS[case["optimizer"]]


class CastBlock(nn.Module):
    """A block that casts its inputs, as the engine does."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, scale: Tensor, uses: bool) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.block(x.bfloat16(), scale.bfloat16(), uses)
        return result


def train_in_bf16(sizes: tuple[int, ...], gradients: int) -> dict[str, Tensor]:
    """One process that computes with bf16 parameters, keeps fp32 ones, and adds gradients up in the engine's order."""
    model = build(recomputed=False)
    names = dict(model.named_parameters())
    master = {name: value.detach().clone() for name, value in names.items()}
    model.bfloat16()
    model.blocks = nn.ModuleList(CastBlock(block) for block in model.blocks)  # type: ignore[arg-type]
    trained = [name for name, value in names.items() if value.requires_grad]
    values = {name: nn.Parameter(master[name]) for name in trained}
    groups = [
        {"params": [values[name] for name in trained if values[name].ndim >= 2], "weight_decay": 0.1},
        {"params": [values[name] for name in trained if values[name].ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS["sgd"](groups)
    inner = next(level for level in range(len(sizes) + 1) if prod(sizes[:level]) == gradients)
    for step in range(STEPS):
        sums: list[dict[str, Tensor]] = []
        for micro in range(ACCUMULATION):
            each = [gradients_of(model, names, trained, step, micro, rank) for rank in range(WORLD)]
            each = add_up(each, sizes[:inner])
            sums = each if not sums else [add(one, other) for one, other in zip(each, sums, strict=True)]
        (total,) = add_up(sums, sizes[inner:])
        for name in trained:
            values[name].grad = total[name]
        optimizer.step()
        with torch.no_grad():
            for name in trained:
                names[name].copy_(values[name])
    return {name: value.detach() for name, value in names.items()}


def gradients_of(
    model: nn.Module, names: dict[str, nn.Parameter], trained: list[str], step: int, micro: int, rank: int
) -> dict[str, Tensor]:
    torch.autograd.backward(loss_of(model, step, micro, rank, WORLD))
    found = {}
    for name in trained:
        gradient = names[name].grad
        found[name] = torch.zeros_like(names[name]).float() if gradient is None else gradient.float()
        names[name].grad = None
    return found


def add(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one[name] + other[name] for name in one}


def add_up(each: list[dict[str, Tensor]], sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Sums over groups of neighbours, level by level; pairs only, whose order is no matter."""
    for size in sizes:
        assert size == 2
        each = [add(each[index], each[index + 1]) for index in range(0, len(each), 2)]
    return each


BF16 = [each for each in RUNS if each["dtype"] == "bfloat16" and tuple(each["sizes"]) == (2, 2)]


@pytest.mark.parametrize("case", BF16, ids=lambda each: each["name"])
def test_bf16_with_an_fp32_master_equals_one_process_to_the_bit(case: dict[str, Any], results: Any) -> None:
    expected = train_in_bf16(tuple(case["sizes"]), case["degrees"][1])
    assert difference(results[0][case["name"]]["parameters"], expected) == 0


def groups_of(layout: Chain) -> list[tuple[Bucket, ...]]:
    """The planner's buckets of the worker's model: each block's, and the root's."""
    model, groups = Model(), []
    blocks = [set(block.parameters()) for block in model.blocks]
    outside = set(model.parameters()) - set().union(*blocks)
    for members in (*blocks, outside):
        of_group = [
            Parameter(name=name, shape=tuple(value.shape), trainable=value.requires_grad, unit=-1)
            for name, value in model.named_parameters()
            if value in members
        ]
        groups.append(buckets(of_group, layout))
    assert len(groups) == BLOCKS + 1
    return groups


def layout_of(case: dict[str, Any]) -> Chain:
    """The planner's chain with the axes of the case's mesh."""
    p, g, o, second = case["degrees"]
    ends = [prod(case["sizes"][:level]) for level in range(len(case["sizes"]) + 1)]
    return Chain(tuple(case["sizes"]), ends.index(p), ends.index(g), ends.index(o), ends.index(second or p))


@pytest.mark.parametrize("case", RUNS, ids=lambda each: each["name"])
def test_bytes_at_rest_are_the_planners(case: dict[str, Any], results: Any) -> None:
    layout, element = layout_of(case), 4 if case["dtype"] == "float32" else 2
    every = [bucket for group in groups_of(layout) for bucket in group]
    trained = [bucket for bucket in every if bucket.trainable]
    moments = {"sgd": 1, "adamw": 2}[case["optimizer"]]
    for rank, found in enumerate(results):
        own = sum(sum(bucket.own(layout, rank)) for bucket in trained)
        slices = 4 * sum(bucket.padded // layout.degree(layout.optimizer_states) for bucket in trained)
        assert found[case["name"]]["at_rest"] == {
            "parameters": element * sum(bucket.padded // layout.degree(layout.parameters) for bucket in every),
            "gathered": 0,
            "master": 0 if element == 4 else slices,
            "gradients": slices,
            "optimizer_states": 4 * moments * own,
        }


@pytest.mark.parametrize("case", RUNS, ids=lambda each: each["name"])
def test_collectives_are_the_planners(case: dict[str, Any], results: Any) -> None:
    layout = layout_of(case)
    sends = step_sends(
        layout,
        groups_of(layout),
        element=4 if case["dtype"] == "float32" else 2,
        accumulation=ACCUMULATION,
        kept=not case["reshard"],
    )
    expected: dict[str, int] = {}
    for send, count in sends.items():
        key = f"{send.kind} {layout.sizes[send.axis]} {send.bytes}"
        expected[key] = expected.get(key, 0) + count
    for found in results:
        assert found[case["name"]]["calls"] == expected


def test_every_planted_fault_shows(results: Any, plain: Any) -> None:
    parameters, norms = plain["sgd"]
    for fault in FAULTS:
        found = results[0][fault]
        off = max(abs(one / other - 1) for one, other in zip(found["norms"], norms, strict=True))
        assert off > 1e-3, fault
        assert difference(found["parameters"], parameters) > 100 * BOUNDS["sgd"] or fault == "scale", fault


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_evaluation_gathers_and_releases(optimizer: str, results: Any) -> None:
    """Whatever the layout, a forward without backward finds the same held-out loss."""
    losses = [
        results[0][each["name"]]["evaluated"]
        for each in RUNS
        if each["dtype"] == "float32" and each["optimizer"] == optimizer
    ]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


@pytest.mark.parametrize("degrees", [(2, 1, 1), (1, 4, 2), (4, 4, 2)])
def test_states_wider_than_the_optimizers_are_refused(degrees: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least as wide"):
        chain(WORLD, *degrees)


def test_degrees_that_do_not_divide_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        chain(12, 2, 3, 6)
    assert chain(16, 2, 4, 8).sizes == (2, 2, 2, 2)
