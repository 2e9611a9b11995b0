"""One process, plain PyTorch, whole batches: what every emitted script must reproduce. Shares only the batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.backends.pytorch.runtime.data import Batches, byte_files
from shardwright.schemas.job import JobSpec
from support.tiny import build


@dataclass
class Trained:
    """What a run left: one number a step, and the parameters at its end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def train_plainly(job: JobSpec, folder: Path) -> Trained:
    """Train the tiny model as the job says, in fp32, one global batch at a time."""
    train, optim = job.train, job.train.optimizer
    assert job.data.bytes is not None
    samples = byte_files(folder, job.data.bytes, train.sequence_length, job.data.mask)
    size = train.global_batch_sequences
    batches = Batches(samples, seed=train.seed, global_batch=size, micro_batch=size)
    torch.manual_seed(train.seed)
    model = build(**job.model.args)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
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
            group["lr"] = optim.lr * ((step + 1) / warmup if step < warmup else falling)
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
        trained.losses.append(loss.item())
        trained.norms.append(float(norm))
        trained.tokens.append(int(learnt.sum()))
    trained.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return trained
