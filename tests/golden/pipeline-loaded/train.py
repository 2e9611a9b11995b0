"""Train tiny:build on 4 x test cpu: pipeline of 2 x 2 (zb-h1).

    ./launch.sh                # start: checkpoints and metrics.jsonl go to ./out
    ./launch.sh --resume       # go on from the newest checkpoint there
    python export.py FOLDER    # write the model of the newest one as safetensors files

Plan (plan.json)                                              Predicted
  engine        amsp                                          step time    20.1 ms
  mesh          pp 2 x dp_1 2                                 tokens/s     28.7 k
  pipeline      zb-h1, 2 stages                               MFU          42.0%
  shards        parameters /1, gradients /2, optimizer /2     allocated    42 MiB
  int4          reductions over dp_1                          reserved     44.6 MiB of 8 GiB
  batch         48 = 2 x 8 x 3 micro-batches                  most time    pipeline (19.1 ms)
  precision     float32 throughout                            bubble       1.1%
  recomputed    1 of 3 blocks

Compiled by shardwright from ../job.yaml. The file is yours to read and change: it needs torch, and beside it
shardwright_runtime/, tiny.py. The engine amsp: run here on CPU with gloo; not yet on a GPU.
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
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets
from shardwright_runtime.groups import ParameterGroup, kind_of, kind_options
from shardwright_runtime.held_flat import FlatHolder
from shardwright_runtime.initialize import allocate, parameters_on_meta
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.pipeline import Pipeline
from shardwright_runtime.program import read_program
from shardwright_runtime.session import MetricsLog, Signals, process_group, seed_for
from shardwright_runtime.stage_states import StageStates
from shardwright_runtime.stages import stages_of
from shardwright_runtime.states import Levels, ShardedStates
from shardwright_runtime.weights import load_weights
from tiny import build as create_model

HERE = Path(__file__).resolve().parent

# The job. These hold for every plan.
MODEL_ARGS: dict[str, Any] = {"width": 32}
WEIGHTS = "/mnt/weights"  # from this file; the folder that training starts from
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
NO_DECAY = ("embed*", "positions.*")  # names of further parameters without weight decay
# Parameters with numbers of their own; the first group that matches a name counts.
PARAMETER_GROUPS: list[ParameterGroup] = [
    {"match": ("head.*", "norm.*"), "lr_scale": 0.5, "weight_decay": 0.0},
    {"match": ("blocks.0.*",), "weight_decay": 0.3},
]
CLIP_GRAD_NORM = 1.0  # highest L2 norm of the whole gradient
KEEP_CHECKPOINTS = 2  # newest ones; older ones are removed

# The plan. To change it, edit `decision` in plan.json and compile that file: it is checked and predicted again.
WORLD_SIZE = 4  # processes, one a device
MESH_SHAPE = (2, 2)  # slowest first; each number of shards is a product of the last ones
MESH_AXES = ("pp", "dp_1")
PARAMETER_SHARDS = 1  # devices that share one copy of the parameters
GRADIENT_SHARDS = 2  # of the gradients, from one micro-batch to the next
OPTIMIZER_SHARDS = 2  # of the optimizer's states and its fp32 values
INT4_REDUCTIONS = ("dp_1",)  # axes that gradients are sent over in 4 bits, rounded
STAGE_RANKS = (0, 1)  # of each stage of the model, its place on the axis pp
STAGE_CUTS = (1,)  # of each stage but the last, how many of BLOCKS lie before its end
COPIES = 2  # processes that have the same stages, each with its own samples
MICRO_BATCH = 8  # samples of one forward on one device
ACCUMULATION = 3  # micro-batches of one step on one pipeline
BLOCKS = [f"blocks.{index}" for index in range(3)]  # the repeated blocks, in order
CHECKPOINTED = (1, 0)  # of each stage, so many of its first blocks are recomputed in backward
PREDICTED_STEP_S = 0.0201  # seconds


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


def build_model(device: torch.device, levels: Levels, place: int, batch: Batch) -> tuple[nn.Module, StageStates]:
    """The model, cut into stages; parameters of own stages get memory, one block at a time, and values later."""
    with parameters_on_meta():
        model: nn.Module = create_model(**MODEL_ARGS)
    # The model's own forward is run once, without values, to see what each stage computes and sends.
    own = [stage for stage, at in enumerate(STAGE_RANKS) if at == place]
    stages = stages_of(model, BLOCKS, STAGE_CUTS, own, summed_loss, batch, torch.float32)
    kinds = kind_of(model, no_decay=NO_DECAY, groups=PARAMETER_GROUPS)
    states = ShardedStates(levels, torch.float32, kind_of=kinds)
    placed = StageStates(model, states, stages, STAGE_RANKS, place)
    for stage, paths in placed.blocks.items():
        for number, path in enumerate(paths):
            allocate(model.get_submodule(path), device)
            if number < CHECKPOINTED[stage]:
                block = model.get_submodule(path)
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            placed.take_block(path)
    allocate(model, device, without=BLOCKS)
    placed.take_rest(device)
    placed.defer_weight_gradients()
    return model, placed


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


def train(args: argparse.Namespace, rank: int, device: torch.device) -> None:
    """Train from the start, or with --resume from the newest checkpoint, as process `rank` of WORLD_SIZE."""
    mesh = init_device_mesh("cpu", MESH_SHAPE, mesh_dim_names=MESH_AXES)
    place, copy = divmod(rank, COPIES)  # along the pipeline, and among the processes that have the same stages
    levels = Levels(
        mesh[MESH_AXES[1:]],
        parameters=PARAMETER_SHARDS,
        gradients=GRADIENT_SHARDS,
        optimizer_states=OPTIMIZER_SHARDS,
        int4_reductions=INT4_REDUCTIONS,
    )
    batches = Batches(
        byte_files(args.data, TRAIN_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=copy,
        world_size=COPIES,
    )
    model, placed = build_model(device, levels, place, batches(0))
    states, stages = placed.states, placed.stages
    scale = torch.ones((), device=device)
    pipeline = Pipeline(
        read_program(HERE / "program.txt", place, STAGE_RANKS, stages.wires),
        stages.stages,
        ranks=STAGE_RANKS,
        wires=stages.wires,
        loss=lambda summed, batch: summed * scale if model.training else summed,
        queue=placed.queue,
        states=states,
        units=placed.units,
        device=device,
        group=mesh.get_group("pp"),
        ties=placed.ties(COPIES),
        # Dropout follows from the seed, the step and the stage, so resuming needs no saved generator.
        seed=lambda stage, micro: seed_for(SEED, "step", state.step, copy, stage, micro),
    )
    optimizer = make_optimizer(states)

    checkpoints = Checkpoints(args.out, keep=KEEP_CHECKPOINTS, holder=FlatHolder(states))
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
        load_weights(model, args.weights, unused=args.unused, holder=checkpoints.holder)
    log = MetricsLog(args.out / "metrics.jsonl", state.step) if rank == 0 else None
    signals = Signals()
    last_step = min(args.steps, TOTAL_STEPS)

    while state.step < last_step:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step) * group["lr_scale"]
        micro_batches = [batches(state.step, micro) for micro in range(ACCUMULATION)]
        # All stages read the same samples; the processes of the first rank count them.
        targets = float(learnt_targets(micro_batches)) if place == 0 else 0.0
        saving = float(signals.save())

        # The loss is divided by the learnt targets of the global batch, so the processes add them up first; in the same
        # message each says whether it was told to stop or to save.
        agreed = torch.tensor([targets, signals.stop, saving], dtype=torch.float64, device=device)
        dist.all_reduce(agreed)
        targets, stopping, saving = agreed.tolist()
        if stopping:
            break

        # The gradients of all processes are added up, so each is a share of the mean over the global batch.
        scale.fill_(1.0 / max(targets, 1.0))
        share = pipeline.step(micro_batches)
        grad_norm = states.gradient_norm(mesh.get_group("pp"))
        torch.nn.utils.clip_grads_with_norm_(states.parameters(), CLIP_GRAD_NORM, grad_norm)
        optimizer.step()
        states.publish()  # the new values travel while the next forward computes
        # The loss is where the last stage is.
        loss_sum = torch.zeros((), dtype=torch.float64, device=device) if share is None else share.double()
        dist.all_reduce(loss_sum)
        loss = float(loss_sum)
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
