"""What the processes of `pipeline_worker.py` must find: by training in one process without any pipeline."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from support.pipeline_model import (
    CLIP,
    LR,
    MOMENTUM,
    STEPS,
    Batch,
    Stage,
    batches,
    build,
    dropout_seed,
    edges_of,
    loss_of,
    parameters_of,
)


class Trained(NamedTuple):
    """What one process found."""

    parameters: dict[str, Tensor]
    losses: list[float]
    """Of each step, of the first copy's micro-batches."""
    norms: list[float]
    evaluated: float


@functools.cache
def train_plainly(
    stages: int, micro_batches: int, copies: int, passes: int, clips: bool, features: tuple[str, ...]
) -> Trained:
    """A plain loop over all micro-batches of all data-parallel copies; each is one forward and one backward."""
    modules = build(stages, features)
    parameters = parameters_of(dict(enumerate(modules)))
    trained = [each for each in dict.fromkeys(parameters.values()) if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM)
    losses, norms = [], []
    count = micro_batches * passes
    for step in range(STEPS):
        first_copy = []
        for copy in range(copies):
            for number, batch in enumerate(batches(step, copy, count)):
                loss = run(modules, features, batch, (step, copy, number), 1 / (count * copies))
                torch.autograd.backward(loss)
                first_copy += [loss.detach()] if copy == 0 else []
        norms.append(float(nn.utils.get_total_norm([each.grad for each in trained if each.grad is not None])))
        if clips:
            nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(torch.stack(first_copy).sum()))
    for module in modules:
        module.eval()
    with torch.no_grad():
        held_out = [run(modules, features, batch, (99, 0, 0), 0.5) for batch in batches(99, 0, 2)]
    return Trained({name: each.detach() for name, each in parameters.items()}, losses, norms, float(sum(held_out)))


def train_in_bf16(stages: int, micro_batches: int, copies: int) -> dict[str, Tensor]:
    """As `train_plainly`, with parameters in bf16 and gradients and the optimizer's values in fp32."""
    modules = build(stages, ())
    parameters = parameters_of(dict(enumerate(modules)))
    master = {name: nn.Parameter(value.detach().clone()) for name, value in parameters.items()}
    for module in modules:
        module.bfloat16()
    optimizer = torch.optim.SGD(master.values(), lr=LR, momentum=MOMENTUM)
    for step in range(STEPS):
        sums = [{name: torch.zeros_like(value) for name, value in master.items()} for _ in range(copies)]
        for copy, total in enumerate(sums):
            for number, batch in enumerate(batches(step, copy, micro_batches)):
                where = (step, copy, number)
                torch.autograd.backward(run(modules, (), batch, where, 1 / (micro_batches * copies)))
                for name, parameter in parameters.items():
                    assert parameter.grad is not None
                    total[name] += parameter.grad
                    parameter.grad = None
        for name, value in master.items():
            value.grad = functools.reduce(torch.add, [total[name] for total in sums])
        optimizer.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(master[name])
    return {name: parameter.detach() for name, parameter in parameters.items()}


def run(
    modules: list[Stage], features: tuple[str, ...], batch: Batch, where: tuple[int, int, int], share: float
) -> Tensor:
    """One forward; `where` is step, copy and micro-batch."""
    step, copy, number = where
    edges, made = edges_of(len(modules), features), dict[tuple[int, int], Tensor]()
    output: Any = None
    for stage, module in enumerate(modules):
        received = [made[edge] for edge in edges if edge[1] == stage]
        torch.manual_seed(dropout_seed(step, copy, stage, number))
        output = module(batch, *received)
        if stage < len(modules) - 1:
            made |= dict(zip([edge for edge in edges if edge[0] == stage], output, strict=True))
    return loss_of(output, batch, share)
