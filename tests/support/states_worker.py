"""One of several processes that train small models with `ShardedStates` under many layouts, one after another.

Started with the path of a JSON list of runs; each has `name`, `sizes` (of the mesh's axes, fastest first), `degrees`
(parameters, gradients, optimizer states, second copy or null), `optimizer`, `dtype`, `reshard`, `recomputed`, `clips`,
and optionally a `fault`, the `features` of an `Odd` model, `compiled`, `evaluates` (between micro-batches), `driven`
(by a list of actions in place of hooks), and the axes of `int8_gathers` and `int4_reductions`. Writes LIST-RANK.json
beside that file: of each run the gradient norms, the bytes of every state at rest, the collectives of the last step,
errors where fewer bits travel, and, from rank 0, the parameters.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from states_errors import errors
from states_model import (
    ACCUMULATION,
    BLOCKS,
    CLIP,
    KINDS,
    OPTIMIZERS,
    STEPS,
    WIDTH,
    batch,
    build,
    evaluate,
    kind_of,
    loss_of,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates

LONGEST_S = 200
"""For `forked.py`: the longest that a process may take."""


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Collectives by kind, size of the group and bytes of the whole tensor."""
    calls: Counter[str] = Counter()
    kinds = {"all_gather_single": 0, "reduce_scatter_single": 1, "all_to_all_single": 1, "all_reduce": 0}
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
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    whole = total([bucket.whole for bucket in buckets])
    return {
        "parameters": total([bucket.shard for bucket in buckets]),
        "gathered": whole if states.levels.parameters else 0,
        "master": total([bucket.master for bucket in buckets]) if states.dtype != torch.float32 else 0,
        "gradients": total([each.grad for each in states.parameters() if each.grad is not None]),
        "optimizer_states": total([value for value in values if value.dim()]),
    }


ROOT = BLOCKS
ACTIONS: tuple[tuple[str, int], ...] = (
    *(("gather", ROOT), ("wait", ROOT), ("embed", ROOT)),
    *(
        step
        for unit in range(BLOCKS)
        for step in (("gather", unit), ("wait", unit), ("forward", unit), ("release", unit))
    ),
    ("loss", ROOT),
    *(
        step
        for unit in reversed(range(BLOCKS))
        for step in (("gather again", unit), ("wait again", unit), ("backward", unit), ("release", unit))
        + ((("reduce", unit + 1),) if unit + 1 < BLOCKS else ())
    ),
    *(("embed backward", ROOT), ("release", ROOT), ("reduce", 0), ("reduce", ROOT)),
)
"""One micro-batch of `Model`, as a pipeline's timetable would have it."""


class Actions:
    """Runs `ACTIONS`: blocks are stages whose inputs are leaves, and no module has hooks."""

    def __init__(self, model: Any, states: ShardedStates) -> None:
        self.model, self.states = model, states
        for block in model.blocks:
            states.take(block.parameters())
        states.take(model.parameters())

    def micro_batch(self, step: int, micro: int, rank: int, world: int, *, last: bool) -> None:
        """Forward, backward and reductions."""
        states, model = self.states, self.model
        tokens, targets, uses = batch(step, micro, rank)
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        x = scale = torch.ones(WIDTH)
        for action, unit in ACTIONS:
            match action:
                case "gather" | "gather again":
                    states.gather(unit, again=action == "gather again")
                case "wait" | "wait again":
                    states.wait(unit, again=action == "wait again")
                case "release":
                    states.release(unit, secondary=unit in outputs and inputs[unit].grad is None)
                case "reduce":
                    states.reduce(unit, last=last)
                case "embed":
                    outputs[unit] = x = model.embed(tokens)
                case "forward":
                    inputs[unit] = x.detach().requires_grad_()
                    outputs[unit], _ = x, _ = model.blocks[unit](inputs[unit], scale, uses)
                case "loss":
                    inputs[unit] = x.detach().requires_grad_()
                    logits = model.head(model.norm(inputs[unit]))
                    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / (ACCUMULATION * world)
                    torch.autograd.backward(loss)
                case "backward":
                    torch.autograd.backward(outputs[unit], inputs[unit + 1].grad)
                case "embed backward":
                    torch.autograd.backward(outputs[unit], inputs[0].grad)
        if last:
            states.finish()


class Hooked:
    """Trains with the hooks of `ShardedStates`."""

    def __init__(self, model: Any, states: ShardedStates, run: dict[str, Any]) -> None:
        self.model, self.states, self.fault = model, states, run.get("fault")
        for block in model.blocks:
            states.shard(block)
        states.shard(model, root=True)

    def micro_batch(self, step: int, micro: int, rank: int, world: int, *, last: bool) -> None:
        """Forward, backward and reductions."""
        loss = loss_of(self.model, step, micro, rank, world) * (2.0 if self.fault == "scale" else 1.0)
        if self.fault == "lost micro-batch" and micro == 0 and rank == 0:
            loss = loss * 0.0
        self.states.backward(loss, last=last)


