"""One of several processes that train small models under tensor parallelism and compare them with one process.

Started with the path of a JSON list of runs: `name`, `case`, `tensor` (processes that share a layer), and optionally
`sequence`, `recomputed`, `deferred`, `stages`, `optimizer`, `engine` and `fault`. Writes LIST-RANK.json: of each run,
from rank 0, the largest relative errors of losses, norms and parameters; and what `tensor_oracle.py` compares.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tensor_models import CASES, SEQUENCE, Case, batch, whole
from tensor_oracle import compare_block, compare_loss, refusals
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from shardwright.backends.pytorch.runtime import tensor_exchange
from shardwright.backends.pytorch.runtime.deferred import WeightQueue, compute, defer_weight_gradients
from shardwright.backends.pytorch.runtime.divided import Part, parts_of
from shardwright.backends.pytorch.runtime.pieces import whole as whole_box
from shardwright.backends.pytorch.runtime.sequence import divide_sequence
from shardwright.backends.pytorch.runtime.shares import divided_gradient_norm, share_of
from shardwright.backends.pytorch.runtime.stages import stages_of
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates
from shardwright.backends.pytorch.runtime.tensor_parallel import matching
from shardwright.backends.pytorch.runtime.tensor_parallel_loss import divide_cross_entropy

STEPS = 3
OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-3, eps=1e-3, weight_decay=0.1),
}


def divide(model: nn.Module, case: Case, mesh: DeviceMesh, *, sequence: bool = False) -> None:
    """As a script does it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallelize_module(model, mesh, matching(model, case.table(mesh.size(), sequence)))
    divide_cross_entropy(model, case.head, mesh)
    if sequence:
        blocks = [f"{case.blocks}.{number}" for number, _ in enumerate(model.get_submodule(case.blocks).children())]
        divide_sequence(model, blocks, tensor=mesh, context=None)


def in_stages(model: nn.Module, case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss by two stages, of which the second is given what the first one sends."""
    blocks = [f"{case.blocks}.{number}" for number, _ in enumerate(model.get_submodule(case.blocks).children())]
    stages = stages_of(model, blocks, [1], [0, 1], lambda model, pair: case.loss(model, *pair), batch(0, 0))

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        (sent,) = stages.stages[0]((ids, targets))
        result: Tensor = stages.stages[1]((ids, targets), sent)
        return result

    return loss


def recompute(model: nn.Module, case: Case) -> None:
    """Checkpoints every block."""
    for block in model.get_submodule(case.blocks).children():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


class Masks:
    """Dropout whose masks are recorded, or played back to one process that has all of what others had a part of."""

    def __init__(self, recorded: list[Tensor] | None = None) -> None:
        self.recorded, self.plays, self.at = recorded or [], recorded is not None, 0

    def __call__(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """In the place of `torch.nn.functional.dropout`."""
        if not training or not p:
            return input
        if self.plays:
            mask = self.recorded[self.at]
            self.at += 1
        else:
            mask = torch.bernoulli(torch.full(input.shape, 1 - p))
            self.recorded.append(mask)
        assert mask.shape == input.shape
        return input * mask / (1 - p)

    def of_all(self, count: int, mesh: DeviceMesh) -> list[Tensor]:
        """The first masks, of all processes together. Those of own heads (batch, heads, ...), or of an own part of
        the sequence (batch, sequence, ...), must differ; all others must be the same."""
        found = []
        for mask in self.recorded[:count]:
            every = [torch.empty_like(mask) for _ in range(mesh.size())]
            dist.all_gather(every, mask, group=mesh.get_group())
            alike = all(torch.equal(each, every[0]) for each in every)
            divided = mask.dim() == 4 or mask.shape[1] < SEQUENCE
            assert alike != divided, mask.shape
            found.append(torch.cat(every, 1) if divided else mask)
        return found


@contextmanager
def dropout(masks: Masks | None) -> Iterator[None]:
    """Masks take the place of dropout inside."""
    before = F.dropout
    if masks is not None:
        F.dropout = masks
    try:
        yield
    finally:
        F.dropout = before


@torch.no_grad()
def evaluate(model: nn.Module, case: Case) -> float:
    """The loss without dropout or gradients."""
    return float(case.loss(model.eval(), *batch(STEPS, 0)))


def train_whole(name: str, data: int, optimizer: str, masks: list[Tensor] | None) -> dict[str, Any]:
    """One process."""
    case, model = CASES[name], whole(name)
    steps = OPTIMIZERS[optimizer](model.parameters())
    losses, norms = [], []
    with dropout(None if masks is None else Masks(masks)):
        for step in range(STEPS):
            total = 0.0
            for micro in range(data):
                loss = case.loss(model, *batch(step, micro)) / data
                loss.backward()
                total += loss.item()
            losses.append(total)
            grads = [each.grad for each in model.parameters() if each.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))
            steps.step()
            steps.zero_grad()
    losses.append(evaluate(model, case))
    return {"losses": losses, "norms": norms, "parameters": {k: v.detach() for k, v in model.named_parameters()}}


class Plain:
    """No engine: every data process holds what it has whole."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, case: Case) -> None:
        self.model, self.tensor = model, mesh["tp"].size()
        self.parameters = list(model.parameters())

    def backward(self, loss: Tensor, deferred: WeightQueue | None) -> None:
        """Of one micro-batch."""
        if deferred is None:
            loss.backward()
            return
        with deferred.deferring() as queued:
            loss.backward()
        assert queued
        compute(queued)

    def norm(self) -> Tensor:
        """Of the whole gradient."""
        return divided_gradient_norm(self.model, self.tensor)

    def published(self) -> None:
        """After a step."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Local parts are whole inside."""
        yield


class Fsdp2(Plain):
    """Stock FSDP2 over the data processes."""

    policy = MixedPrecisionPolicy()

    def __init__(self, model: nn.Module, mesh: DeviceMesh, case: Case) -> None:
        for block in model.get_submodule(case.blocks).children():
            fully_shard(block, mesh=mesh["data"], mp_policy=self.policy)
        fully_shard(model, mesh=mesh["data"], mp_policy=self.policy)
        super().__init__(model, mesh, case)


class Fsdp2Bf16(Fsdp2):
    """With forward and backward in bf16."""

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)


