"""Train tiny:build on 4 x test cpu: amsp x 4.

    ./launch.sh             # start: checkpoints and metrics.jsonl go to ./out
    ./launch.sh --resume    # go on from the newest checkpoint there

Plan (plan.json)                                              Predicted
  engine        amsp                                          step time    12.3 ms
  mesh          dp_2 2 x dp_1 2                               tokens/s     12.3 k
  shards        parameters /1, gradients /4, optimizer /4     MFU          42.0%
  batch         48 = 4 x 6 x 2 micro-batches                  allocated    1 MiB
  precision     float32 throughout                            reserved     2 MiB of 8 GiB
  recomputed    3 of 3 blocks                                 most time    compute (10 ms)

Compiled by shardwright from ../job.yaml. The file is yours to read and change: it needs torch, and beside it
shardwright_runtime/, tiny.py. The engine amsp: run here on CPU with gloo; not yet on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets
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
SEQUENCE_LENGTH = 12  # tokens of one sample
GLOBAL_BATCH = 48  # samples of one optimizer step, all processes together
TOTAL_STEPS = 4  # optimizer steps; the learning rate is planned over them
SEED = 0  # of weights, batches and dropout
LEARNING_RATE = 0.1  # the highest
WARMUP_STEPS = 3  # of rising learning rate
FINAL_RATIO = 0.0  # of LEARNING_RATE, at the last step
MOMENTUM = 0.9
WEIGHT_DECAY = 0.1  # of matrices
KEEP_CHECKPOINTS = 2  # newest ones; older ones are removed

# The plan. To change it, edit `decision` in plan.json and compile that file: it is checked and predicted again.
WORLD_SIZE = 4  # processes, one a device
MESH_SHAPE = (2, 2)  # slowest first; each number of shards is a product of the last ones
MESH_AXES = ("dp_2", "dp_1")
PARAMETER_SHARDS = 1  # devices that share one copy of the parameters
GRADIENT_SHARDS = 4  # of the gradients, from one micro-batch to the next
OPTIMIZER_SHARDS = 4  # of the optimizer's states and its fp32 values
MICRO_BATCH = 6  # samples of one forward on one device
ACCUMULATION = 2  # micro-batches of one step on one device
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


def build_model(device: torch.device, levels: Levels) -> tuple[nn.Module, ShardedStates]:
    """The model with its initial weights, the same for every plan, and its states: a flat bucket per block."""
    torch.manual_seed(SEED)
    model: nn.Module = create_model(**MODEL_ARGS)
    states = ShardedStates(levels, torch.float32)
    for path in BLOCKS:
        block = model.get_submodule(path)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        states.shard(block)
    states.shard(model, root=True)
    return model, states


def make_optimizer(states: ShardedStates) -> torch.optim.Optimizer:
    """SGD with momentum. Weight decay is for matrices: vectors and scalars (norms, biases) go without."""
    groups = states.parameter_groups([{"weight_decay": WEIGHT_DECAY}, {"weight_decay": 0.0}])
    return torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)


def learning_rate(step: int) -> float:
    """Of the step after `step` steps: rising linearly, then falling linearly."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, TOTAL_STEPS - 1 - WARMUP_STEPS)
    return LEARNING_RATE * (1.0 + (FINAL_RATIO - 1.0) * progress)


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of one micro-batch, summed over its learnt targets."""
    return next_token_loss(model(batch["input_ids"]), batch["targets"])


def train(args: argparse.Namespace, rank: int, device: torch.device) -> None:
    """Train from the start, or with --resume from the newest checkpoint, as process `rank` of WORLD_SIZE."""
    mesh = init_device_mesh("cpu", MESH_SHAPE, mesh_dim_names=MESH_AXES)
    levels = Levels(
        mesh,
        parameters=PARAMETER_SHARDS,
        gradients=GRADIENT_SHARDS,
        optimizer_states=OPTIMIZER_SHARDS,
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
        # Dropout follows from the seed, the step and the process, so resuming needs no saved generator.
        torch.manual_seed(seed_for(SEED, "step", state.step, rank))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step)
        micro_batches = [batches(state.step, micro) for micro in range(ACCUMULATION)]
        targets = float(learnt_targets(micro_batches))
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
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for micro, batch in enumerate(micro_batches):
            summed = summed_loss(model, batch)
            # The last backward reduces what has added up to where the optimizer needs it.
            states.backward(summed * scale, last=micro == ACCUMULATION - 1)
            loss_sum += summed.detach()
        grad_norm = states.gradient_norm()
        optimizer.step()
        states.publish()  # the new values travel while the next forward computes
        dist.all_reduce(loss_sum)
        loss = float(loss_sum) / max(targets, 1.0)
        step_time_s = time.perf_counter() - began
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
    with process_group("cpu", WORLD_SIZE) as (rank, device):
        train(args, rank, device)


if __name__ == "__main__":
    main()