@contextmanager
def reduced_over_the_wrong_groups(levels: Levels, active: bool) -> Iterator[None]:
    """Every reduce-scatter takes another axis' group."""
    before = dist.reduce_scatter_single

    def wrong(*args: Any, group: Any, **kwargs: Any) -> Any:
        return before(*args, group=levels.groups[1 - levels.groups.index(group)], **kwargs)

    if active:
        dist.reduce_scatter_single = wrong
    try:
        yield
    finally:
        dist.reduce_scatter_single = before


def levels_of(run: dict[str, Any], mesh: Any) -> Levels:
    """The levels of a run."""
    p, g, o, second = run["degrees"]
    narrow = {key: run.get(key, ()) for key in ("int8_gathers", "int4_reductions")}
    return Levels(mesh, parameters=p, gradients=g, optimizer_states=o, secondary=second, **narrow)


def train(run: dict[str, Any], mesh: Any) -> dict[str, Any]:
    """Trains under one layout."""
    rank, world, fault = dist.get_rank(), dist.get_world_size(), run.get("fault")
    model = build(run["recomputed"], run.get("features"), run.get("compiled", False))
    levels = levels_of(run, mesh)
    states = ShardedStates(levels, getattr(torch, run["dtype"]), reshard_after_forward=run["reshard"], kind_of=kind_of)
    driver: Any = Actions(model, states) if run.get("driven") else Hooked(model, states, run)
    optimizer = OPTIMIZERS[run["optimizer"]](states.parameter_groups(KINDS))
    norms, sizes = [], {}
    with counted() as calls, reduced_over_the_wrong_groups(levels, fault == "wrong group"):
        for step in range(STEPS):
            calls.clear()
            for micro in range(ACCUMULATION):
                driver.micro_batch(step, micro, rank, world, last=micro == ACCUMULATION - 1)
                if run.get("evaluates"):
                    evaluate(model)
            norm = states.gradient_norm()
            norms.append(float(norm))
            if run["clips"]:
                torch.nn.utils.clip_grads_with_norm_(states.parameters(), CLIP, norm)
            optimizer.step()
            sizes = at_rest(states, optimizer)
            if fault == "stale bucket" and step == 1:
                states.units[1][0].publish = lambda: None  # type: ignore[method-assign]
            states.publish()
    evaluated = evaluate(model) if not run.get("driven") else 0.0
    with states.gathered():
        parameters = {name: value.detach().double().flatten().tolist() for name, value in model.named_parameters()}
    result = {"norms": norms, "at_rest": sizes, "calls": dict(calls), "evaluated": evaluated}
    return result | {"parameters": parameters if rank == 0 else {}}


def train_three_numbers(mesh: Any) -> list[float]:
    """One step of a model so small that most processes have no part of it."""
    model = nn.Module()
    model.scale = nn.Parameter(torch.arange(3.0))
    model.forward = lambda: model.scale.square().sum()  # type: ignore[method-assign]
    degree = dist.get_world_size()
    states = ShardedStates(
        Levels(mesh, parameters=degree, gradients=degree, optimizer_states=degree), torch.float32, kind_of=lambda _: 0
    )
    states.shard(model, root=True)
    optimizer = torch.optim.AdamW(states.parameter_groups([{"weight_decay": 0.0, "lr": 1.0}]))
    states.backward(model(), last=True)
    norm = states.gradient_norm()
    torch.nn.utils.clip_grads_with_norm_(states.parameters(), 1.0, norm)
    optimizer.step()
    states.publish()
    with states.gathered():
        values: list[float] = model.scale.detach().tolist()
    return [float(norm), *values]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    spec = Path(sys.argv[1])
    meshes: dict[tuple[int, ...], Any] = {}
    results: dict[str, Any] = {}
    for run in json.loads(spec.read_text()):
        sizes = tuple(run["sizes"])
        if sizes not in meshes:
            names = tuple(f"dp_{index}" for index in range(len(sizes), 0, -1))
            meshes[sizes] = init_device_mesh("cpu", tuple(reversed(sizes)), mesh_dim_names=names)
        results[run["name"]] = train(run, meshes[sizes])
        if run.get("int8_gathers") or run.get("int4_reductions"):
            results[run["name"]] |= errors(levels_of(run, meshes[sizes]))
    results["three numbers"] = train_three_numbers(next(iter(meshes.values())))
    spec.with_name(f"{spec.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
