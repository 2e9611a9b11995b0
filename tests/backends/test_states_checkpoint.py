"""Checkpoints of `ShardedStates`: what one layout and number of processes saved, any other resumes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.launch import parameters_of, read_checkpoint, run_forked
from support.states_checkpoint_model import (
    END,
    ROWS,
    Model,
    groups_of,
    initial_model,
    make_optimizer,
    row_loss,
)
from torch import Tensor

from shardwright.backends.pytorch.runtime.export import export_model
from shardwright.backends.pytorch.runtime.weights import load_weights

pytestmark = [pytest.mark.processes, pytest.mark.slow]

WORLDS = (1, 2, 4, 8)
BOUNDS = {"sgd": 2e-6, "adamw": 1e-5, "bf16": 1e-3}
"""Largest difference of a value after the last steps, by the order of sums alone; parameters move by 5e-3 to 5e-2 in
them. AdamW divides small gradients by their own size; in bf16, a sum may round to the other side."""
FAR = 1e-2
"""What bf16 learns is not what fp32 learns."""


def layout(world: int, sizes: str, degrees: str = "", **changes: Any) -> dict[str, Any]:
    """`sizes` of the mesh, fastest first; `degrees` of parameters, gradients, optimizer states and second copy."""
    numbers = [int(each) for each in degrees.split(",") if each]
    fields = {
        "engine": "amsp",
        "world": world,
        "sizes": [int(each) for each in sizes.split("x")],
        "degrees": [*numbers, *[None] * (4 - len(numbers))],
        "optimizer": "adamw",
        "dtype": "float32",
        **changes,
    }
    name = [fields["engine"], sizes, f"({degrees})" if degrees else "", fields["optimizer"], fields["dtype"]]
    return {"name": " ".join(filter(None, name)), **fields}


BF16, SGD = {"dtype": "bfloat16"}, {"optimizer": "sgd"}
LAYOUTS = [
    layout(1, "1", "1,1,1"),
    layout(1, "1", "1,1,1", **BF16),
    layout(1, "1", engine="ddp"),
    layout(2, "2", "1,2,2"),
    layout(2, "2", "2,1,2", **SGD),
    layout(2, "2", engine="fsdp2", **SGD),
    layout(4, "4", "1,1,1"),
    layout(4, "4", "1,1,4"),
    layout(4, "2x2", "2,2,4"),
    layout(4, "4", "4,1,4"),
    layout(4, "2x2", "4,4,4,2"),
    layout(4, "2x2", "1,1,2"),
    layout(4, "2x2", "2,4,4", **SGD),
    layout(4, "2x2", "2,2,4", **BF16),
    layout(4, "4", engine="fsdp2"),
    layout(4, "2x2", engine="fsdp2", **BF16),
    layout(4, "4", engine="ddp", **SGD),
    layout(8, "2x2x2", "2,4,8"),
    layout(8, "8", "8,8,8", **BF16),
    layout(8, "2x4", "1,2,8", **SGD),
]
"""Saved once each, and each loads all that were saved with its optimizer."""
NAMED = {each["name"]: each for each in LAYOUTS}
AMSP = [each["name"] for each in LAYOUTS if each["engine"] == "amsp"]


def loads(into: dict[str, Any]) -> list[str]:
    return [name for name, saved in NAMED.items() if saved["optimizer"] == into["optimizer"]]


def goes_on(into: dict[str, Any]) -> list[str]:
    """Itself and, of the others with its width of numbers, those that no other layout of its world goes on with."""
    alike = [each for each in LAYOUTS if all(each[key] == into[key] for key in ("world", "optimizer", "dtype"))]
    others = [name for name in loads(into) if NAMED[name]["dtype"] == into["dtype"]]
    return sorted({into["name"], *others[alike.index(into) :: len(alike)]})


LOADED = [(into["name"], name) for into in LAYOUTS for name in loads(into)]
GOES_ON = [(into["name"], name) for into in LAYOUTS for name in goes_on(into)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what all launches left: first every layout saves, then every one loads."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "weights").mkdir()
    save_file(initial_weights(), folder / "weights" / "model.safetensors")
    launches: list[tuple[int, list[dict[str, Any]]]] = []
    for world in WORLDS:
        saved = [each for each in LAYOUTS if each["world"] == world]
        jobs = [{"task": "save", "layout": each} for each in saved]
        jobs += [{"task": "weights", "layout": each} for each in saved if each["name"] in AMSP]
        launches.append((world, jobs))
    for world in WORLDS:
        into = [each for each in LAYOUTS if each["world"] == world]
        fields = [{"from": loads(each), "goes_on": goes_on(each), "again": again_from(each)} for each in into]
        jobs = [{"task": "load", "layout": each, **more} for each, more in zip(into, fields, strict=True)]
        launches.append((world, jobs))
    run_forked(launches, folder, (), program="states_checkpoint_worker")
    return folder


def again_from(into: dict[str, Any]) -> str:
    """A layout whose checkpoint it saves again as it is: another one."""
    return next(name for name in reversed(loads(into)) if name != into["name"])


@pytest.fixture(scope="module")
def found(root: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What every process found, by task and layout."""
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(root.glob("found-*.json")):
        for job in json.loads(path.read_text()):
            results.setdefault((job["task"], job["name"]), []).append(job["found"])
    return results