class Amsp(Plain):
    """`ShardedStates` over the data processes, whose gradients are sums."""

    dtype = torch.float32

    def __init__(self, model: nn.Module, mesh: DeviceMesh, case: Case) -> None:
        degree = mesh["data"].size()
        levels = Levels(mesh["data"], parameters=degree, gradients=degree, optimizer_states=degree)
        self.states = ShardedStates(levels, self.dtype, share_of=share_of(model, mesh["tp"].size()))
        for block in model.get_submodule(case.blocks).children():
            self.states.shard(block)
        self.states.shard(model, root=True)
        self.data = degree
        self.parameters = [p for g in self.states.parameter_groups([{}, {}]) for p in g["params"]]

    def backward(self, loss: Tensor, deferred: WeightQueue | None) -> None:
        """Of one micro-batch."""
        self.states.backward(loss / self.data, last=True)

    def norm(self) -> Tensor:
        """Of the whole gradient."""
        return self.states.gradient_norm()

    def published(self) -> None:
        """After a step."""
        self.states.publish()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Local parts are whole inside."""
        with self.states.gathered():
            yield


class AmspBf16(Amsp):
    """With forward and backward in bf16."""

    dtype = torch.bfloat16


ENGINES: dict[str, type[Plain]] = {
    "none": Plain,
    "fsdp2": Fsdp2,
    "fsdp2 bf16": Fsdp2Bf16,
    "amsp": Amsp,
    "amsp bf16": AmspBf16,
}


def assemble(model: nn.Module) -> tuple[dict[str, Tensor], float]:
    """The whole parameters from all processes' parts, and how far those of the same elements differ at most."""
    parts = parts_of(model)
    own: dict[str, tuple[Part | None, Tensor]] = {}
    for name, parameter in model.named_parameters():
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        own[name] = (parts.get(name), value.detach().clone())
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    found: dict[str, Tensor] = {}
    differ = 0.0
    for name in own:
        part = own[name][0]
        made = torch.full(part.shape if part is not None else own[name][1].shape, torch.nan)
        for process in every:
            its, value = process[name]
            if its is None:
                pairs = [(whole_box(value.shape), whole_box(value.shape))]
            else:
                pairs = list(its.boxes(whole_box(value.shape)))
            for box, here in pairs:
                place = made[box.within(whole_box(made.shape))]
                piece = value[here.within(whole_box(value.shape))]
                if not place.isnan().all():
                    differ = max(differ, float((place - piece).abs().max()))
                place.copy_(piece)
        assert not made.isnan().any(), name
        found[name] = made
    return found, differ


