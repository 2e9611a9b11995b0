"""One of several processes that share sequences, one case after another.

Started with the path of a JSON list of runs: `kind` is `attention` (of one call), `model` (trained a while), `dropout`
or `stages`. Writes LIST-RANK.json beside that file: by the name of the run, how far each result is from what one
process gets, in relation to the largest number there, and the collectives of the last step, by kind, size of the group
and bytes.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import context_models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from shardwright.backends.pytorch.runtime import tensor_parallel
from shardwright.backends.pytorch.runtime.context_attention import ContextAttention
from shardwright.backends.pytorch.runtime.deferred import WeightQueue
from shardwright.backends.pytorch.runtime.divided import parts_of
from shardwright.backends.pytorch.runtime.pipeline import Pipeline
from shardwright.backends.pytorch.runtime.positions import Peers
from shardwright.backends.pytorch.runtime.replicas import Replicas
from shardwright.backends.pytorch.runtime.sequence import Sequences, divide_sequence
from shardwright.backends.pytorch.runtime.stages import stages_of
from shardwright.planner.schedules.lowering import lower
from shardwright.planner.schedules.table import make_schedule

_plain_attention = F.scaled_dot_product_attention
meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(context: int, tensor: int) -> DeviceMesh:
    """Of all processes: copies, those that share sequences, those that share layers."""
    sizes = (dist.get_world_size() // context // tensor, context, tensor)
    if sizes not in meshes:
        meshes[sizes] = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "cp", "tp"))
    return meshes[sizes]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Collectives by kind, size of the group and bytes of the whole tensor."""
    calls: Counter[str] = Counter()
    kinds = {"all_gather_single": 0, "reduce_scatter_single": 1, "all_to_all_single": 1, "all_reduce": 0}
    before = {kind: getattr(dist, kind) for kind in kinds}

    def call(kind: str, at: int, *args: Any, **kwargs: Any) -> Any:
        if len(args) > at:  # those of fsdp2 name their arguments
            size = args[at].numel() * args[at].element_size()
            calls[f"{kind.removesuffix('_single')} {dist.get_world_size(kwargs['group'])} {size}"] += 1
        return before[kind](*args, **kwargs)

    for kind, at in kinds.items():
        setattr(dist, kind, functools.partial(call, kind, at))
    try:
        yield calls
    finally:
        for kind, function in before.items():
            setattr(dist, kind, function)