def initial_weights() -> dict[str, Tensor]:
    """Other ones than the model begins with; the head's are those of the embedding."""
    torch.manual_seed(1)
    return {
        name: torch.randn_like(value) for name, value in initial_model().state_dict().items() if name != "head.weight"
    }


def test_every_layout_begins_with_the_same_values(found: Any) -> None:
    assert {name: [each["start"] for each in found["save", name]] for name in NAMED} == {
        name: [0.0] * layout["world"] for name, layout in NAMED.items()
    }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_saved_is_what_one_process_learns(root: Path, optimizer: str) -> None:
    model = initial_model()
    states = make_optimizer(optimizer, groups_of(model))
    for step, row in itertools.product(range(END), range(ROWS)):
        torch.autograd.backward(row_loss(model, step, row))
        if row == ROWS - 1:
            states.step()
            states.zero_grad()
    for name in (each for each, layout in NAMED.items() if layout["optimizer"] == optimizer):
        saved = read_checkpoint(root / name / "end")
        parameters = parameters_of(saved)
        assert parameters.keys() == dict(model.named_parameters()).keys()
        bound = BOUNDS[optimizer] if NAMED[name]["dtype"] == "float32" else FAR
        for key, value in model.named_parameters():
            assert parameters[key].dtype == torch.float32
            assert float((parameters[key] - value.detach()).abs().max()) < bound, (name, key)
            if not value.requires_grad:
                assert torch.equal(parameters[key], value), "frozen values are not rounded"
        assert torch.equal(saved["buffer.seen"], torch.full((3,), float(END)))


def test_all_layouts_save_the_same_tensors(root: Path) -> None:
    """Names, shapes and dtypes; no state of frozen or tied parameters."""
    for optimizer, states in (("adamw", ("exp_avg", "exp_avg_sq", "step")), ("sgd", ("momentum_buffer",))):
        model = dict(Model().named_parameters())
        expected = {f"model.{name}" for name in model} | {"buffer.seen"}
        expected |= {
            f"optimizer.{state}.{name}" for name, value in model.items() if value.requires_grad for state in states
        }
        for name in (each for each, layout in NAMED.items() if layout["optimizer"] == optimizer):
            assert read_checkpoint(root / name / "at").keys() == expected, name


@pytest.mark.parametrize(("into", "name"), LOADED, ids=lambda name: name)
def test_what_is_loaded_is_what_was_saved(into: str, name: str, found: Any) -> None:
    results = [each[name] for each in found["load", into]]
    assert [each["loaded"] for each in results] == [0.0] * NAMED[into]["world"]
    assert all(each["computes"] for each in results)


@pytest.mark.parametrize(("into", "name"), GOES_ON, ids=lambda name: name)
def test_training_goes_on_as_if_it_had_not_been_interrupted(into: str, name: str, found: Any) -> None:
    ends = [each[name]["end"] for each in found["load", into]]
    if into == name:
        assert max(ends) == 0.0
    else:
        assert max(ends) < BOUNDS["bf16" if NAMED[into]["dtype"] == "bfloat16" else NAMED[into]["optimizer"]]


@pytest.mark.parametrize("into", NAMED)
def test_a_checkpoint_saved_again_is_the_same(into: str, root: Path) -> None:
    copied, first = read_checkpoint(root / f"{into}, copied"), read_checkpoint(root / again_from(NAMED[into]) / "at")
    assert copied.keys() == first.keys()
    assert all(torch.equal(copied[name], first[name]) for name in first)


@pytest.mark.parametrize("name", AMSP)
def test_weights_are_loaded_by_whom_they_belong_to(name: str, found: Any) -> None:
    for result in found["weights", name]:
        assert result["loaded"] == 0.0
        assert result["computes"]
        assert result["read"] == result["own"], "nobody reads what another process holds"


@pytest.mark.parametrize("name", AMSP)
def test_the_exported_model_is_the_saved_one(name: str, root: Path, tmp_path: Path) -> None:
    export_model(root / name / "end", tmp_path / "exported", dtype=torch.float32)
    model = Model()
    load_weights(model, tmp_path / "exported")
    saved = parameters_of(read_checkpoint(root / name / "end"))
    assert all(torch.equal(value, saved[key]) for key, value in model.named_parameters())
    assert torch.equal(model.get_buffer("seen"), torch.full((3,), float(END)))
