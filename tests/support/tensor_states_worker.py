"""One of four processes that initialise, save and load small models under several ways of tensor parallelism.

Started with the path of a JSON list of runs, of which one: `folder`. Checkpoints go below the folder; LIST-RANK.json
says what else was found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tensor_models import CASES, batch, whole
from tensor_worker import ENGINES, OPTIMIZERS, assemble, divide
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwright.backends.pytorch.runtime.checkpoint import Checkpoints, TrainState
from shardwright.backends.pytorch.runtime.divided_holder import DividedHolder
from shardwright.backends.pytorch.runtime.held import STOCK
from shardwright.backends.pytorch.runtime.held_flat import FlatHolder
from shardwright.backends.pytorch.runtime.initialize import allocate, initialize, parameters_on_meta
from shardwright.backends.pytorch.runtime.tensorfile import TensorFile
from shardwright.backends.pytorch.runtime.weights import load_weights

STATE = TrainState(step=1, tokens=1, seed=3)
LAYOUTS = (
    ("tp2-fsdp2", 2, "fsdp2"),
    ("tp2-amsp", 2, "amsp"),
    ("tp4", 4, "none"),
    ("tp2", 2, "none"),
    ("tp1-fsdp2", 1, "fsdp2"),
    ("tp1-amsp", 1, "amsp"),
    ("again", 2, "fsdp2"),
)
"""Each loads what the one before saved, and saves it again."""


def mesh_of(tensor: int) -> DeviceMesh:
    """Of all processes, so many of which share a layer."""
    return init_device_mesh("cpu", (dist.get_world_size() // tensor, tensor), mesh_dim_names=("data", "tp"))


def resave(name: str, case: str, folder: Path, before: Path | None, tensor: int, engine_name: str) -> None:
    """Loads a checkpoint, or takes a step without one, and saves."""
    mesh, each = mesh_of(tensor), CASES[case]
    model = whole(case)
    if before is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    if tensor > 1:
        divide(model, each, mesh["tp"])
    engine: Any = ENGINES[engine_name](model, mesh, each)
    optimizer = OPTIMIZERS["adamw"](engine.parameters)
    inner = FlatHolder(engine.states) if engine_name == "amsp" else STOCK
    holder = DividedHolder(model, inner, mesh["tp"]) if tensor > 1 else inner
    if before is None:
        engine.backward(each.loss(model, *batch(0, mesh["data"].get_local_rank())), None)
        optimizer.step()
        engine.published()
    else:
        read = Checkpoints(before, keep=1, holder=holder).load(model, optimizer, STATE.seed)
        assert read is not None
        assert read.step == STATE.step
        with engine.gathered():
            values, differ = assemble(model)
        assert differ == 0
        assert all(bool(value.any()) for value in values.values())
    Checkpoints(folder / name, keep=1, holder=holder).save(STATE, model, optimizer)


def initialised(case: str, tensor: int) -> nn.Module:
    """From meta, one block after another."""
    with parameters_on_meta():
        model = CASES[case].build()
    mesh = mesh_of(tensor)
    if tensor > 1:
        divide(model, CASES[case], mesh["tp"])
    for number, _ in enumerate(model.get_submodule(CASES[case].blocks).children()):
        initialize(model, f"{CASES[case].blocks}.{number}", seed=3, device=torch.device("cpu"))
    initialize(model, "", seed=3, device=torch.device("cpu"))
    return model


def loaded(case: str, tensor: int, folder: Path) -> tuple[dict[str, Tensor], int, int]:
    """Weights of a folder: the whole parameters, and how many elements this process read and has."""
    with parameters_on_meta():
        model = CASES[case].build()
    mesh, count, part = mesh_of(tensor), 0, TensorFile.part
    divide(model, CASES[case], mesh["tp"])
    allocate(model, torch.device("cpu"))

    def counting(self: TensorFile, *args: Any) -> Tensor:
        nonlocal count
        values = part(self, *args)
        count += values.numel()
        return values

    with patch.object(TensorFile, "part", counting):
        load_weights(model, folder, holder=DividedHolder(model, STOCK, mesh["tp"]))
    return assemble(model)[0], count, sum(each.numel() for each in model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    spec = Path(sys.argv[1])
    folder = Path(json.loads(spec.read_text())[0]["folder"])
    results: dict[str, Any] = {"initialised": [], "loaded": [], "read": []}
    for case in ("gpt2", "mixtral"):
        before = None
        for name, tensor, engine in LAYOUTS:
            resave(name, case, folder / case, before, tensor, engine)
            before = folder / case / name
    for case in ("gpt2", "llama", "mixtral", "t5"):
        one = {name: each.detach() for name, each in initialised(case, 1).named_parameters()}
        several = assemble(initialised(case, 4))[0]
        equal = one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)
        results["initialised"].append(equal)
    values = {name: value.detach() for name, value in whole("llama").named_parameters()}
    if dist.get_rank() == 0:
        save_file(values, folder / "model.safetensors")
    dist.barrier()
    found, read, own = loaded("llama", 4, folder)
    results["loaded"] = all(torch.equal(found[name], values[name]) for name in values)
    results["read"] = read == own
    spec.with_name(f"{spec.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
