"""One of several processes that train a small Transformer as a pipeline, under many timetables, one after another.

Started with the path of a JSON list of runs; each has `name`, `sizes` (ranks of the pipeline, then of the data-parallel
axes, slowest first), `chunks`, `placement`, `timetable`, `passes` (of the pipeline in a step), `clips`, `features`, and
optionally `degrees` (of parameters, gradients and optimizer states; else gradients are all-reduced), `reduce_every`,
`gathers`, `measures` (what is saved for backward), `dtype` and a `fault`. Writes LIST-RANK.json beside that file.
"""

from __future__ import annotations

import functools
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pipeline_meter import Meter
from pipeline_model import (
    BATCH,
    CLIP,
    LENGTH,
    LR,
    MOMENTUM,
    STEPS,
    WIDTH,
    Batch,
    Stage,
    batches,
    build,
    dropout_seed,
    edges_of,
    loss_of,
    parameters_of,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwright.backends.pytorch.runtime.deferred import WeightQueue, defer_weight_gradients
from shardwright.backends.pytorch.runtime.gradients import square_over_groups
from shardwright.backends.pytorch.runtime.messages import Wire
from shardwright.backends.pytorch.runtime.pipeline import Pipeline, Step, Tie
from shardwright.backends.pytorch.runtime.replicas import Replicas
from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates
from shardwright.planner.schedules.lowering import Gathers, Program, lower
from shardwright.planner.schedules.timetable import Action, Layout
from shardwright.planner.schedules.verification import verify

LONGEST_S = 90
"""For `forked.py`: the longest that a process may take."""
CPU = torch.device("cpu")


@dataclass
class Setting:
    """One run's part of this process."""

    run: dict[str, Any]
    mesh: DeviceMesh

    def __post_init__(self) -> None:
        run, self.rank, self.copies = self.run, self.mesh.get_local_rank("pp"), prod(self.run["sizes"][1:])
        self.features = tuple(run["features"])
        names = self.mesh.mesh_dim_names or ()
        self.axes = names[1:]
        self.copy = 0
        for name in self.axes:
            self.copy = self.copy * self.mesh[name].size() + self.mesh.get_local_rank(name)
        self.layout = Layout(run["sizes"][0], run["chunks"], run["placement"])
        self.edges = edges_of(self.layout.stages, self.features)
        all_stages = build(self.layout.stages, self.features)
        own = [self.layout.stage(self.rank, chunk) for chunk in range(self.layout.chunks)]
        self.stages: dict[int, Stage] = {stage: all_stages[stage] for stage in own}
        self.parameters = list(dict.fromkeys(parameters_of(self.stages).values()))
        embed = all_stages[0].embed
        assert embed is not None
        shared = embed.weight
        first, last = self.layout.place(0)[0], self.layout.place(self.layout.stages - 1)[0]
        self.tied = shared if "tied" in self.features and self.rank in (first, last) else None
        self.apart = "tied" in self.features and first != last
        self.copied = self.tied if self.apart and self.rank == last else None
        """A parameter that another rank counts in the norm."""

    @property
    def program(self) -> Program:
        timetable = tuple(tuple(Action(*action) for action in actions) for actions in self.run["timetable"])
        gathers = Gathers(*self.run["gathers"]) if "gathers" in self.run else None
        lowered = lower(
            timetable, self.layout, edges=self.edges, reduce_every=self.run.get("reduce_every"), gathers=gathers
        )
        verify(lowered, self.layout, self.edges, sharded=gathers is not None)
        program = list(lowered[self.rank])
        match self.run.get("fault"):
            case "lost W":
                del program[max(at for at, step in enumerate(program) if step.kind == "W")]
            case "no reduction" if self.rank == 0:
                program = [step for step in program if step.kind != "REDUCE"]
        return tuple(program)

    def states(self, dtype: torch.dtype) -> tuple[ShardedStates | Replicas, dict[int, list[int]], Any]:
        """The states, the units of each stage, and what the optimizer takes."""
        run = self.run
        if "degrees" in run:
            p, g, o = run["degrees"]
            levels = Levels(self.mesh[self.axes], parameters=p, gradients=g, optimizer_states=o)
            sharded = ShardedStates(levels, dtype, kind_of=lambda parameter: int(parameter is self.copied))
        taker: Any = sharded if "degrees" in run else Replicas(self._data_parallel())
        alone = [taker.take([self.tied])] if self.tied is not None else []
        units: dict[int, list[int]] = {}
        for stage, module in self.stages.items():
            has = self.tied is not None and any(each is self.tied for each in module.parameters())
            units[stage] = [taker.take(module.parameters()), *(alone if has else [])]
        if "degrees" in run:
            return taker, units, sharded.parameter_groups([{"counted": True}, {"counted": False}])
        trained = [each for each in self.parameters if each.requires_grad]
        copies = [each for each in trained if each is self.copied]
        counted = [each for each in trained if each is not self.copied]
        return taker, units, [{"counted": True, "params": counted}, {"counted": False, "params": copies}]

    def _data_parallel(self) -> dist.ProcessGroup | None:
        return self.mesh[self.axes[-1]].get_group() if self.copies > 1 else None

    def ties(self, states: Any, pairs: dist.ProcessGroup | None) -> list[Tie]:
        if self.tied is None or not self.apart or self.run.get("fault") == "no tie":
            return []
        assert pairs is not None
        if isinstance(states, Replicas):
            return [Tie([self.tied], pairs)]
        return [Tie(states.parameters(0), pairs)]

    def norm_groups(self) -> list[dist.ProcessGroup]:
        """Over which processes hold different parts of the gradient."""
        degree, groups = 1, [self.mesh.get_group("pp")]
        for name in reversed(self.axes):
            if degree < (self.run["degrees"][2] if "degrees" in self.run else 1):
                groups.append(self.mesh.get_group(name))
            degree *= self.mesh[name].size()
        return groups


def train(run: dict[str, Any], mesh: DeviceMesh, pairs: dist.ProcessGroup | None) -> dict[str, Any]:
    """Trains under one timetable, and evaluates."""
    setting = Setting(run, mesh)
    queue, layout, executed = WeightQueue(), setting.layout, list[Step]()
    dtype = getattr(torch, run.get("dtype", "float32"))
    for module in setting.stages.values():
        defer_weight_gradients(module, queue)
    states, units, groups = setting.states(dtype)
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    meter, at = Meter(setting.parameters), At()

    def loss(output: Any, batch: Batch) -> Tensor:
        return loss_of(output, batch, at.share * (2.0 if batch is at.twice else 1.0))

    def observe(step: Step) -> None:
        executed.append(step)
        meter.after(step, pipeline)

    pipeline = Pipeline(
        setting.program,
        setting.stages,
        ranks=[layout.place(stage)[0] for stage in range(layout.stages)],
        wires={edge: [Wire((BATCH, LENGTH, WIDTH), dtype)] for edge in setting.edges},
        loss=loss,
        queue=queue,
        states=states,
        units=units,
        group=mesh.get_group("pp"),
        device=CPU,
        ties=setting.ties(states, pairs),
        seed=lambda stage, number: dropout_seed(at.step, setting.copy, stage, at.first + number),
        observe=observe,
    )
    losses, norms = [], []
    for at.step in range(STEPS):
        total = 0.0
        for number in range(run["passes"]):
            executed.clear()
            at.first = number * run["micro_batches"]
            at.share = 1 / (run["micro_batches"] * run["passes"] * setting.copies)
            own = batches(at.step, setting.copy, run["micro_batches"], at.first)
            at.twice = own[1] if run.get("fault") == "scale" else None
            with meter.measuring() if run.get("measures") else nullcontext():
                found = pipeline.step(own, last=number == run["passes"] - 1)
            total += 0.0 if found is None else float(found)
        losses.append(total)
        norm = square_over_groups(parameters_in(optimizer, counted=True), setting.norm_groups(), CPU).sqrt()
        norms.append(float(norm))
        if run["clips"]:
            nn.utils.clip_grads_with_norm_(parameters_in(optimizer), CLIP, norm)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(states, ShardedStates):
            states.publish()
    done = [[kind, layout.place(stage)[1], number] for kind, stage, number, _ in executed if kind in "FIWB"]
    for module in setting.stages.values():
        module.eval()
    at.share = 0.5
    evaluated = pipeline.evaluate(batches(99, 0, 2))
    with states.gathered() if isinstance(states, ShardedStates) else nullcontext():
        values = {name: each.flatten().tolist() for name, each in parameters_of(setting.stages).items()}
    return {
        "parameters": values if setting.copy == 0 else {},
        "losses": losses,
        "norms": norms,
        "evaluated": None if evaluated is None else float(evaluated),
        "executed": done,
        "kept": meter.kept,
        "held": meter.held,
        "peak": meter.peak,
    }


@dataclass
class At:
    """Where training is."""

    step: int = 0
    first: int = 0
    """Of the step's micro-batches in this pass."""
    share: float = 1.0
    """Of a micro-batch in the loss."""
    twice: Batch | None = None
    """A micro-batch that counts twice, by mistake."""


def parameters_in(optimizer: torch.optim.Optimizer, counted: bool = False) -> list[nn.Parameter]:
    """What the optimizer works on; `counted`: and no other rank has a copy of in its norm."""
    groups = [group for group in optimizer.param_groups if group["counted"] or not counted]
    return [parameter for group in groups for parameter in group["params"]]


@functools.cache
def mesh_of(sizes: tuple[int, ...]) -> tuple[DeviceMesh, dist.ProcessGroup | None]:
    """A mesh, and the group of this process's pipeline's first and last rank if it is one of them."""
    names = ("pp", *(f"dp_{index}" for index in range(len(sizes) - 1, 0, -1)))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    mine = None
    for pipeline in mesh.mesh.flatten(1).t().tolist() if len(sizes) > 1 else [mesh.mesh.tolist()]:
        ends = sorted({pipeline[0], pipeline[-1]})
        group = dist.new_group(ends)
        if dist.get_rank() in ends:
            mine = group
    return mesh, mine


def main() -> None:
    listed = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for run in json.loads(listed.read_text()):
        try:
            results[run["name"]] = train(run, *mesh_of(tuple(run["sizes"])))
        except RuntimeError as error:
            if run.get("fault") != "lost W":
                raise
            results[run["name"]] = {"error": str(error)}
    listed.with_name(f"{listed.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
