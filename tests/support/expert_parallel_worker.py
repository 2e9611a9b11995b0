"""One of several processes that share the experts of small models, one run after another.

Started with the path of a JSON list of runs; each has `name` and `kind`: `alone`, one layer of experts against all of
them in one process; `shares`, a norm that is known; or an engine (`fsdp2`, `amsp`, `pipeline`), with `model`, `ep`,
`sizes` (of the data axes, fastest first), `degrees` (of amsp: parameters, gradients, optimizer states, second copy or
null; of fsdp2: whether to free parameters after forward), `optimizer`, and optionally `dtype`, `tied`, `recomputed`
(true, or `partly`), `flag` (of fsdp2: what tells the last micro-batch), `late`, `int8_gathers`, `int4_reductions`,
`folder` (a checkpoint is saved there at the end) and `loads` (from there, at the start). Writes LIST-RANK.json beside
that file.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from expert_parallel_model import (
    ACCUMULATION,
    BLOCKS,
    CLIP,
    EXPERTS,
    LAYERS,
    OPTIMIZERS,
    STEPS,
    batch,
    build,
    summed_loss,
    targets,
)
from states_worker import at_rest
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from shardwright.backends.pytorch.runtime.checkpoint import Checkpoints, TrainState
from shardwright.backends.pytorch.runtime.divided import narrow, parts_of
from shardwright.backends.pytorch.runtime.divided_holder import DividedHolder
from shardwright.backends.pytorch.runtime.experts import Experts, divide_experts
from shardwright.backends.pytorch.runtime.held import STOCK, Holder
from shardwright.backends.pytorch.runtime.held_flat import FlatHolder
from shardwright.backends.pytorch.runtime.late import LateStep, heads
from shardwright.backends.pytorch.runtime.meshes import by_mesh, clip_by_mesh
from shardwright.backends.pytorch.runtime.pipeline import Pipeline
from shardwright.backends.pytorch.runtime.shares import divided_gradient_norm, share_of
from shardwright.backends.pytorch.runtime.stage_states import StageStates
from shardwright.backends.pytorch.runtime.stages import stages_of
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates
from shardwright.backends.pytorch.runtime.tensor_parallel import TensorExperts, matching
from shardwright.planner.schedules.lowering import Gathers, lower
from shardwright.planner.schedules.table import make_schedule

LONGEST_S = 150
"""For `forked.py`: the longest that a process may take."""
CPU = torch.device("cpu")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Collectives by kind, size of the group and bytes of the whole tensor, or of what enters an exchange."""
    calls: Counter[str] = Counter()
    kinds = ("all_gather_single", "reduce_scatter_single", "all_to_all_single", "all_reduce")
    before = {kind: getattr(dist, kind) for kind in kinds}

    def wrap(kind: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            counts = given[1:] if kind == "all_to_all_single" else given
            size = max(each.numel() * each.element_size() for each in counts)
            calls[f"{kind.removesuffix('_single')} {dist.get_world_size(kwargs.get('group'))} {size}"] += 1
            return before[kind](*args, **kwargs)

        return call

    for kind in kinds:
        setattr(dist, kind, wrap(kind))
    try:
        yield calls
    finally:
        for kind, function in before.items():
            setattr(dist, kind, function)


def mesh_of(sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def alone(run: dict[str, Any]) -> dict[str, Any]:
    """The largest differences of outputs and gradients from one process with all experts."""
    mesh, chosen = mesh_of((dist.get_world_size() // run["tp"], run["tp"]), ("ep", "tp")), run["chosen"]
    rank = mesh.get_local_rank("ep")
    whole = build("mixtral", implementation=run["implementation"]).get_submodule("model.layers.0.mlp.experts")
    model = build("mixtral", implementation=run["implementation"])
    if run["tp"] > 1:
        style = TensorExperts(dims={"gate_up_proj": 1, "down_proj": 2}, units=24, parts={"gate_up_proj": (24, 24)})
        parallelize_module(model, mesh["tp"], matching(model, dict.fromkeys(LAYERS, style)))
    experts = divide_experts(model, LAYERS, mesh["ep"])
    (layer,) = experts.inside(model.get_submodule(BLOCKS[0]))
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randn(6 + rank, 16, generator=generator)
    indices = torch.stack([torch.randperm(EXPERTS, generator=generator)[:chosen] for _ in range(6 + rank)])
    if run["routing"] == "to the first":  # the last process gets nothing
        indices = indices % 2 if chosen == 1 else torch.tensor([[0, 1]]).expand(6 + rank, 2)
    weights = torch.rand(6 + rank, chosen, generator=generator)

    def compute(module: nn.Module) -> dict[str, Tensor]:
        inputs = [tokens.clone().requires_grad_(run["of_tokens"]), weights.clone().requires_grad_()]
        forward = partial(checkpoint, module, use_reentrant=False) if run["recomputed"] else module
        with torch.set_grad_enabled(run["grad"]):
            output = forward(inputs[0], indices, inputs[1])
        if run["grad"]:
            torch.autograd.backward(output, torch.sin(output.detach()))
        found = {"tokens": inputs[0].grad, "weights": inputs[1].grad}
        found |= {name: each.grad for name, each in module.named_parameters()}
        return {"output": output.detach()} | {key: each for key, each in found.items() if each is not None}

    expected = compute(whole)
    with counted() as calls:
        found = compute(layer)
    for name, part in parts_of(layer).items():
        if name in expected:
            dist.all_reduce(expected[name], group=mesh.get_group("ep"))
            expected[name] = part.of(expected[name])
    assert found.keys() == expected.keys()
    off = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    return {"off": off, "calls": calls, "load": experts.load(), "again": experts.load()}


class Few(nn.Module):
    """Parameters that are divided in several ways, each with a gradient that is known."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"columns": (8, 4), "shared": (4, 4), "whole": (3, 4), "uneven": (5, 3), "bias": (6,)}
        self.gradients = {name: torch.randn(shape) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self) -> Tensor:
        parts = parts_of(self)
        own = {name: parts[name].of(each) if name in parts else each for name, each in self.gradients.items()}
        return torch.stack([(getattr(self, name) * each).sum() for name, each in own.items()]).sum()


def shares(run: dict[str, Any]) -> dict[str, Any]:
    """The norm of a gradient that is known, as two times two processes find it that share the parameters."""
    mesh = mesh_of((2, 2), ("dp_1", "tp"))

    def build_divided() -> Few:
        model = Few()
        options = {"rank": mesh.get_local_rank("tp"), "size": 2}
        narrow(model, "columns", 0, parts=(2, 6), units=2, **options)
        narrow(model, "shared", 0, units=1, **options)
        narrow(model, "uneven", 0, **options)
        return model

    found = {"expected": float(torch.cat([each.flatten() for each in Few().gradients.values()]).norm())}
    for degree in (1, 2):
        model = build_divided()
        levels = Levels(mesh["dp_1"], parameters=1, gradients=1, optimizer_states=degree)
        states = ShardedStates(levels, torch.float32, share_of=share_of(model, 2))
        states.shard(model, root=True)
        states.backward(model() / 2, last=True)
        found[f"amsp {degree}"] = float(states.gradient_norm())
    model = build_divided()
    model().backward()  # type: ignore[no-untyped-call]
    found["ddp"] = float(divided_gradient_norm(model, 2))
    for parameter in model.parameters():
        parameter.grad = None
    fully_shard(model, mesh=mesh["dp_1"])
    parts, local = parts_of(model), {}
    for name, whole in model.gradients.items():
        local[name] = parts[name].of(whole) if name in parts else whole
        parameter = model.get_parameter(name)
        parameter.grad = distribute_tensor(local[name], mesh["dp_1"], [Shard(0)], src_data_rank=None)
    found["fsdp2"] = float(divided_gradient_norm(model, 2))
    return found


class Trainee:
    """A model under an engine, with its optimizer."""

    def __init__(self, run: dict[str, Any]) -> None:
        self.run, self.ep, self.world = run, run["ep"], dist.get_world_size()
        self.data = prod(run["sizes"])
        self.dtype = getattr(torch, run.get("dtype", "float32"))
        self.rank = dist.get_rank() % self.data
        self.model = build(
            run["model"], tied=run.get("tied", False), implementation=run.get("implementation", "grouped_mm")
        )
        pipe = self.world // self.data
        if run["kind"] == "fsdp2":
            shards, _ = run["sizes"]
            own = max(1, shards // self.ep)
            self.expert_mesh = mesh_of(
                (self.data // self.ep // own, own, self.ep), ("expert_replicate", "expert_shard", "ep")
            )
            mesh = self.expert_mesh["ep"]
        else:
            mesh = mesh_of((pipe, self.data // self.ep, self.ep), ("pp", "rest", "ep"))["ep"]
        self.ep_group = mesh.get_group()
        self.experts: Experts | None = divide_experts(self.model, LAYERS, mesh) if self.ep > 1 else None
        self.holder: Holder = STOCK
        self.states: ShardedStates | None = None
        parameters = getattr(self, f"_{run['kind']}")()
        self.optimizer = OPTIMIZERS[run["optimizer"]](parameters)
        if self.ep > 1:
            self.holder = DividedHolder(self.model, self.holder)

    def _recompute(self, block: nn.Module) -> None:
        options: dict[str, Any] = {}
        if self.run.get("recomputed") == "partly":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        if self.run.get("recomputed"):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)  # type: ignore[method-assign]

    def _fsdp2(self) -> Any:
        shards, replicas = self.run["sizes"]
        data = mesh_of((replicas, shards), ("dp_replicate", "dp_shard"))
        mesh = data if replicas > 1 else data["dp_shard"]
        names = ("expert_replicate", "expert_shard") if self.expert_mesh.size(0) > 1 else ("expert_shard",)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.dtype == torch.bfloat16 else None
        options: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
        of_experts = (
            {} if policy is None else {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32, None, False)}
        )
        frees = self.run["degrees"]
        for path in BLOCKS:
            block = self.model.get_submodule(path)
            self._recompute(block)
            for layer in self.experts.inside(block) if self.experts else ():
                fully_shard(layer, mesh=self.expert_mesh[names], reshard_after_forward=frees, **of_experts)
                layer.set_gradient_divide_factor(self.data)
                if self.expert_mesh.size(1) > 1:
                    layer.set_force_sum_reduction_for_comms(True)
            fully_shard(block, mesh=mesh, reshard_after_forward=frees, **options)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False, **options)
        return by_mesh([{"params": list(self.model.parameters())}])

    def _sharded(self, data: DeviceMesh) -> ShardedStates:
        p, g, o, second = self.run["degrees"]
        names, width = list(data.mesh_dim_names or ()), 1
        narrow_axes = {key: self.run.get(key, []) for key in ("int8_gathers", "int4_reductions")}
        levels = Levels(data, parameters=p, gradients=g, optimizer_states=o, secondary=second, **narrow_axes)
        if self.experts is None:
            return ShardedStates(levels, self.dtype)
        while width < self.ep:
            width *= data[names.pop()].size()
        p, g, o, second = (each and max(1, each // self.ep) for each in self.run["degrees"])
        own = data[tuple(names)] if names else None
        left = {key: [name for name in axes if name in names] for key, axes in narrow_axes.items()}
        expert_levels = Levels(own, parameters=p, gradients=g, optimizer_states=o, secondary=second, **left)
        return ShardedStates(
            levels, self.dtype, experts=expert_levels, is_expert=self.experts.has, share_of=share_of(self.model, 1)
        )

    def _amsp(self) -> Any:
        sizes = self.run["sizes"]
        names = tuple(f"dp_{index}" for index in range(len(sizes), 0, -1))
        self.states = self._sharded(mesh_of(tuple(reversed(sizes)), names))
        for path in BLOCKS:
            self._recompute(self.model.get_submodule(path))
            self.states.shard(self.model.get_submodule(path))
        self.states.shard(self.model, root=True)
        self.holder = FlatHolder(self.states)
        return self.states.parameter_groups([{}, {}])

    def _pipeline(self) -> Any:
        sizes, stages_count = self.run["sizes"], self.world // self.data
        names = ("pp", *(f"dp_{index}" for index in range(len(sizes), 0, -1)))
        mesh = mesh_of((stages_count, *reversed(sizes)), names)
        self.states = self._sharded(mesh[names[1:]])
        layout, _, timetable = make_schedule("1f1b", stages_count, ACCUMULATION, (1.0, 1.0, 1.0, 0.0))
        place = mesh.get_local_rank("pp")
        own = [stage for stage in range(layout.stages) if layout.place(stage)[0] == place]
        ranks = [layout.place(stage)[0] for stage in range(layout.stages)]
        stages = stages_of(self.model, list(BLOCKS), [1], own, summed_loss, batch(0, 0, self.rank), self.dtype)
        placed = StageStates(self.model, self.states, stages, ranks, place)
        for paths in placed.blocks.values():
            for path in paths:
                self._recompute(self.model.get_submodule(path))
                placed.take_block(path)
        placed.take_rest(CPU)
        placed.defer_weight_gradients()
        self.programs = lower(timetable, layout, edges=list(stages.wires), gathers=Gathers(1, False))
        self.place = place
        self.pipeline = Pipeline(
            self.programs[place],
            stages.stages,
            ranks=ranks,
            wires=stages.wires,
            loss=lambda summed, _: summed / targets(self.data),
            queue=placed.queue,
            states=self.states,
            units=placed.units,
            device=CPU,
            group=mesh.get_group("pp"),
            ties=placed.ties(self.data),
        )
        self.holder = FlatHolder(self.states)
        return self.states.parameter_groups([{}, {}])

    def gradients(self, step: int) -> float:
        """Forward and backward of a step; this process's part of the loss."""
        micro_batches = [batch(step, micro, self.rank) for micro in range(ACCUMULATION)]
        if self.run["kind"] == "pipeline":
            found = self.pipeline.step(micro_batches)
            return 0.0 if found is None else float(found)
        total, model = 0.0, self.model
        for micro, given in enumerate(micro_batches):
            loss, last = summed_loss(model, given) / targets(self.data), micro == ACCUMULATION - 1
            if self.states is not None:
                self.states.backward(loss, last=last)
            else:
                getattr(model, self.run.get("flag", "set_requires_all_reduce"))(last)
                torch.autograd.backward(loss * self.data)
            total += float(loss.detach())
        return total

    def norm(self) -> Tensor:
        if self.states is not None:
            return self.states.gradient_norm()
        return divided_gradient_norm(self.model, 1)

    def train(self) -> dict[str, Any]:
        norms, losses, late = [], [], None
        if self.run.get("late"):
            assert self.states is not None
            head, group = heads(self.programs)[self.place], dist.new_group()
            late = LateStep(self.states, self.optimizer, head=head, group=group, max_norm=CLIP)
            self.pipeline.late = late
        for step in range(STEPS):
            with counted() as calls:
                loss = torch.tensor(self.gradients(step), dtype=torch.float64)
                if late is not None:
                    late.step()
                    norms.append(late.norm)
                else:
                    norms.append(self.norm())
                    self._update(norms[-1])
            dist.all_reduce(loss)
            losses.append(float(loss))
        if late is not None:
            late.settle()
        found: dict[str, Any] = {"norms": [float(norm) for norm in norms], "losses": losses, "calls": calls}
        if self.run["kind"] == "amsp":
            found["at_rest"] = self.rest
        if self.experts is not None:
            found["load"] = self.experts.load()
        return found

    def _update(self, norm: Tensor) -> None:
        parameters = self.states.parameters() if self.states is not None else list(self.model.parameters())
        clip_by_mesh(parameters, CLIP, norm)
        self.optimizer.step()
        if self.states is not None:
            self.rest = at_rest(self.states, self.optimizer)
        self.optimizer.zero_grad()
        if self.states is not None:
            self.states.publish()

    def evaluate(self) -> float:
        """The loss of another batch, without gradients."""
        if self.run["kind"] == "pipeline":
            return 0.0
        self.model.eval()
        with torch.no_grad():
            loss = summed_loss(self.model, batch(99, 0, self.rank)).double()
        self.model.train()
        dist.all_reduce(loss)
        return float(loss)

    def parameters(self) -> dict[str, list[float]]:
        """Whole ones, as far as this process has them, put together here by hand."""
        with self.states.gathered() if self.states is not None else torch.no_grad():
            return {
                name: self._whole(name, each.detach())
                for name, each in self.model.named_parameters()
                if not each.is_meta
            }

    def _whole(self, name: str, value: Tensor) -> list[float]:
        value = (value.full_tensor() if isinstance(value, DTensor) else value).contiguous()
        if self.ep > 1 and ".mlp.experts." in name:
            parts = [torch.empty_like(value) for _ in range(self.ep)]
            dist.all_gather(parts, value, group=self.ep_group)
            value = torch.cat(parts)
        return value.double().flatten().tolist()


def train(run: dict[str, Any]) -> dict[str, Any]:
    trainee = Trainee(run)
    found: dict[str, Any] = {}
    checkpoints = Checkpoints(Path(run["folder"]), keep=1, holder=trainee.holder) if "folder" in run else None
    if run.get("loads"):
        assert checkpoints is not None
        assert checkpoints.load(trainee.model, trainee.optimizer, seed=0) is not None
        found["loaded"] = trainee.parameters()
    found |= trainee.train()
    found |= {"evaluated": trainee.evaluate(), "parameters": trainee.parameters()}
    if checkpoints is not None and not run.get("loads"):
        checkpoints.save(TrainState(step=STEPS, tokens=0, seed=0), trainee.model, trainee.optimizer)
    return found


KINDS = {"alone": alone, "shares": shares}


def main() -> None:
    listed = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for each in json.loads(listed.read_text()):
        try:
            results[each["name"]] = KINDS.get(each["kind"], train)(each)
        except Exception as error:
            error.add_note(f"in run {each['name']}")
            raise
    listed.with_name(f"{listed.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
