"""A model run as stages that hand each other their tensors in one process, and run whole."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shardwright.backends.pytorch.runtime.deferred import WeightQueue, defer_weight_gradients
from shardwright.backends.pytorch.runtime.pipeline import Pipeline
from shardwright.backends.pytorch.runtime.replicas import Replicas
from shardwright.backends.pytorch.runtime.stages import Stages, stages_of
from shardwright.planner.schedules.lowering import lower
from shardwright.planner.schedules.timetable import Layout
from support.pipeline_orders import random_timetable
from support.stages_models import WIDTH, Case, language_loss, tokens
from support.tiny import Tiny

Gradients = dict[str, Tensor]


def whole(case: Case, count: int = 1) -> tuple[float, Gradients]:
    """Sum of the losses of some micro-batches, and all gradients."""
    model = copy.deepcopy(case.model)
    torch.manual_seed(0)
    losses = [case.forward(model, case.batch(number)) for number in range(count)]
    torch.autograd.backward(losses)
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return float(torch.stack(losses).detach().sum()), gradients


def cut(case: Case, cuts: list[int], **changes: Any) -> Stages:
    """All stages of a model."""
    settings = {"own": range(len(cuts) + 1), "forward": case.forward, "batch": case.batch(0)} | changes
    return stages_of(case.model, case.blocks, cuts, **settings)


def pipeline_of(case: Case, stages: Stages, count: int) -> Pipeline:
    """The stages under a random timetable."""
    queue, states, layout = WeightQueue(), Replicas(), Layout(1, len(stages.stages))
    defer_weight_gradients(case.model, queue)
    edges = list(stages.wires)
    parameters = dict(case.model.named_parameters(remove_duplicate=False))
    taken = {stage: states.take(parameters[name] for name in stages.parameters(stage)) for stage in stages.stages}
    return Pipeline(
        list(lower(random_timetable(layout, count, edges, seed=3), layout, edges=edges)[0]),
        stages.stages,
        ranks=[0] * len(stages.stages),
        wires=stages.wires,
        loss=lambda output, _: output,
        queue=queue,
        states=states,
        units={stage: [unit] for stage, unit in taken.items()},
        device=torch.device("cpu"),
    )


def in_stages(case: Case, cuts: list[int], count: int = 1, **changes: Any) -> tuple[float, Gradients]:
    """As `whole`, stage by stage."""
    pipeline = pipeline_of(case, cut(case, cuts, **changes), count)
    torch.manual_seed(0)
    loss = pipeline.step([case.batch(number) for number in range(count)])
    assert loss is not None
    return float(loss), {name: each.grad for name, each in case.model.named_parameters() if each.grad is not None}


def gpt(dropout: float = 0.0, tied: bool = True, checkpointed: bool = False) -> Case:
    """A small GPT."""
    model = Tiny(WIDTH, 4, dropout, tied)
    if checkpointed:
        for block in list(model.blocks)[:3]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return Case(model, [f"blocks.{at}" for at in range(4)], language_loss, tokens)
