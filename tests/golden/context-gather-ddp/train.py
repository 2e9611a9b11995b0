"""Train tiny:build on 4 x test cpu: ddp x 4, cp 4.

    ./launch.sh             # start: checkpoints and metrics.jsonl go to ./out
    ./launch.sh --resume    # go on from the newest checkpoint there

Plan (plan.json)                                              Predicted
  engine        ddp                                           step time    12.3 ms
  mesh          dp_replicate 4                                tokens/s     12.3 k
  sequences     /4, gather                                    MFU          42.0%
  shards        none: every process holds all states          allocated    1 MiB
  batch         48 = 1 x 48 x 1 micro-batches                 reserved     2 MiB of 8 GiB
  precision     float32 throughout                            most time    compute (10 ms)
  recomputed    0 of 3 blocks

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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets
from shardwright_runtime.gradients import gradient_norm
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.sequence import Sequences, divide_sequence
from shardwright_runtime.session import MetricsLog, Signals, process_group, seed_for
from tiny import build as create_model

HERE = Path(__file__).resolve().parent

# The job. These hold for every plan.
MODEL_ARGS: dict[str, Any] = {"width": 32}
DATA_ROOT = ".."  # from this file; relative paths of data start there
TRAIN_FILES = ("corpus.txt",)
VALIDATION_FILES = ("held-out.txt",)
SEQUENCE_LENGTH = 12  # tokens of one sample
GLOBAL_BATCH = 48  # samples of one optimizer step, all processes together
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
EVALUATE_BATCHES = 8  # most global batches of one evaluation

# The plan. To change it, edit `decision` in plan.json and compile that file: it is checked and predicted again.
WORLD_SIZE = 4  # processes, one a device
BUCKET_MIB = 64  # gradients are all-reduced in buckets of this size
CONTEXT_RANKS = 4  # neighbours among the processes with the same parts share each sequence
CONTEXT_METHOD = "gather"  # how they attend to all of it
CONTEXT_MESH = (1, 4)
CONTEXT_AXES = ("outer", "cp")
MICRO_BATCH = 48  # samples of one forward on one device
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


def build_model(device: torch.device, context: DeviceMesh) -> tuple[nn.Module, Sequences]:
    """The model with its initial weights, the same for every plan."""
    torch.manual_seed(SEED)
    model: nn.Module = create_model(**MODEL_ARGS)
    sequences = divide_sequence(model, BLOCKS, context=context, method=CONTEXT_METHOD, causal=True)
    return model, sequences


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


def summed_loss(model: nn.Module, batch: Batch, sequences: Sequences) -> Tensor:
    """The loss of one micro-batch, summed over its learnt targets; of the positions that this process has."""
    return next_token_loss(model(batch["input_ids"]), sequences.local(batch["targets"]))


@torch.no_grad()
def evaluate(model: nn.Module, sequences: Sequences, batches: Batches, device: torch.device) -> float:
    """Mean loss per held-out target, over the same EVALUATE_BATCHES global batches each time.

    Where they are more than a pass over the held-out samples fills, over as many as it fills; but over one at least,
    which repeats samples if there are fewer than GLOBAL_BATCH.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for number in range(min(EVALUATE_BATCHES, batches.per_pass())):
        batch = batches(number)
        sums[0] += summed_loss(model, batch, sequences)
        sums[1] += learnt_targets([batch])
    dist.all_reduce(sums)
    model.train()
    loss, targets = sums.tolist()
    # Each process has the loss of its own positions, and has counted all.
    return float(loss / max(targets / CONTEXT_RANKS, 1.0))


def train(args: argparse.Namespace, rank: int, device: torch.device) -> None:
    """Train from the start, or with --resume from the newest checkpoint, as process `rank` of WORLD_SIZE."""
    context = init_device_mesh("cpu", CONTEXT_MESH, mesh_dim_names=CONTEXT_AXES)["cp"]
    model, sequences = build_model(device, context)
    replicated = DistributedDataParallel(
        model,
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
    )
    held_out = Batches(
        byte_files(args.data, VALIDATION_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        shuffle=False,
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
    log = MetricsLog(args.out / "metrics.jsonl", state.step) if rank == 0 else None
    signals = Signals()
    last_step = min(args.steps, TOTAL_STEPS)

    while state.step < last_step:
        began = time.perf_counter()
        # Dropout follows from the seed, the step and the process, so resuming needs no saved generator.
        torch.manual_seed(seed_for(SEED, "step", state.step, rank))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step)
        batch = batches(state.step)
        # Several processes read the same samples; one of them counts them.
        targets = float(learnt_targets([batch])) if rank % CONTEXT_RANKS == 0 else 0.0
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
        summed = summed_loss(replicated, batch, sequences)
        torch.autograd.backward(summed * scale)
        loss_sum = summed.detach().double()
        grad_norm = gradient_norm(model.parameters())
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), CLIP_GRAD_NORM, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss_sum)
        loss = float(loss_sum) / max(targets, 1.0)
        step_time_s = time.perf_counter() - began
        state = TrainState(step=state.step + 1, tokens=state.tokens + int(targets), seed=SEED)

        validation: dict[str, float] = {}
        if state.step == last_step:
            validation["validation_loss"] = evaluate(model, sequences, held_out, device)
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
                peak_memory_bytes=None,
                **validation,
            )
            held_out_loss = "".join(f"  held-out loss {value:.4f}" for value in validation.values())
            print(
                f"step {state.step}/{TOTAL_STEPS} loss {loss:.4f}  grad norm {norm:.3f}  {tokens_per_s:,.0f} tokens/s  "
                f"{step_time_s * 1e3:.1f} ms (predicted {PREDICTED_STEP_S * 1e3:.1f})  "
                f"peak n/a (CPU){held_out_loss}"
            )
        if saving:
            checkpoints.save(state, model, optimizer)

    checkpoints.save(state, model, optimizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, join the other processes, train."""
    args = parse_args(argv)
    with process_group("cpu", WORLD_SIZE) as (rank, device):
        train(args, rank, device)


if __name__ == "__main__":
    main()
