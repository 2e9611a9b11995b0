"""Train tiny:build on 16 x test cuda: amsp x 16.

    HEAD=node0 ./launch.sh             # start on each of the 2 nodes: checkpoints and metrics.jsonl go to ./out
    HEAD=node0 ./launch.sh --resume    # go on from the newest checkpoint there

Plan (plan.json)                                              Predicted
  engine        amsp, freed after forward                     step time    12.3 ms
  mesh          dp_2 2 x dp_1 8                               tokens/s     12.3 k
  shards        parameters /16, gradients /16, optimizer /16  MFU          42.0%
  second copy   parameters /8, for backward                   allocated    1 MiB
  int8          gathers over dp_2                             reserved     2 MiB of 7 GiB
  int4          reductions over dp_1, dp_2                    most time    compute (10 ms)
  batch         48 = 16 x 3 x 1 micro-batches
  precision     float32 throughout
  recomputed    0 of 3 blocks

Compiled by shardwright from ../job.yaml. The file is yours to read and change: it needs torch, and beside it
shardwright_runtime/, tiny.py. The engine amsp: run here on CPU with gloo; not yet on a GPU.
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
from torch.distributed.device_mesh import init_device_mesh

from shardwright_runtime.average import update_average
from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets, to_device
from shardwright_runtime.groups import ParameterGroup, kind_of, kind_options
from shardwright_runtime.held_flat import FlatHolder
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.session import MetricsLog, Signals, process_group, seed_for
from shardwright_runtime.states import Levels, ShardedStates
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
NO_DECAY = ("embed*", "positions.*")  # names of further parameters without weight decay
# Parameters with numbers of their own; the first group that matches a name counts.
PARAMETER_GROUPS: list[ParameterGroup] = [
    {"match": ("head.*", "norm.*"), "lr_scale": 0.5, "weight_decay": 0.0},
    {"match": ("blocks.0.*",), "weight_decay": 0.3},
]
CLIP_GRAD_NORM = 1.0  # highest L2 norm of the whole gradient
EMA_DECAY = 0.999  # after each step, average = EMA_DECAY * average + (1 - EMA_DECAY) * parameter
KEEP_CHECKPOINTS = 2  # newest ones; older ones are removed
EVALUATE_EVERY = 50  # steps; also at the end
EVALUATE_BATCHES = 8  # most global batches of one evaluation

# The plan. To change it, edit `decision` in plan.json and compile that file: it is checked and predicted again.
WORLD_SIZE = 16  # processes, one a device
MESH_SHAPE = (2, 8)  # slowest first; each number of shards is a product of the last ones
MESH_AXES = ("dp_2", "dp_1")
PARAMETER_SHARDS = 16  # devices that share one copy of the parameters
GRADIENT_SHARDS = 16  # of the gradients, from one micro-batch to the next
OPTIMIZER_SHARDS = 16  # of the optimizer's states and its fp32 values
SECONDARY_SHARDS = 8  # of a second copy of a block's parameters, which its backward gathers instead
INT8_GATHERS = ("dp_2",)  # axes that parameters are gathered over in 8 bits, rounded
INT4_REDUCTIONS = ("dp_1", "dp_2")  # axes that gradients are sent over in 4 bits, rounded
RESHARD_AFTER_FORWARD = True  # whether a block's gathered parameters are freed between its forward and its backward
MICRO_BATCH = 3  # samples of one forward on one device
BLOCKS = [f"blocks.{index}" for index in range(3)]  # the repeated blocks, in order
PREDICTED_STEP_S = 0.01235  # seconds
PREDICTED_PEAK_BYTES = 1048576  # allocated at once on the fullest device


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags for what does not change the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS, help="stop after this step")
    parser.add_argument("--data", type=Path, default=HERE / DATA_ROOT, help="where relative paths of data start")
    return parser.parse_args(argv)


def build_model(device: torch.device, levels: Levels) -> tuple[nn.Module, ShardedStates]:
    """The model with its initial weights, the same for every plan, and its states: a flat bucket per block."""
    torch.manual_seed(SEED)
    model: nn.Module = create_model(**MODEL_ARGS)
    kinds = kind_of(model, no_decay=NO_DECAY, groups=PARAMETER_GROUPS)
    states = ShardedStates(levels, torch.float32, reshard_after_forward=RESHARD_AFTER_FORWARD, kind_of=kinds)
    for path in BLOCKS:
        block = model.get_submodule(path).to(device)
        states.shard(block)
    model.to(device)
    states.shard(model, root=True)
    return model, states


def make_optimizer(states: ShardedStates) -> torch.optim.Optimizer:
    """AdamW, each parameter with the numbers of its group. Vectors and scalars go without weight decay."""
    groups = states.parameter_groups(kind_options(WEIGHT_DECAY, PARAMETER_GROUPS))
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


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, device: torch.device) -> float:
    """Mean loss per held-out target, over the same EVALUATE_BATCHES global batches each time.

    Where they are more than a pass over the held-out samples fills, over as many as it fills; but over one at least,
    which repeats samples if there are fewer than GLOBAL_BATCH.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for number in range(min(EVALUATE_BATCHES, batches.per_pass())):
        batch = batches(number)
        sums[0] += summed_loss(model, to_device(batch, device))
        sums[1] += learnt_targets([batch])
    dist.all_reduce(sums)
    model.train()
    loss, targets = sums.tolist()
    return float(loss / max(targets, 1.0))


