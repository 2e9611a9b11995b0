"""One process of a launch that trains small models with plain torch and counts what the planner predicts: bytes of the
storages at rest, and every collective of a step. Imports nothing of shardwright.

    torchrun --nproc-per-node 4 worker.py CASES.json FOLDER

writes FOLDER/RANK.json: for every case its parameters and blocks, `at_rest`, and `collectives` as rows of kind, ranks
of the group, bytes of the whole tensor and count.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

WIDTH, VOCABULARY, BLOCKS, STEPS = 10, 13, 3, 2

# Overload name, kind, and the position of the argument that holds the whole tensor and of the group.
COLLECTIVES = {
    "c10d._allgather_base_.default": ("all_gather", 0, 2),
    "c10d._reduce_scatter_base_.default": ("reduce_scatter", 1, 2),
    "c10d.allreduce_.default": ("all_reduce", 0, 1),
    "_c10d_functional.all_reduce.default": ("all_reduce", 0, 2),
}


class Awkward(nn.Module):
    """Sizes that nothing divides, parameters with fewer rows than there are shards, on request ties and frozen ones."""

    def __init__(self, tied: bool, frozen: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        if frozen:
            self.blocks[1].up.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH + 1)
        self.down = nn.Linear(2 * WIDTH + 1, WIDTH)
        self.gain = nn.Parameter(torch.ones(2))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)))) * self.gain.prod() * self.scale


class Chain(nn.Module):
    """Gradients become ready in exactly the reverse order of registration."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, tuple[int, ...], int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # let it desugar into collectives first, which are then seen
        if str(function) in COLLECTIVES:
            kind, whole, group = COLLECTIVES[str(function)]
            tensor = args[whole][0] if isinstance(args[whole], list) else args[whole]
            self.calls[kind, ranks_of(args[group]), tensor.numel() * tensor.element_size()] += 1
        elif "c10d" in str(function) and "wait" not in str(function) and "autograd" not in str(function):
            raise AssertionError(f"an unexpected collective: {function}")
        return function(*args, **(kwargs or {}))


def ranks_of(group: Any) -> tuple[int, ...]:
    resolved = dist.distributed_c10d._resolve_process_group(group) if isinstance(group, str) else group
    resolved = resolved if isinstance(resolved, dist.ProcessGroup) else dist.ProcessGroup.unbox(resolved)
    return tuple(dist.get_process_group_ranks(resolved))


def storage_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages behind the tensors."""
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storages[local.untyped_storage()._cdata] = local.untyped_storage().nbytes()
    return sum(storages.values())


def shard(model: nn.Module, case: dict[str, Any]) -> nn.Module:
    if case["engine"] == "single":
        return model
    if case["engine"] == "ddp":
        cap = case["bucket_cap_bytes"] / 2**20
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False, bucket_cap_mb=cap)
    names = ("dp_replicate", "dp_shard")
    if case["world"] == 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=names)["dp_shard"]
    elif case["shard"] == case["world"]:
        mesh = init_device_mesh("cpu", (case["shard"],), mesh_dim_names=names[1:])
    else:
        mesh = init_device_mesh("cpu", (case["world"] // case["shard"], case["shard"]), mesh_dim_names=names)
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = mixed if case["precision"] == "bf16_mixed" else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=case["second"] or not case["kept"])
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def optimizer_for(parameters: list[nn.Parameter], case: dict[str, Any]) -> torch.optim.Optimizer:
    if case["optimizer"] == "adamw":
        return torch.optim.AdamW(parameters, fused=True)
    momentum = 0.9 if case["optimizer"] == "sgd momentum" else 0.0
    implementation = {"foreach": True} if case["engine"] == "fsdp2" else {"fused": True}
    return torch.optim.SGD(parameters, lr=0.1, momentum=momentum, weight_decay=0.1, **implementation)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, case: dict[str, Any]) -> None:
    if case["world"] > 1:
        dist.all_reduce(torch.ones(3, dtype=torch.float64))
    for micro in range(case["accumulation"]):
        last = micro == case["accumulation"] - 1
        context: Any = contextlib.nullcontext()
        if case["engine"] == "ddp" and not last:
            context = model.no_sync()
        if case["engine"] == "fsdp2" and case["accumulation"] > 1:
            if case["gradient_degree"] < case["shard"]:
                model.set_requires_gradient_sync(last)
            elif case["world"] > case["shard"]:
                model.set_requires_all_reduce(last)
            if case["kept"]:
                model.set_reshard_after_backward(last)
            model.set_is_last_backward(last)
        with context:
            ids = torch.randint(VOCABULARY, (2, 5))
            F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten(), reduction="sum").backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    optimizer.step()
    for parameter in parameters if case["ema"] is not None else ():
        state = optimizer.state[parameter]
        if "average" not in state:
            state["average"] = parameter.detach().clone()
        state["average"].lerp_(parameter.detach(), 1 - case["ema"])
    if case["world"] > 1:
        dist.all_reduce(torch.ones(1, dtype=torch.float64))


def run(case: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Chain() if case["model"] == "chain" else Awkward(case["model"] == "tied", case["model"] == "frozen")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    described = [
        {
            "name": name,
            "shape": list(parameter.shape),
            "trainable": parameter.requires_grad,
            "also": [other for other in names[id(parameter)] if other != name],
        }
        for name, parameter in model.named_parameters()
    ]
    for block in model.blocks[: case["checkpointed"]]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    model = shard(model, case)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_for(trained, case)
    for _ in range(STEPS):  # DistributedDataParallel agrees on its buckets in the second
        train_step(model, optimizer, case)
        optimizer.zero_grad()
    with Counting() as counting:
        train_step(model, optimizer, case)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {
        "parameters": described,
        "blocks": [f"blocks.{index}" for index in range(BLOCKS)],
        "at_rest": {
            "parameters": storage_bytes(model.parameters()),
            "gradients": storage_bytes(parameter.grad for parameter in trained),
            "optimizer_states": storage_bytes(states),
        },
        "collectives": [[kind, list(ranks), size, count] for (kind, ranks, size), count in counting.calls.items()],
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = {name: run(case) for name, case in cases.items()}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
