"""Train tiny on 8 x test cpu: amsp x 4, tp 2.

    ./launch.sh             # start: checkpoints and metrics.jsonl go to ./out
    ./launch.sh --resume    # go on from the newest checkpoint there

Plan (plan.json)                                              Predicted
  engine        amsp, freed after forward                     step time    12.3 ms
  mesh          dp_2 2 x dp_1 2 x tp 2                        tokens/s     12.3 k
  tensors       /2                                            MFU          42.0%
  shards        parameters /2, gradients /4, optimizer /4     allocated    1 MiB
  batch         48 = 4 x 12 x 1 micro-batches                 reserved     2 MiB of 8 GiB
  precision     float32 throughout                            most time    compute (10 ms)
  recomputed    0 of 12 blocks

Compiled by shardwright from ../job.yaml. The file is yours to read and change: it needs torch, transformers, and
beside it shardwright_runtime/. The engine amsp: run here on CPU with gloo; not yet on a GPU.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from transformers import AutoConfig, GPT2LMHeadModel

from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets
from shardwright_runtime.divided_holder import DividedHolder
from shardwright_runtime.held_flat import FlatHolder
from shardwright_runtime.initialize import initialize, parameters_on_meta
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.session import MetricsLog, Signals, process_group, seed_for
from shardwright_runtime.shares import share_of
from shardwright_runtime.states import Levels, ShardedStates
from shardwright_runtime.tensor_parallel import Column, Region, Row, Vocabulary, matching
from shardwright_runtime.tensor_parallel_loss import divide_cross_entropy

HERE = Path(__file__).resolve().parent

# The job. These hold for every plan.
DATA_ROOT = ".."  # from this file; relative paths of data start there
TRAIN_FILES = ("corpus.txt",)
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

# The plan. To change it, edit `decision` in plan.json and compile that file: it is checked and predicted again.
WORLD_SIZE = 8  # processes, one a device
MESH_SHAPE = (2, 2, 2)  # slowest first; each number of shards is a product of the last dp ones
MESH_AXES = ("dp_2", "dp_1", "tp")
PARAMETER_SHARDS = 2  # devices that share one copy of the parameters
GRADIENT_SHARDS = 4  # of the gradients, from one micro-batch to the next
OPTIMIZER_SHARDS = 4  # of the optimizer's states and its fp32 values
TENSOR_RANKS = 2  # neighbouring processes that share every layer
COPIES = 4  # processes that have the same part of every layer, each with its own samples
# Of the modules that each pattern names: how their parameters are divided, and what enters and leaves there.
TENSOR_PARALLEL: dict[str, ParallelStyle] = {
    "transformer.wte": Vocabulary(dims={"weight": 0}),
    "transformer.h.*.attn": Region(attributes=("embed_dim", "num_heads", "split_size"), units=4),
    "transformer.h.*.attn.c_attn": Column(
        dims={"bias": 0, "weight": 1}, units=4, parts={"bias": (64, 64, 64), "weight": (64, 64, 64)}
    ),
    "transformer.h.*.attn.c_proj": Row(dims={"weight": 0}, units=4),
    "transformer.h.*.mlp.c_fc": Column(enters=True, dims={"bias": 0, "weight": 1}, units=256),
    "transformer.h.*.mlp.c_proj": Row(dims={"weight": 0}, units=256),
    "lm_head": Column(enters=True, dims={"weight": 0}),
}
HEAD = "lm_head"  # the module that makes the logits, which are never whole
RESHARD_AFTER_FORWARD = True  # whether a block's gathered parameters are freed between its forward and its backward
MICRO_BATCH = 12  # samples of one forward on one device
BLOCKS = [f"transformer.h.{index}" for index in range(12)]  # the repeated blocks, in order
PREDICTED_STEP_S = 0.01235  # seconds


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags for what does not change the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS, help="stop after this step")
    parser.add_argument("--data", type=Path, default=HERE / DATA_ROOT, help="where relative paths of data start")
    return parser.parse_args(argv)


def build_model(device: torch.device, mesh: DeviceMesh, levels: Levels) -> tuple[nn.Module, ShardedStates]:
    """The model and its states: one block at a time is initialised and cut up, so no process ever holds it whole."""
    config = AutoConfig.from_pretrained(HERE / "model_config.json", use_cache=False)
    with parameters_on_meta():
        model: nn.Module = GPT2LMHeadModel(config)
    parallelize_module(model, mesh["tp"], matching(model, TENSOR_PARALLEL))
    divide_cross_entropy(model, HEAD, mesh["tp"])
    states = ShardedStates(
        levels, torch.float32, reshard_after_forward=RESHARD_AFTER_FORWARD, share_of=share_of(model, TENSOR_RANKS)
    )
    for path in BLOCKS:
        initialize(model, path, seed=SEED, device=device)
        block = model.get_submodule(path)
        states.shard(block)
    initialize(model, "", seed=SEED, device=device)
    states.shard(model, root=True)
    return model, states


def make_optimizer(states: ShardedStates) -> torch.optim.Optimizer:
    """AdamW. Weight decay is for matrices: vectors and scalars (norms, biases) go without."""
    groups = states.parameter_groups([{"weight_decay": WEIGHT_DECAY}, {"weight_decay": 0.0}])
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)


def learning_rate(step: int) -> float:
    """Of the step after `step` steps: rising linearly, then falling as half a cosine."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, TOTAL_STEPS - 1 - WARMUP_STEPS)
    return LEARNING_RATE * (FINAL_RATIO + (1.0 - FINAL_RATIO) * (1.0 + math.cos(math.pi * progress)) / 2.0)


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of one micro-batch, summed over its learnt targets."""
    return next_token_loss(model(input_ids=batch["input_ids"]), batch["targets"])


def train(args: argparse.Namespace, rank: int, device: torch.device) -> None:
    """Train from the start, or with --resume from the newest checkpoint, as process `rank` of WORLD_SIZE."""
    mesh = init_device_mesh("cpu", MESH_SHAPE, mesh_dim_names=MESH_AXES)
    copy, part = divmod(rank, TENSOR_RANKS)  # among the processes with the same parts, and the part of every layer
    levels = Levels(
        mesh[MESH_AXES[:-1]],
        parameters=PARAMETER_SHARDS,
        gradients=GRADIENT_SHARDS,
        optimizer_states=OPTIMIZER_SHARDS,
    )
    model, states = build_model(device, mesh, levels)
    optimizer = make_optimizer(states)
    batches = Batches(
        byte_files(args.data, TRAIN_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=copy,
        world_size=COPIES,
    )

    holder = DividedHolder(model, FlatHolder(states), tensor=mesh["tp"])
    checkpoints = Checkpoints(args.out, keep=KEEP_CHECKPOINTS, holder=holder)
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
        # Dropout follows from the seed, the step and the copy of the model, so resuming needs no saved generator.
        torch.manual_seed(seed_for(SEED, "step", state.step, copy))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step)
        batch = batches(state.step)
        # Several processes read the same samples; one of them counts them.
        targets = float(learnt_targets([batch])) if part == 0 else 0.0
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
        summed = summed_loss(model, batch)
        states.backward(summed * scale, last=True)
        loss_sum = summed.detach().double()
        grad_norm = states.gradient_norm()
        torch.nn.utils.clip_grads_with_norm_(states.parameters(), CLIP_GRAD_NORM, grad_norm)
        optimizer.step()
        states.publish()  # the new values travel while the next forward computes
        dist.all_reduce(loss_sum)
        loss = float(loss_sum) / TENSOR_RANKS / max(targets, 1.0)
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
