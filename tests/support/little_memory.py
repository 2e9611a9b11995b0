"""One of 64 processes that load a model, played by one, with room for less than a 32nd of the model.

Started with a folder to put the model's weights into, 1 GiB, nearly all of it holes in the file, and the engine, fsdp2
or amsp. Prints as JSON how many bytes it read, and the first element of its shard of each tensor.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardwright.backends.pytorch.runtime.held import STOCK, Holder
from shardwright.backends.pytorch.runtime.held_flat import FlatHolder
from shardwright.backends.pytorch.runtime.initialize import allocate
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates
from shardwright.backends.pytorch.runtime.tensorfile import TensorFile
from shardwright.backends.pytorch.runtime.weights import load_weights

WORLD, RANK, LAYERS, WIDTH = 64, 37, 16, 4096
ROOM = {"fsdp2": 40 * 2**20, "amsp": (40 + 2 * 64) * 2**20}
"""Its share is 16 MiB; one whole tensor is 64 MiB."""


def flat_buckets(model: nn.Sequential, mesh: DeviceMesh) -> Holder:
    levels = Levels(mesh, parameters=WORLD, gradients=WORLD, optimizer_states=WORLD)
    states = ShardedStates(levels, torch.float32)
    for layer in model:
        allocate(layer, torch.device("cpu"))
        states.shard(layer)
    states.shard(model, root=True)
    return FlatHolder(states)


def main(folder: Path, engine: str) -> None:
    write_weights(folder)
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("dp_1",))
    for module in (*model, model) if engine == "fsdp2" else ():
        fully_shard(module, mesh=mesh)

    counted = 0
    rows = TensorFile.rows

    def counting(*arguments: Any) -> torch.Tensor:
        nonlocal counted
        tensor = rows(*arguments)
        counted += tensor.nbytes
        return tensor

    TensorFile.rows = counting  # type: ignore[method-assign]
    status = Path("/proc/self/status").read_text()
    used = int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) * 1024
    limit = used + ROOM[engine]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    holder = STOCK if engine == "fsdp2" else flat_buckets(model, mesh)
    allocate(model, torch.device("cpu"))
    load_weights(model, folder, holder=holder)
    firsts = [float(holder.held(parameter).parts[0][1][0, 0]) for parameter in model.parameters()]
    try:
        torch.ones(ROOM[engine] // 4 - WIDTH * WIDTH // 8)
        limited = False
    except RuntimeError:
        limited = True
    print(json.dumps({"read": counted, "firsts": firsts, "limited": limited}))


def write_weights(folder: Path) -> None:
    """The file: zeros, but for the first element of each row, which says which tensor and row it is."""
    size = WIDTH * WIDTH * 4
    header = {
        f"{layer}.weight": {"dtype": "F32", "shape": [WIDTH, WIDTH], "data_offsets": [layer * size, (layer + 1) * size]}
        for layer in range(LAYERS)
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        data = file.tell()
        os.truncate(file.fileno(), data + LAYERS * size)
        for layer in range(LAYERS):
            row = RANK * WIDTH // WORLD
            file.seek(data + layer * size + row * WIDTH * 4)
            file.write(struct.pack("<f", layer * 10000 + row))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
