"""One process, plain PyTorch, whole batches: what every emitted script must reproduce. Shares only the batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime.data import Batches, byte_files
from shardwright.schemas.job import JobSpec, OptimizerSpec
from shardwright.schemas.plan import Plan
from support.plans import make_plan
from support.tiny import build


@dataclass
class Trained:
    """What a run left: one number a step, and the parameters and their moving averages at its end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)


def one_group(name: str, parameter: nn.Parameter, optim: OptimizerSpec) -> dict[str, Any]:
    """A parameter's group of one. No name of a tied parameter but its first is looked at."""

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    own = [group for group in optim.groups if matches(group.match)][:1]
    decay = next((group.weight_decay for group in own if group.weight_decay is not None), optim.weight_decay)
    exempt = parameter.ndim < 2 or (optim.no_decay != "auto" and matches(optim.no_decay))
    scale = own[0].lr_scale if own else 1.0
    return {"params": [parameter], "weight_decay": 0.0 if exempt else decay, "scale": scale}


def train_plainly(job: JobSpec, folder: Path) -> Trained:
    """Train the tiny model as the job says, in fp32, one global batch at a time."""
    train, optim = job.train, job.train.optimizer
    assert job.data.bytes is not None
    samples = byte_files(folder, job.data.bytes, train.sequence_length, job.data.mask)
    size = train.global_batch_sequences
    batches = Batches(samples, seed=train.seed, global_batch=size, micro_batch=size)
    torch.manual_seed(train.seed)
    model = build(**job.model.args)
    groups = [one_group(name, parameter, optim) for name, parameter in model.named_parameters()]
    if optim.name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    else:
        optimizer = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    trained = Trained()
    for step in range(train.total_steps):
        warmup = train.schedule.warmup.value
        progress = (step - warmup) / max(1, train.total_steps - 1 - warmup)
        falling = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * optim.lr * ((step + 1) / warmup if step < warmup else falling)
        batch = batches(step)
        learnt = batch["targets"].flatten() != -100
        logits = model(batch["input_ids"]).flatten(0, 1)[learnt]
        loss = F.cross_entropy(logits, batch["targets"].flatten()[learnt])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters() if p.grad is not None))
        for p in model.parameters():
            if optim.clip_grad_norm is not None and p.grad is not None and norm > optim.clip_grad_norm:
                p.grad *= optim.clip_grad_norm / float(norm)
        optimizer.step()
        for name, p in model.named_parameters() if train.ema is not None else ():
            before = trained.averages.get(name, p.detach())
            trained.averages[name] = train.ema * before + (1 - train.ema) * p.detach()
        trained.losses.append(loss.item())
        trained.norms.append(float(norm))
        trained.tokens.append(int(learnt.sum()))
    trained.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return trained


def plain(plan: Plan, folder: Path) -> Trained:
    """`train_plainly` of a plan's job, once for all clusters."""
    return _plain(plan.job.model_copy(update={"cluster": make_plan().job.cluster}).model_dump_json(), folder)


@cache
def _plain(text: str, folder: Path) -> Trained:
    return train_plainly(JobSpec.model_validate_json(text), folder)