def train(args: argparse.Namespace, rank: int, device: torch.device) -> None:
    """Train from the start, or with --resume from the newest checkpoint, as process `rank` of WORLD_SIZE."""
    mesh = init_device_mesh("cuda", MESH_SHAPE, mesh_dim_names=MESH_AXES)
    levels = Levels(
        mesh,
        parameters=PARAMETER_SHARDS,
        gradients=GRADIENT_SHARDS,
        optimizer_states=OPTIMIZER_SHARDS,
        secondary=SECONDARY_SHARDS,
        int8_gathers=INT8_GATHERS,
        int4_reductions=INT4_REDUCTIONS,
    )
    model, states = build_model(device, levels)
    optimizer = make_optimizer(states)
    batches = Batches(
        byte_files(args.data, TRAIN_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=rank,
        world_size=WORLD_SIZE,
    )
    held_out = Batches(
        byte_files(args.data, VALIDATION_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=rank,
        world_size=WORLD_SIZE,
        shuffle=False,
    )

    checkpoints = Checkpoints(args.out, keep=KEEP_CHECKPOINTS, holder=FlatHolder(states))
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
        torch.cuda.reset_peak_memory_stats(device)
        # Dropout follows from the seed, the step and the process, so resuming needs no saved generator.
        torch.manual_seed(seed_for(SEED, "step", state.step, rank))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step) * group["lr_scale"]
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

        # The gradients of all processes are added up, so each is a share of the mean over the global batch.
        scale = 1.0 / max(targets, 1.0)
        summed = summed_loss(model, to_device(batch, device))
        states.backward(summed * scale, last=True)
        loss_sum = summed.detach().double()
        grad_norm = states.gradient_norm()
        torch.nn.utils.clip_grads_with_norm_(states.parameters(), CLIP_GRAD_NORM, grad_norm)
        optimizer.step()
        update_average(optimizer, EMA_DECAY)
        states.publish()  # the new values travel while the next forward computes
        dist.all_reduce(loss_sum)
        loss = float(loss_sum) / max(targets, 1.0)
        step_time_s = time.perf_counter() - began
        peak_bytes = torch.cuda.max_memory_allocated(device)
        state = TrainState(step=state.step + 1, tokens=state.tokens + int(targets), seed=SEED)

        validation: dict[str, float] = {}
        if state.step % EVALUATE_EVERY == 0 or state.step == last_step:
            validation["validation_loss"] = evaluate(model, held_out, device)
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
                **validation,
            )
            held_out_loss = "".join(f"  held-out loss {value:.4f}" for value in validation.values())
            print(
                f"step {state.step}/{TOTAL_STEPS} loss {loss:.4f}  grad norm {norm:.3f}  {tokens_per_s:,.0f} tokens/s  "
                f"{step_time_s * 1e3:.1f} ms (predicted {PREDICTED_STEP_S * 1e3:.1f})  "
                f"peak {peak_bytes / 2**30:.2f} GiB (predicted {PREDICTED_PEAK_BYTES / 2**30:.2f}){held_out_loss}"
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
