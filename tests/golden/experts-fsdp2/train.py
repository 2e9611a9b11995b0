"""Train tiny on 8 x test cuda: fsdp2 x 8, ep 2.

    ./launch.sh             # start: checkpoints and metrics.jsonl go to ./out
    ./launch.sh --resume    # go on from the newest checkpoint there

Plan (plan.json)                                              Predicted
  engine        fsdp2, freed after forward                    step time    12.3 ms
  mesh          dp_replicate 2 x dp_shard 4                   tokens/s     12.3 k
  experts       /2                                            MFU          42.0%
  shards        parameters /4, gradients /4, optimizer /4     allocated    1 MiB
  batch         48 = 8 x 6 x 1 micro-batches                  reserved     2 MiB of 7 GiB
  precision     bfloat16 compute                              most time    compute (10 ms)
  recomputed    0 of 32 blocks

Compiled by shardwright from ../job.yaml. The file is yours to read and change: it needs torch, transformers, and
beside it shardwright_runtime/.
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, MixtralForCausalLM

from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets, to_device
from shardwright_runtime.divided_holder import DividedHolder
from shardwright_runtime.experts import Experts, divide_experts
from shardwright_runtime.initialize import initialize, parameters_on_meta
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.meshes import by_mesh, clip_by_mesh
from shardwright_runtime.session import MetricsLog, Signals, process_group, seed_for
from shardwright_runtime.shares import divided_gradient_norm

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
MESH_SHAPE = (2, 4)
MESH_AXES = ("dp_replicate", "dp_shard")

# Why expert_parallel.degree = 2: The tokens cross the node once; all else would gather.
EXPERT_RANKS = 2  # neighbours among the processes with the same parts share the experts of each layer
EXPERT_MESH = (2, 2, 2)
EXPERT_AXES = ("expert_replicate", "expert_shard", "ep")
# Modules that hold experts, and their attributes that count these.
EXPERT_LAYERS: dict[str, tuple[str, ...]] = {"model.layers.*.mlp.experts": ("num_experts",)}
RESHARD_AFTER_FORWARD = True  # whether a block's gathered parameters are freed between its forward and its backward
MICRO_BATCH = 6  # samples of one forward on one device
BLOCKS = [f"model.layers.{index}" for index in range(32)]  # the repeated blocks, in order
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


def build_model(device: torch.device, mesh: DeviceMesh, expert_mesh: DeviceMesh) -> tuple[nn.Module, Experts]:
    """The model, sharded: one block at a time is initialised and cut up, so no process ever holds it whole."""
    config = AutoConfig.from_pretrained(HERE / "model_config.json", use_cache=False)
    with parameters_on_meta():
        model: nn.Module = MixtralForCausalLM(config)
    experts = divide_experts(model, EXPERT_LAYERS, expert_mesh["ep"])
    shared = expert_mesh["expert_replicate", "expert_shard"]  # the processes that have the same experts
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # The weights of tokens keep their dtype.
    expert_precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for path in BLOCKS:
        initialize(model, path, seed=SEED, device=device)
        block = model.get_submodule(path)
        for layer in experts.inside(block):
            sharded = fully_shard(
                layer, mesh=shared, mp_policy=expert_precision, reshard_after_forward=RESHARD_AFTER_FORWARD
            )
            sharded.set_gradient_divide_factor(WORLD_SIZE)  # as the gradients of all else are averaged
            sharded.set_force_sum_reduction_for_comms(True)  # and divided apart: gloo cannot do both in one
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=RESHARD_AFTER_FORWARD)
    initialize(model, "", seed=SEED, device=device)
    # Embedding and head are needed at both ends of a micro-batch: freeing them in between would only gather them again.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    return model, experts


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW. Weight decay is for matrices: vectors and scalars (norms, biases) go without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(by_mesh(groups), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)


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
    mesh = init_device_mesh("cuda", MESH_SHAPE, mesh_dim_names=MESH_AXES)
    expert_mesh = init_device_mesh("cuda", EXPERT_MESH, mesh_dim_names=EXPERT_AXES)
    model, experts = build_model(device, mesh, expert_mesh)
    optimizer = make_optimizer(model)
    batches = Batches(
        byte_files(args.data, TRAIN_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=rank,
        world_size=WORLD_SIZE,
    )

    holder = DividedHolder(model)
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

        # FSDP averages the gradients over the processes, hence the factor WORLD_SIZE.
        scale = WORLD_SIZE / max(targets, 1.0)
        summed = summed_loss(model, to_device(batch, device))
        torch.autograd.backward(summed * scale)
        loss_sum = summed.detach().double()
        grad_norm = divided_gradient_norm(model, 1)
        clip_by_mesh(model.parameters(), CLIP_GRAD_NORM, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss_sum)
        loss = float(loss_sum) / max(targets, 1.0)
        expert_load = experts.load()  # tokens of the fullest process over the mean, since the last step
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
                expert_load=expert_load,
            )
            print(
                f"step {state.step}/{TOTAL_STEPS} loss {loss:.4f}  grad norm {norm:.3f}  {tokens_per_s:,.0f} tokens/s  "
                f"{step_time_s * 1e3:.1f} ms (predicted {PREDICTED_STEP_S * 1e3:.1f})  "
                f"fullest experts {expert_load:.2f}x  "
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
