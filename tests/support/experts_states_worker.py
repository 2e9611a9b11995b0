"""One of several processes that share the experts of a small model, and count what the planner predicts: bytes of the
storages at rest, and every collective of a step.

Started with the path of a JSON list of runs; each has `name`, `engine` (`fsdp2` or `amsp`), `ep`, `experts`,
`precision`, `accumulation`, `kept`, `checkpointed` and `frozen`; of fsdp2 `shard` and `gradient_degree`, of amsp `axes`
(fastest first) and `degrees` (parameters, gradients, optimizer states). Writes LIST-RANK.json beside that file: of
each run the parameters of the whole model, `at_rest`, and `collectives` as rows of kind, ranks of the group, bytes and
count.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shardwright.backends.pytorch.runtime.experts import Experts, divide_experts
from shardwright.backends.pytorch.runtime.shares import divided_gradient_norm, share_of
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates

WIDTH, HIDDEN, VOCABULARY, BLOCKS, CHOSEN, SEQUENCES, LENGTH = 6, 5, 13, 3, 2, 2, 6
COLLECTIVES = {
    "c10d._allgather_base_.default": ("all_gather", 0, 2),
    "c10d._reduce_scatter_base_.default": ("reduce_scatter", 1, 2),
    "c10d.allreduce_.default": ("all_reduce", 0, 1),
    "c10d.alltoall_base_.default": ("all_to_all", 1, 2),
}
"""Kind, and the position of the argument that holds the whole tensor, and of the group."""


class Stack(nn.Module):
    """Experts: each row goes through the matrices of one."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.up = nn.Parameter(torch.randn(experts, HIDDEN, WIDTH))
        self.gain = nn.Parameter(torch.randn(experts, HIDDEN))
        self.down = nn.Parameter(torch.randn(experts, WIDTH, HIDDEN))

    def forward(self, tokens: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(tokens)
        for expert in range(self.num_experts):
            row, choice = torch.where(indices == expert)
            hidden = torch.tanh(tokens[row] @ self.up[expert].T) * self.gain[expert]
            result = result.index_add(0, row, hidden @ self.down[expert].T * weights[row, choice, None])
        return result


class Block(nn.Module):
    """A layer with a router whose choices do not depend on its values: each expert gets as many tokens."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts = Stack(experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.tanh(self.mix(self.norm(x))).flatten(0, 1)
        first = torch.arange(len(tokens)) % self.experts_in_all
        indices = torch.stack([first, (first + 1) % self.experts_in_all], 1)
        weights = self.router(tokens).softmax(-1).gather(1, indices)
        return x + self.experts(tokens, indices, weights).view_as(x)

    @property
    def experts_in_all(self) -> int:
        return self.router.out_features


class Model(nn.Module):
    def __init__(self, experts: int, frozen: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(experts) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if frozen:
            for parameter in (self.blocks[1].experts.down, self.blocks[1].mix.weight):
                parameter.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


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
            ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(args[group])))
            self.calls[kind, ranks, tensor.numel() * tensor.element_size()] += 1
        elif "c10d" in str(function) and "wait" not in str(function):
            raise AssertionError(f"an unexpected collective: {function}")
        return function(*args, **(kwargs or {}))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in local}.values())


def mesh_of(sizes: Iterable[int], names: Iterable[str]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes), mesh_dim_names=tuple(names))


class Trainee:
    """A model under an engine."""

    def __init__(self, run: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.run, self.world = run, dist.get_world_size()
        self.model = Model(run["experts"], run["frozen"])
        self.parameters = [
            {"name": name, "shape": list(each.shape), "trainable": each.requires_grad}
            for name, each in self.model.named_parameters()
        ]
        self.experts = divide_experts(
            self.model, {"blocks.*.experts": ("num_experts",)}, mesh_of((self.world // run["ep"], run["ep"]), "re")["e"]
        )
        for block in list(self.model.blocks)[: run["checkpointed"]]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self.dtype = torch.bfloat16 if run["precision"] == "bf16_mixed" else torch.float32
        self.states = amsp(self.model, self.experts, run, self.dtype) if run["engine"] == "amsp" else None
        if self.states is None:
            fsdp2(self.model, self.experts, run, self.dtype)
            trained: Any = [each for each in self.model.parameters() if each.requires_grad]
            self.optimizer = torch.optim.AdamW(of_one_mesh(trained), fused=True)
        else:
            self.optimizer = torch.optim.AdamW(self.states.parameter_groups([{}, {"weight_decay": 0.0}]), fused=True)

    def step(self) -> None:
        for micro in range(self.run["accumulation"]):
            last = micro == self.run["accumulation"] - 1
            if self.states is None and self.run["accumulation"] > 1:
                self._tell(last)
            ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
            loss = F.cross_entropy(self.model(ids).float().flatten(0, 1), ids.flatten())
            if self.states is None:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                self.states.backward(loss, last=last)
        norm = divided_gradient_norm(self.model, 1) if self.states is None else self.states.gradient_norm()
        assert norm.isfinite()
        self.optimizer.step()

    def _tell(self, last: bool) -> None:
        """fully_shard what to do with the gradients of a micro-batch."""
        model: Any = self.model
        if self.run["gradient_degree"] < self.run["shard"]:
            model.set_requires_gradient_sync(last)
        model.set_requires_all_reduce(last)
        if self.run["kept"]:
            model.set_reshard_after_backward(last)
        model.set_is_last_backward(last)

    def done(self) -> None:
        self.optimizer.zero_grad()
        if self.states is not None:
            self.states.publish()

    def at_rest(self) -> dict[str, int]:
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        if self.states is None:
            trained = [each for each in self.model.parameters() if each.requires_grad]
            return {
                "parameters": storage_bytes(self.model.parameters()),
                "gradients": storage_bytes(each.grad for each in trained if each.grad is not None),
                "optimizer_states": storage_bytes(values),
            }
        buckets = [bucket for unit in self.states.units for bucket in unit]
        master = 0 if self.dtype == torch.float32 else storage_bytes(bucket.master for bucket in buckets)
        return {
            "parameters": storage_bytes(bucket.shard for bucket in buckets),
            "gradients": storage_bytes(each.grad for each in self.states.parameters() if each.grad is not None),
            "optimizer_states": master + storage_bytes(values),
        }


def of_one_mesh(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """One kernel for all parameters takes no mixed meshes."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for each in parameters:
        groups.setdefault(each.device_mesh if isinstance(each, DTensor) else None, []).append(each)
    return [{"params": group} for group in groups.values()]


def fsdp2(model: Model, experts: Experts, run: dict[str, Any], dtype: torch.dtype) -> None:
    data, ep, shard = dist.get_world_size(), run["ep"], run["shard"]
    own = max(1, shard // ep)
    dense = mesh_of((data // shard, shard), ("dp_replicate", "dp_shard"))
    mesh = dense if data > shard else dense["dp_shard"]
    beyond = mesh_of((data // ep // own, own, ep), ("expert_replicate", "expert_shard", "ep"))
    names = ("expert_replicate", "expert_shard") if data // ep > own else ("expert_shard",)
    policies = [{}, {}]
    if dtype == torch.bfloat16:
        policies = [{"mp_policy": MixedPrecisionPolicy(dtype, torch.float32, None, cast)} for cast in (True, False)]
    for block in model.blocks:
        for layer in experts.inside(block):
            fully_shard(layer, mesh=beyond[names], reshard_after_forward=not run["kept"], **policies[1])
        fully_shard(block, mesh=mesh, reshard_after_forward=not run["kept"], **policies[0])
    fully_shard(model, mesh=mesh, reshard_after_forward=False, **policies[0])


def amsp(model: Model, experts: Experts, run: dict[str, Any], dtype: torch.dtype) -> ShardedStates:
    axes, degrees = run["axes"], run["degrees"]
    names = [f"dp_{index}" for index in range(len(axes), 0, -1)]
    mesh, width = mesh_of(reversed(axes), names), 1
    levels = Levels(mesh, **dict(zip(("parameters", "gradients", "optimizer_states"), degrees, strict=True)))
    while width < run["ep"]:
        width *= mesh[names.pop()].size()
    p, g, o = (max(1, degree // run["ep"]) for degree in degrees)
    own = Levels(mesh[tuple(names)] if names else None, parameters=p, gradients=g, optimizer_states=o)
    states = ShardedStates(
        levels,
        dtype,
        reshard_after_forward=not run["kept"],
        experts=own,
        is_expert=experts.has,
        share_of=share_of(model, 1),
    )
    for block in model.blocks:
        states.shard(block)
    states.shard(model, root=True)
    return states


def train(run: dict[str, Any]) -> dict[str, Any]:
    trainee = Trainee(run)
    trainee.step()
    trainee.done()
    with Counting() as counting:
        trainee.step()
        at_rest = trainee.at_rest()
        trainee.done()
    return {"parameters": trainee.parameters, "at_rest": at_rest, "collectives": rows(counting.calls)}


def rows(calls: Counter[tuple[str, tuple[int, ...], int]]) -> list[Any]:
    return [[kind, list(ranks), size, count] for (kind, ranks, size), count in calls.items()]


def main() -> None:
    listed = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for each in json.loads(listed.read_text()):
        try:
            results[each["name"]] = train(each)
        except Exception as error:
            error.add_note(f"in run {each['name']}")
            raise
    listed.with_name(f"{listed.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
