"""One of several processes that train a small model with `ShardedStates` under many layouts, one after another.

Started with the usual variables and the path of a JSON list of runs; each has `name`, `sizes` (of
the mesh's axes, fastest first), `degrees` (parameters, gradients, optimizer states, second copy or null), `optimizer`,
`dtype`, `reshard`, `recomputed`, and optionally a `fault`. Writes RANK.json beside that file: of each run the gradient
norms, the bytes of every state at rest, the collectives of the last step and, from rank 0, the parameters.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates

STEPS, ACCUMULATION, CLIP, WIDTH, VOCABULARY, BLOCKS = 4, 2, 0.5, 16, 50, 3
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
}


class Block(nn.Module):
    """A residual MLP with several inputs and two outputs; `frozen` is not trained, `seldom` is used by some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH), requires_grad=False)
        self.seldom = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, scale: Tensor, uses: bool) -> tuple[Tensor, Tensor]:
        if uses:
            x = x * self.seldom.mean()
        return x + self.down(F.gelu(self.up(self.norm(x)))) * self.frozen * scale, scale


class Model(nn.Module):
    """Embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, uses: bool) -> Tensor:
        x, scale = self.embed(tokens), torch.ones(WIDTH)
        for block in self.blocks:
            x, scale = block(x, scale, uses)
        result: Tensor = self.head(self.norm(x))
        return result


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor, bool]:
    """Tokens, targets, and whether `seldom` is used: by every other process, in turn."""
    generator = torch.Generator().manual_seed(step * 1000 + micro * 100 + rank)
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], (rank + step) % 2 == 0


def loss_of(model: nn.Module, step: int, micro: int, rank: int, world: int) -> Tensor:
    """This process's share of the mean over the global batch."""
    tokens, targets, uses = batch(step, micro, rank)
    logits = model(tokens, uses)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / (ACCUMULATION * world)


def build(recomputed: bool) -> Model:
    """The same weights in every process."""
    torch.manual_seed(0)
    model = Model()
    for block in model.blocks if recomputed else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return model


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Collectives by kind, size of the group and bytes of the whole tensor."""
    calls: Counter[str] = Counter()
    kinds = {"all_gather_single": 0, "reduce_scatter_single": 1, "all_reduce": 0}
    before = {kind: getattr(dist, kind) for kind in kinds}

    def wrap(kind: str, at: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            size = args[at].numel() * args[at].element_size()
            calls[f"{kind.removesuffix('_single')} {dist.get_world_size(kwargs['group'])} {size}"] += 1
            return before[kind](*args, **kwargs)

        return call

    for kind, at in kinds.items():
        setattr(dist, kind, wrap(kind, at))
    try:
        yield calls
    finally:
        for kind, function in before.items():
            setattr(dist, kind, function)


def at_rest(states: ShardedStates, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the distinct storages of each state, after the optimizer's step and before gradients are dropped."""

    def total(tensors: list[Tensor]) -> int:
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

    buckets = [bucket for unit in states.units for bucket in unit]
    runs = [run.parameter for bucket in buckets if bucket.trainable for run in bucket.runs]
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    whole = total([bucket.whole for bucket in buckets])
    return {
        "parameters": total([bucket.shard for bucket in buckets]),
        "gathered": whole if states.levels.parameters else 0,
        "master": total(runs) if states.dtype != torch.float32 else 0,
        "gradients": total([run.grad for run in runs if run.grad is not None]),
        "optimizer_states": total([value for value in values if value.dim()]),
    }


def train(run: dict[str, Any], mesh: Any) -> dict[str, Any]:
    """Trains under one layout."""
    rank, world, fault = dist.get_rank(), dist.get_world_size(), run.get("fault")
    model = build(run["recomputed"])
    p, g, o, second = run["degrees"]
    levels = Levels(mesh, parameters=p, gradients=g, optimizer_states=o, secondary=second)
    states = ShardedStates(levels, getattr(torch, run["dtype"]), reshard_after_forward=run["reshard"])
    for block in model.blocks:
        states.shard(block)
    states.shard(model, root=True)
    optimizer = OPTIMIZERS[run["optimizer"]](states.parameter_groups(0.1))
    norms, sizes = [], {}
    with counted() as calls:
        for step in range(STEPS):
            calls.clear()
            for micro in range(ACCUMULATION):
                loss = loss_of(model, step, micro, rank, world) * (2.0 if fault == "scale" else 1.0)
                if fault == "lost micro-batch" and micro == 0 and rank == 0:
                    loss = loss * 0.0
                states.backward(loss, last=micro == ACCUMULATION - 1)
            norm = states.gradient_norm()
            norms.append(float(norm))
            if run["clips"]:
                torch.nn.utils.clip_grads_with_norm_(states.parameters(), CLIP, norm)
            optimizer.step()
            sizes = at_rest(states, optimizer)
            if fault == "stale bucket" and step == 1:
                stale, publish = states.units[1][0], states.units[1][0].publish
                stale.publish = lambda: None  # type: ignore[method-assign]
            states.publish()
            if fault == "stale bucket" and step == 1:
                stale.publish = publish  # type: ignore[method-assign]
    with torch.no_grad():
        evaluated = float(loss_of(model, 99, 0, 0, 1))
    with states.gathered():
        parameters = {name: value.detach().double().flatten().tolist() for name, value in model.named_parameters()}
    result = {"norms": norms, "at_rest": sizes, "calls": dict(calls), "evaluated": evaluated}
    return result | {"parameters": parameters if rank == 0 else {}}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    runs = json.loads(Path(sys.argv[1]).read_text())
    meshes: dict[tuple[int, ...], Any] = {}
    results = {}
    for run in runs:
        sizes = tuple(run["sizes"])
        if sizes not in meshes:
            names = tuple(f"dp_{index}" for index in range(len(sizes), 0, -1))
            meshes[sizes] = init_device_mesh("cpu", tuple(reversed(sizes)), mesh_dim_names=names)
        results[run["name"]] = train(run, meshes[sizes])
    Path(sys.argv[1]).with_name(f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.2)


if __name__ == "__main__":
    main()
