"""One of several processes that run unmodified models as pipelines, one after another.

Started with the path of a JSON list of runs; each has `name`, `model` (a function of `stages_models.py`), `cuts`, and
`family` of the schedule. Writes LIST-RANK.json beside that file: for each run, the gradients of this process's
parameters, and the loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import stages_models
import torch
import torch.distributed as dist
from torch import nn

from shardwright.backends.pytorch.runtime.deferred import WeightQueue, defer_weight_gradients
from shardwright.backends.pytorch.runtime.pipeline import Pipeline
from shardwright.backends.pytorch.runtime.replicas import Replicas
from shardwright.backends.pytorch.runtime.stages import stages_of
from shardwright.planner.schedules.lowering import lower
from shardwright.planner.schedules.table import make_schedule

COUNT = 6
"""Micro-batches."""
UNIT = (1.0, 1.0, 1.0, 0.0)


def run(case: stages_models.Case, cuts: list[int], family: str) -> dict[str, Any]:
    """One step of a model's pipeline."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layout, _, timetable = make_schedule(family, world, COUNT, UNIT)
    own = [layout.stage(rank, chunk) for chunk in range(layout.chunks)]
    stages = stages_of(case.model, case.blocks, cuts, own, case.forward, case.batch(0))
    used = {name for stage in own for name in stages.parameters(stage)}
    for path, module in case.model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if f"{path}.{name}".lstrip(".") not in used:
                setattr(module, name, nn.Parameter(parameter.detach().to("meta")))
    queue, states = WeightQueue(), Replicas()
    defer_weight_gradients(case.model, queue)
    parameters = dict(case.model.named_parameters())
    pipeline = Pipeline(
        lower(timetable, layout, edges=list(stages.wires))[rank],
        stages.stages,
        ranks=[layout.place(stage)[0] for stage in range(layout.stages)],
        wires=stages.wires,
        loss=lambda output, _: output / COUNT,
        queue=queue,
        states=states,
        units={stage: [states.take(parameters[name] for name in stages.parameters(stage))] for stage in own},
        device=torch.device("cpu"),
        seed=lambda stage, number: stage * COUNT + number,
    )
    loss = pipeline.step([case.batch(number) for number in range(COUNT)])
    gradients = {name: each.grad.tolist() for name, each in parameters.items() if each.grad is not None}
    return {"gradients": gradients, "loss": None if loss is None else float(loss), "used": sorted(used)}


def main() -> None:
    listed = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for each in json.loads(listed.read_text()):
        torch.manual_seed(0)
        results[each["name"]] = run(getattr(stages_models, each["model"])(), each["cuts"], each["family"])
    listed.with_name(f"{listed.stem}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
