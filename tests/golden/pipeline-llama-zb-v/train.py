"""Train tiny on 16 x test cuda: pipeline of 4 x 4 (zb-v).

    HEAD=node0 ./launch.sh             # start on each of the 2 nodes: checkpoints and metrics.jsonl go to ./out
    HEAD=node0 ./launch.sh --resume    # go on from the newest checkpoint there

Plan (plan.json)                                              Predicted
  engine        amsp                                          step time    238 ms
  mesh          pp 4 x dp_2 2 x dp_1 2                        tokens/s     1.61 k
  pipeline      zb-v, 8 stages                                MFU          42.0%
  shards        parameters /2, gradients /4, optimizer /4     allocated    232 MiB
  batch         32 = 4 x 1 x 8 micro-batches                  reserved     246 MiB of 7 GiB
  precision     bfloat16 compute                              most time    pipeline (237 ms)
  recomputed    6 of 32 blocks                                bubble       0.3%

Compiled by shardwright from ../job.yaml. The file is yours to read and change: it needs torch, transformers, and
beside it shardwright_runtime/. The engine amsp: run here on CPU with gloo; not yet on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, LlamaForCausalLM

from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets, to_device
from shardwright_runtime.held_flat import FlatHolder
from shardwright_runtime.initialize import initialize, parameters_on_meta
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.pipeline import Pipeline
from shardwright_runtime.program import read_program
from shardwright_runtime.session import MetricsLog, Signals, Timer, process_group, seed_for
from shardwright_runtime.stage_states import StageStates
from shardwright_runtime.stages import stages_of
from shardwright_runtime.states import Levels, ShardedStates

HERE = Path(__file__).resolve().parent

# The job. These hold for every plan.
DATA_ROOT = ".."  # from this file; relative paths of data start there
TRAIN_FILES = ("corpus.txt",)
SEQUENCE_LENGTH = 12  # tokens of one sample
GLOBAL_BATCH = 32  # samples of one optimizer step, all processes together
TOTAL_STEPS = 4  # optimizer steps; the learning rate is planned over them
SEED = 0  # of weights, batches and dropout
LEARNING_RATE = 0.01  # the highest
WARMUP_STEPS = 2  # of rising learning rate
FINAL_RATIO = 0.1  # of LEARNING_RATE, at the last step
BETAS = (0.9, 0.95)
EPSILON = 1e-08
WEIGHT_DECAY = 0.1  # of matrices
CLIP_GRAD_NORM = 1.0  # highest L2 norm of the whole gradient
SAVE_EVERY_S = 3600.0  # seconds; also at the end and on SIGTERM
KEEP_CHECKPOINTS = 2  # newest ones; older ones are removed

# The plan. To change it, edit `decision` in plan.json and compile that file: it is checked and predicted again.
WORLD_SIZE = 16  # processes, one a device
MESH_SHAPE = (4, 2, 2)  # slowest first; each number of shards is a product of the last ones
MESH_AXES = ("pp", "dp_2", "dp_1")
PARAMETER_SHARDS = 2  # devices that share one copy of the parameters
GRADIENT_SHARDS = 4  # of the gradients, from one micro-batch to the next
OPTIMIZER_SHARDS = 4  # of the optimizer's states and its fp32 values

# Why pipeline.ranks = 4: The states of a fourth of the model fit on a device.
# Why pipeline.schedule = zb-v: Idle for 7.3 % of the step; the runner-up 1f1b for 15 %.
STAGE_RANKS = (0, 1, 2, 3, 3, 2, 1, 0)  # of each stage of the model, its place on the axis pp
STAGE_CUTS = (4, 8, 12, 16, 20, 24, 28)  # of each stage but the last, how many of BLOCKS lie before its end
COPIES = 4  # processes that have the same stages, each with its own samples
MICRO_BATCH = 1  # samples of one forward on one device
ACCUMULATION = 8  # micro-batches of one step on one pipeline
BLOCKS = [f"model.layers.{index}" for index in range(32)]  # the repeated blocks, in order
CHECKPOINTED = (0, 2, 0, 4, 0, 0, 0, 0)  # of each stage, so many of its first blocks are recomputed in backward
PREDICTED_STEP_S = 0.2379  # seconds
PREDICTED_PEAK_BYTES = 243269632  # allocated at once on the fullest device


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags for what does not change the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS, help="stop after this step")
    parser.add_argument("--data", type=Path, default=HERE / DATA_ROOT, help="where relative paths of data start")
    return parser.parse_args(argv)


def build_model(device: torch.device, levels: Levels, place: int, batch: Batch) -> tuple[nn.Module, StageStates]:
    """The model, cut into stages; parameters of own stages are initialised and sharded, one block at a time."""
    config = AutoConfig.from_pretrained(HERE / "model_config.json", use_cache=False)
    with parameters_on_meta():
        model: nn.Module = LlamaForCausalLM(config)
    # The model's own forward is run once, without values, to see what each stage computes and sends.
    own = [stage for stage, at in enumerate(STAGE_RANKS) if at == place]
    stages = stages_of(model, BLOCKS, STAGE_CUTS, own, summed_loss, batch, torch.bfloat16)
    # Forward and backward compute in bf16; gradients are reduced, and the optimizer works, in fp32.
    states = ShardedStates(levels, torch.bfloat16)
    placed = StageStates(model, states, stages, STAGE_RANKS, place)
    for stage, paths in placed.blocks.items():
        for number, path in enumerate(paths):
            initialize(model, path, seed=SEED, device=device)
            if number < CHECKPOINTED[stage]:
                block = model.get_submodule(path)
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            placed.take_block(path)
    initialize(model, "", seed=SEED, device=device, without=BLOCKS)
    placed.take_rest(device)
    placed.defer_weight_gradients()
    return model, placed


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
    mesh = init_device_mesh("cuda", MESH_SHAPE, mesh_dim_names=MESH_AXES)
    place, copy = divmod(rank, COPIES)  # along the pipeline, and among the processes that have the same stages
    levels = Levels(
        mesh[MESH_AXES[1:]],
        parameters=PARAMETER_SHARDS,
        gradients=GRADIENT_SHARDS,
        optimizer_states=OPTIMIZER_SHARDS,
    )
    batches = Batches(
        byte_files(args.data, TRAIN_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=copy,
        world_size=COPIES,
    )
    model, placed = build_model(device, levels, place, to_device(batches(0), device))
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
    log = MetricsLog(args.out / "metrics.jsonl", state.step) if rank == 0 else None
    signals = Signals()
    save_timer = Timer(SAVE_EVERY_S)
    last_step = min(args.steps, TOTAL_STEPS)

    while state.step < last_step:
        began = time.perf_counter()
        torch.cuda.reset_peak_memory_stats(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step)
        micro_batches = [batches(state.step, micro) for micro in range(ACCUMULATION)]
        # All stages read the same samples; the processes of the first rank count them.
        targets = float(learnt_targets(micro_batches)) if place == 0 else 0.0
        saving = float(signals.save() or (rank == 0 and save_timer.due()))

        # The loss is divided by the learnt targets of the global batch, so the processes add them up first; in the same
        # message each says whether it was told to stop or to save.
        agreed = torch.tensor([targets, signals.stop, saving], dtype=torch.float64, device=device)
        dist.all_reduce(agreed)
        targets, stopping, saving = agreed.tolist()
        if stopping:
            break

        # The gradients of all processes are added up, so each is a share of the mean over the global batch.
        scale.fill_(1.0 / max(targets, 1.0))
        share = pipeline.step([to_device(batch, device) for batch in micro_batches])
        grad_norm = states.gradient_norm(mesh.get_group("pp"))
        torch.nn.utils.clip_grads_with_norm_(states.parameters(), CLIP_GRAD_NORM, grad_norm)
        optimizer.step()
        states.publish()  # the new values travel while the next forward computes
        # The loss is where the last stage is.
        loss_sum = torch.zeros((), dtype=torch.float64, device=device) if share is None else share.double()
        dist.all_reduce(loss_sum)
        loss = float(loss_sum)
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