def distance(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference in relation to the largest number of each tensor; of other shapes, infinite."""
    pairs = list(zip(found, expected, strict=True))
    if any(mine.shape != theirs.shape or mine.dtype != theirs.dtype for mine, theirs in pairs):
        return float("inf")
    return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)


def attend(run: dict[str, Any]) -> dict[str, Any]:
    """One call, forward and backward, of queries and keys with positions at random."""
    batch, length, size, value_size = run["shape"]
    dtype, heads, kept, causal = getattr(torch, run["dtype"]), run["heads"], run["kept"], run["causal"]
    generator = torch.Generator().manual_seed(len(run["name"]))
    shapes = [(heads, size), (kept, size), (kept, value_size), (heads, value_size)]
    whole = [torch.randn(batch, count, length, width, generator=generator, dtype=dtype) for count, width in shapes]
    kwargs = {"is_causal": causal, "scale": run["scale"], "enable_gqa": heads != kept}
    exact = [each.double().requires_grad_() for each in whole[:3]]
    expected = _plain_attention(*exact, **kwargs)
    expected.backward(whole[3].double())
    peers = Peers(mesh_of(run["context"], 1)["cp"], zigzag=causal and run["method"] != "ulysses")

    def own(tensor: Tensor) -> Tensor:
        return peers.positions.own(tensor.detach(), 2)

    mine = [own(each).requires_grad_() for each in whole[:3]]
    with counted() as calls:
        output = ContextAttention(peers, run["method"])(*mine, **kwargs)
        output.backward(own(whole[3]))
    gradients = [each.grad for each in exact]
    found = [output.detach(), *(each.grad for each in mine)]
    return {
        "distance": distance([each.double() for each in found], [own(each) for each in (expected, *gradients)]),
        "dtypes": sorted({str(each.dtype) for each in found}),
        "calls": calls,
    }


def styles(case: context_models.Case) -> dict[str, Any]:
    """The table of `TENSOR`, with divided sequences."""
    width = case.width
    of: dict[str, Callable[[str], Any]] = {
        "region": lambda path: tensor_parallel.Region(
            sequence_dim=1, attributes=("heads",) if path.endswith("attention") else ()
        ),
        "column": lambda path: tensor_parallel.Column(
            **({"parts": {"weight": (width,) * 3}} if path.endswith("qkv") else {})
        ),
        "row": lambda _: tensor_parallel.Row(sequence_dim=1),
        "shared": lambda _: tensor_parallel.Shared(),
    }
    return {path: of[style](path) for path, style in context_models.TENSOR.items()}


def divide(case: context_models.Case, run: dict[str, Any], mesh: DeviceMesh) -> Sequences:
    """As a script does."""
    if run["tensor"] > 1:
        parallelize_module(case.model, mesh["tp"], styles(case))
    head = case.head if run.get("joins", True) else ""
    sequences = divide_sequence(
        case.model, case.blocks, tensor=mesh["tp"], context=mesh["cp"], head=head, method=run["method"], causal=True
    )
    for path in case.blocks:
        block = case.model.get_submodule(path)
        if run.get("checkpointed"):
            vars(block)["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if run.get("sharded"):
            fully_shard(block, mesh=mesh["copies", "cp"]._flatten("data"))
    if run.get("sharded"):
        fully_shard(case.model, mesh=mesh["data"])
    return sequences


def train(run: dict[str, Any]) -> dict[str, Any]:
    """A model for a while, against one process."""
    mesh = mesh_of(run["context"], run["tensor"])
    copies = mesh.size(0)
    case = context_models.build(run["model"])
    sequences = divide(case, run, mesh)
    optimizer = torch.optim.SGD(case.model.parameters(), context_models.RATE)
    losses, norms = [], []
    for _ in range(context_models.STEPS):
        ids, targets = context_models.tokens(mesh.get_local_rank("copies"))
        with counted() as calls:
            loss = context_models.loss_of(case.model, ids, targets, copies, sequences)
            torch.autograd.backward(loss * (copies * run["context"] if run.get("sharded") else 1))
        losses.append(float(_sum(loss.detach().clone(), mesh)))
        gradients = _reduced(case.model, mesh, sharded=bool(run.get("sharded")))
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        optimizer.step()
        optimizer.zero_grad()
    expected = context_models.train_plainly(run["model"], copies)
    divided = parts_of(case.model)
    parameters, whole = [], []
    for name, parameter in case.model.named_parameters():
        value = parameter.detach()
        parameters.append(value.full_tensor() if isinstance(value, DTensor) else value)
        whole.append(divided[name].of(expected.parameters[name]) if name in divided else expected.parameters[name])
    return {
        "parameters": distance(parameters, whole),
        "losses": distance([_exactly(losses)], [_exactly(expected.losses)]),
        "norms": 0.0 if run["tensor"] > 1 else distance([_exactly(norms)], [_exactly(expected.norms)]),
        "learnt": expected.losses[0] - expected.losses[-1],
        "calls": calls,
    }


def _exactly(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _sum(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    for axis in ("copies", "cp"):
        dist.all_reduce(tensor, group=mesh.get_group(axis))
    return tensor


def _reduced(model: nn.Module, mesh: DeviceMesh, *, sharded: bool) -> list[Tensor]:
    """Gradients, summed over the processes that have the same parameters."""
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    if sharded:
        return [each.full_tensor() if isinstance(each, DTensor) else each for each in gradients]
    return [_sum(each, mesh) for each in gradients]


def drop(run: dict[str, Any]) -> dict[str, Any]:
    """A model with dropout in its blocks, twice from the same seed: kept, and recomputed in backward."""
    mesh = mesh_of(run["context"], run["tensor"])
    gradients: list[list[Tensor]] = []
    zeros: list[Tensor] = []
    for checkpointed in (False, True):
        case = context_models.build("gpt")
        for path in case.blocks:
            case.model.get_submodule(path).mlp.append(nn.Dropout(0.5))
        sequences = divide(case, run | {"checkpointed": checkpointed}, mesh)
        block = case.model.get_submodule(case.blocks[0])
        block.mlp[3].register_forward_hook(lambda _, __, made: zeros.append(made.detach() == 0))
        torch.manual_seed(mesh.get_local_rank("cp"))
        torch.autograd.backward(context_models.loss_of(case.model, *context_models.tokens(0), 1, sequences))
        gradients.append([each.grad for each in case.model.parameters() if each.grad is not None])
    return {
        "repeats": distance(gradients[1], gradients[0]),
        "zeros": zeros[0].flatten().tolist(),
        "generator": torch.get_rng_state().tolist(),
    }


def stages(run: dict[str, Any]) -> dict[str, Any]:
    """One step of a pipeline of two stages, each of which has its part of the sequences on two processes."""
    mesh, count = mesh_of(2, 1), 4
    case = context_models.build(run["model"])
    sequences = divide_sequence(case.model, case.blocks, context=mesh["cp"], head=case.head, method=run["method"])

    def forward(model: nn.Module, number: int) -> Tensor:
        return context_models.loss_of(model, *context_models.tokens(number), count, sequences)

    rank = mesh.get_local_rank("copies")
    layout, _, timetable = make_schedule("1f1b", 2, count, (1.0, 1.0, 1.0, 0.0))
    made = stages_of(case.model, case.blocks, run["cuts"], [rank], forward, 0)
    queue, states = WeightQueue(), Replicas()
    parameters = dict(case.model.named_parameters())
    pipeline = Pipeline(
        lower(timetable, layout, edges=list(made.wires))[rank],
        made.stages,
        ranks=[0, 1],
        wires=made.wires,
        loss=lambda output, _: output,
        queue=queue,
        states=states,
        units={rank: [states.take(parameters[name] for name in made.parameters(rank))]},
        device=torch.device("cpu"),
        group=mesh.get_group("copies"),
    )
    pipeline.step(range(count))
    whole = context_models.build(run["model"]).model
    for number in range(count):
        torch.autograd.backward(context_models.loss_of(whole, *context_models.tokens(number), count))
    found, expected = [], []
    for name in made.parameters(rank):
        gradient = parameters[name].grad
        assert gradient is not None
        dist.all_reduce(gradient, group=mesh.get_group("cp"))
        found.append(gradient)
        expected.append(whole.get_parameter(name).grad)
    return {"gradients": distance(found, expected), "wires": [list(wire.shape) for wire in made.wires[0, 1]]}


def main() -> None:
    listed = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    kinds = {"attention": attend, "model": train, "dropout": drop, "stages": stages}
    results = {run["name"]: kinds[run["kind"]](run) for run in json.loads(listed.read_text())}
    listed.with_name(f"{listed.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
