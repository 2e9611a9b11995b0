"""Train tiny:build on 2 x test cuda: ddp x 2.

    ./launch.sh                # start: checkpoints and metrics.jsonl go to ./out
    ./launch.sh --resume       # go on from the newest checkpoint there
    python export.py FOLDER    # write the model of the newest one as safetensors files

Plan (plan.json)                                              Predicted
  engine        ddp                                           step time    12.3 ms
  mesh          dp_replicate 2                                tokens/s     12.3 k
  shards        none: every process holds all states          MFU          42.0%
  batch         12 = 2 x 6 x 1 micro-batches                  allocated    1 MiB
  precision     float32 throughout                            reserved     2 MiB of 7 GiB
  recomputed    0 of 3 blocks                                 most time    compute (10 ms)

Compiled by shardwright from ../job.yaml. The file is yours to read and change: it needs torch, and beside it
shardwright_runtime/, tiny.py.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets, to_device
from shardwright_runtime.gradients import gradient_norm
from shardwright_runtime.initialize import allocate, parameters_on_meta
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.session import MetricsLog, Signals, process_group, seed_for
from shardwright_runtime.weights import load_weights
from tiny import build as create_model

HERE = Path(__file__).resolve().parent

# The job. These hold for every plan.
MODEL_ARGS: dict[str, Any] = {"width": 32}
WEIGHTS = "/mnt/weights"  # from this file; the folder that training starts from
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
WORLD_SIZE = 2  # processes, one a device
BUCKET_MIB = 64  # gradients are all-reduced in buckets of this size
MICRO_BATCH = 6  # samples of one forward on one device
PREDICTED_STEP_S = 0.01235  # seconds
PREDICTED_PEAK_BYTES = 1048576  # allocated at once on the fullest device


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags for what does not change the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS, help="stop after this step")
    parser.add_argument("--data", type=Path, default=HERE / DATA_ROOT, help="where relative paths of data start")
    parser.add_argument("--weights", type=Path, default=HERE / WEIGHTS, help="safetensors files to start from")
    parser.add_argument("--unused", action="append", default=[], metavar="REGEX", help="stored tensors to leave out")
    return parser.parse_args(argv)


def build_model(device: torch.device) -> nn.Module:
    """The model, its parameters still without values: `load_weights` or a checkpoint gives them theirs."""
    with parameters_on_meta():
        model: nn.Module = create_model(**MODEL_ARGS)
    allocate(model, device)
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


def train(args: argparse.Namespace, rank: int, device: torch.device) -> None:
    """Train from the start, or with --resume from the newest checkpoint, as process `rank` of WORLD_SIZE."""
    model = build_model(device)
    replicated = DistributedDataParallel(
        model,
        device_ids=[device.index],
        bucket_cap_mb=BUCKET_MIB,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,
    )
    optimizer = make_optimizer(model)
    batches = Batches(
        byte_files(args.data, TRAIN_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=rank,
        world_size=WORLD_SIZE,
    )

    checkpoints = Checkpoints(args.out, keep=KEEP_CHECKPOINTS)
    state = TrainState(step=0, tokens=0, seed=SEED)
    if args.resume:
        state = checkpoints.load(model, optimizer, seed=SEED) or state
        if rank == 0:
            print(f"going on after step {state.step}" if state.step else f"no checkpoint in {args.out}: starting anew")
    elif checkpoints.latest() is not None:
        message = f"{args.out} holds checkpoints: go on with --resume, or start anew with another --out"
        raise SystemExit(message if rank == 0 else 1)
    if checkpoints.saved_step is None:
        if rank == 0:
            print(f"starting from the weights in {args.weights}")
        load_weights(model, args.weights, unused=args.unused)
    log = MetricsLog(args.out / "metrics.jsonl", state.step) if rank == 0 else None
    signals = Signals()
    last_step = min(args.steps, TOTAL_STEPS)

    while state.step < last_step:
        began = time.perf_counter()
        torch.cuda.reset_peak_memory_stats(device)
        # Dropout follows from the seed, the step and the process, so resuming needs no saved generator.
        torch.manual_seed(seed_for(SEED, "step", state.step, rank))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step)
        batch = batches(state.step)
        targets = float(learnt_targets([batch]))
        saving = float(signals.save())

        # The loss is divided by the learnt targets of the global batch, so the processes add them up first; in the same
        # message each says whether it was told to stop or to save.
        agreed = torch.tensor([targets, signals.stop, saving], dtype=torch.float64, device=device)
        dist.all_reduce(agreed)
        targets, stopping, saving = agreed.tolist()
        if stopping:
            break

        # DDP averages the gradients over the processes, hence the factor WORLD_SIZE.
        scale = WORLD_SIZE / max(targets, 1.0)
        summed = summed_loss(replicated, to_device(batch, device))
        torch.autograd.backward(summed * scale)
        loss_sum = summed.detach().double()
        grad_norm = gradient_norm(model.parameters())
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), CLIP_GRAD_NORM, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss_sum)
        loss = float(loss_sum) / max(targets, 1.0)
        step_time_s = time.perf_counter() - began
        peak_bytes = torch.cuda.max_memory_allocated(device)
        state = TrainState(step=state.step + 1, tokens=state.tokens + int(targets), seed=SEED)

        if log is not None:
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
                peak_memory_bytes=peak_bytes,
            )
            print(
                f"step {state.step}/{TOTAL_STEPS} loss {loss:.4f}  grad norm {norm:.3f}  {tokens_per_s:,.0f} tokens/s  "
                f"{step_time_s * 1e3:.1f} ms (predicted {PREDICTED_STEP_S * 1e3:.1f})  "
                f"peak {peak_bytes / 2**30:.2f} GiB (predicted {PREDICTED_PEAK_BYTES / 2**30:.2f})"
            )
        if saving:
            checkpoints.save(state, model, optimizer)

    checkpoints.save(state, model, optimizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, join the other processes, train."""
    args = parse_args(argv)
    with process_group("cuda", WORLD_SIZE) as (rank, device):
        train(args, rank, device)


if __name__ == "__main__":
    main()
