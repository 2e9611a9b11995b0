"""Train tiny:build on 1 x test cpu: single x 1.

    python train.py             # start: checkpoints and metrics.jsonl go to ./out
    python train.py --resume    # go on from the newest checkpoint there

Plan (plan.json)                                              Predicted
  engine        single                                        step time    12.3 ms
  mesh          one process                                   tokens/s     12.3 k
  shards        none: every process holds all states          MFU          42.0%
  batch         12 = 1 x 12 x 1 micro-batches                 allocated    1 MiB
  precision     float32 throughout                            reserved     2 MiB of 8 GiB
  recomputed    3 of 3 blocks                                 most time    compute (10 ms)

Compiled by shardwright from ../job.yaml. The file is yours to read and change: it needs torch, and beside it
shardwright_runtime/, tiny.py.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets
from shardwright_runtime.gradients import gradient_norm
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.session import MetricsLog, Signals, only_device, seed_for
from tiny import build as create_model

HERE = Path(__file__).resolve().parent

# The job. These hold for every plan.
MODEL_ARGS: dict[str, Any] = {"width": 32}
DATA_ROOT = ".."  # from this file; relative paths of data start there
TRAIN_FILES = ("corpus.txt",)
SEQUENCE_LENGTH = 12  # tokens of one sample
GLOBAL_BATCH = 12  # samples of one optimizer step, all processes together
TOTAL_STEPS = 4  # optimizer steps; the learning rate is planned over them
SEED = 0  # of weights, batches and dropout
LEARNING_RATE = 0.01  # the highest
WARMUP_STEPS = 2  # of rising learning rate
FINAL_RATIO = 0.1  # of LEARNING_RATE, at the last step
BETAS = (0.9, 0.95)
EPSILON = 1e-08
WEIGHT_DECAY = 0.1  # of matrices
CLIP_GRAD_NORM = 1.0  # highest L2 norm of the whole gradient
KEEP_CHECKPOINTS = 2  # newest ones; older ones are removed

# The plan. To change it, edit `decision` in plan.json and compile that file: it is checked and predicted again.
WORLD_SIZE = 1  # processes, one a device
MICRO_BATCH = 12  # samples of one forward on one device
BLOCKS = [f"blocks.{index}" for index in range(3)]  # the repeated blocks, in order
PREDICTED_STEP_S = 0.01235  # seconds


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags for what does not change the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS, help="stop after this step")
    parser.add_argument("--data", type=Path, default=HERE / DATA_ROOT, help="where relative paths of data start")
    return parser.parse_args(argv)


def build_model(device: torch.device) -> nn.Module:
    """The model with its initial weights, the same for every plan."""
    torch.manual_seed(SEED)
    model: nn.Module = create_model(**MODEL_ARGS)
    for path in BLOCKS:
        block = model.get_submodule(path)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW. Weight decay is for matrices: vectors and scalars (norms, biases) go without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)


def learning_rate(step: int) -> float:
    """Of the step after `step` steps: rising linearly, then falling as half a cosine."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, TOTAL_STEPS - 1 - WARMUP_STEPS)
    return LEARNING_RATE * (FINAL_RATIO + (1.0 - FINAL_RATIO) * (1.0 + math.cos(math.pi * progress)) / 2.0)


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of one micro-batch, summed over its learnt targets."""
    return next_token_loss(model(batch["input_ids"]), batch["targets"])


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train from the start, or with --resume from the newest checkpoint."""
    model = build_model(device)
    optimizer = make_optimizer(model)
    batches = Batches(
        byte_files(args.data, TRAIN_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
    )

    checkpoints = Checkpoints(args.out, keep=KEEP_CHECKPOINTS)
    state = TrainState(step=0, tokens=0, seed=SEED)
    if args.resume:
        state = checkpoints.load(model, optimizer, seed=SEED) or state
        print(f"going on after step {state.step}" if state.step else f"no checkpoint in {args.out}: starting anew")
    elif checkpoints.latest() is not None:
        message = f"{args.out} holds checkpoints: go on with --resume, or start anew with another --out"
        raise SystemExit(message)
    log = MetricsLog(args.out / "metrics.jsonl", state.step)
    signals = Signals()
    last_step = min(args.steps, TOTAL_STEPS)

    while state.step < last_step:
        began = time.perf_counter()
        # Dropout follows from the seed, the step and the process, so resuming needs no saved generator.
        torch.manual_seed(seed_for(SEED, "step", state.step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step)
        batch = batches(state.step)
        targets = float(learnt_targets([batch]))
        saving = float(signals.save())
        if signals.stop:
            break

        summed = summed_loss(model, batch)
        torch.autograd.backward(summed / max(targets, 1.0))
        loss_sum = summed.detach()
        grad_norm = gradient_norm(model.parameters())
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), CLIP_GRAD_NORM, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(loss_sum) / max(targets, 1.0)
        step_time_s = time.perf_counter() - began
        state = TrainState(step=state.step + 1, tokens=state.tokens + int(targets), seed=SEED)

        norm, tokens_per_s = float(grad_norm), GLOBAL_BATCH * SEQUENCE_LENGTH / step_time_s
        log.write(
            step=state.step,
            loss=loss,
            grad_norm=norm,
            lr=learning_rate(state.step - 1),
            tokens=int(targets),
            tokens_seen=state.tokens,
            tokens_per_s=tokens_per_s,
            step_time_s=step_time_s,
            peak_memory_bytes=None,
        )
        print(
            f"step {state.step}/{TOTAL_STEPS} loss {loss:.4f}  grad norm {norm:.3f}  {tokens_per_s:,.0f} tokens/s  "
            f"{step_time_s * 1e3:.1f} ms (predicted {PREDICTED_STEP_S * 1e3:.1f})  "
            "peak n/a (CPU)"
        )
        if saving:
            checkpoints.save(state, model, optimizer)

    checkpoints.save(state, model, optimizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, join the other processes, train."""
    args = parse_args(argv)
    train(args, only_device("cpu"))


if __name__ == "__main__":
    main()