@contextmanager
def broken(fault: str | None) -> Iterator[None]:
    """Backward of a function of the runtime does not sum inside."""
    functions = {"entering": tensor_exchange._Enter, "sharing": tensor_exchange._Share}
    before = {name: function.backward for name, function in functions.items()}
    if fault is not None:
        functions[fault].backward = staticmethod(lambda ctx, gradient: (gradient, None))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, backward in before.items():
            functions[name].backward = staticmethod(backward)  # type: ignore[attr-defined]


def train(run: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """One run, and its errors on rank 0."""
    case, name = CASES[run["case"]], run["case"]
    data, tensor = mesh["data"], mesh["tp"]
    model = whole(name)
    divide(model, case, tensor, sequence=run.get("sequence", False))
    if run.get("recomputed"):
        recompute(model, case)
    queue = WeightQueue() if run.get("deferred") else None
    if queue is not None:
        defer_weight_gradients(model, queue)
    loss_of = in_stages(model, case) if run.get("stages") else partial(case.loss, model)
    engine = ENGINES[run.get("engine", "none")](model, mesh, case)
    optimizer = OPTIMIZERS[run.get("optimizer", "sgd")](engine.parameters)
    losses, norms, counts = [], [], []
    masks = Masks() if "dropout" in name else None
    torch.manual_seed(11)
    with dropout(masks):
        for step in range(STEPS):
            loss = loss_of(*batch(step, data.get_local_rank()))
            counts.append(len(masks.recorded) if masks is not None else 0)
            engine.backward(loss, queue)
            counts.append(len(masks.recorded) if masks is not None else 0)
            shown = loss.detach() / data.size()
            dist.all_reduce(shown, group=data.get_group())
            losses.append(float(shown))
            norms.append(float(engine.norm()))
            optimizer.step()
            optimizer.zero_grad()
            engine.published()
    losses.append(evaluate(model, case))
    model.train()
    with engine.gathered():
        found, differ = assemble(model)
    every = [torch.empty_like(torch.get_rng_state()) for _ in range(tensor.size())]
    dist.all_gather(every, torch.get_rng_state(), group=tensor.get_group())
    assert all(torch.equal(each, every[0]) for each in every), "the default generators differ"
    played = None
    if masks is not None:
        # Of each step what forward drew; what recomputation drew after it must be the same again.
        starts = [0, *counts[1::2][:-1]]
        kept = [mask for start, end in zip(starts, counts[::2], strict=True) for mask in masks.recorded[start:end]]
        assert bool(run.get("recomputed")) == (counts[1] > counts[0])
        played = Masks(None)
        played.recorded = kept
        played = played.of_all(len(kept), tensor)
    if dist.get_rank():
        return {}
    reference = train_whole(name, data.size(), run.get("optimizer", "sgd"), played)
    return {
        "copies": differ,
        "losses": max(abs(a - b) / abs(b) for a, b in zip(losses, reference["losses"], strict=True)),
        "norms": max(abs(a - b) / abs(b) for a, b in zip(norms, reference["norms"], strict=True)),
        "parameters": {
            each: float((found[each] - value).abs().max() / value.abs().max().clamp(min=1e-3))
            for each, value in reference["parameters"].items()
        },
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    spec = Path(sys.argv[1])
    results: dict[str, Any] = {}
    world = dist.get_world_size()
    for run in json.loads(spec.read_text()):
        tensor = run["tensor"]
        mesh = init_device_mesh("cpu", (world // tensor, tensor), mesh_dim_names=("data", "tp"))
        with broken(run.get("fault")):
            results[run["name"]] = train(run, mesh)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    results["blocks"] = [compare_block(mesh, sequence) for sequence in (False, True)]
    results["loss"] = compare_loss(mesh)
    results["refusals"] = refusals(mesh)
    spec.with_name(f"{spec.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
