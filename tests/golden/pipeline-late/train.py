"""Train tiny:build on 4 x test cuda: pipeline of 2 x 2 (zb-h2).

    ./launch.sh             # start: checkpoints and metrics.jsonl go to ./out
    ./launch.sh --resume    # go on from the newest checkpoint there

Plan (plan.json)                                              Predicted
  engine        amsp                                          step time    26.1 ms
  mesh          pp 2 x dp_1 2                                 tokens/s     22.1 k
  pipeline      zb-h2, 2 stages, late step                    MFU          42.0%
  shards        parameters /1, gradients /2, optimizer /2     allocated    45 MiB
  batch         48 = 2 x 6 x 4 micro-batches                  reserved     47.8 MiB of 7 GiB
  precision     float32 throughout                            most time    pipeline (25.1 ms)
  recomputed    0 of 3 blocks                                 bubble       0.0%

Compiled by shardwright from ../job.yaml. The file is yours to read and change: it needs torch, and beside it
shardwright_runtime/, tiny.py. The engine amsp: run here on CPU with gloo; not yet on a GPU.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardwright_runtime.average import update_average
from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets, to_device
from shardwright_runtime.held_flat import FlatHolder
from shardwright_runtime.late import LateStep, LateSum, heads
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.pipeline import Pipeline
from shardwright_runtime.program import read_program
from shardwright_runtime.session import MetricsLog, Signals, Timer, process_group, seed_for
from shardwright_runtime.stage_states import StageStates
from shardwright_runtime.stages import stages_of
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
CLIP_GRAD_NORM = 1.0  # highest L2 norm of the whole gradient
EMA_DECAY = 0.999  # after each step, average = EMA_DECAY * average + (1 - EMA_DECAY) * parameter
SAVE_EVERY_S = 3600.0  # seconds; also at the end and on SIGTERM
KEEP_CHECKPOINTS = 2  # newest ones; older ones are removed
EVALUATE_EVERY_S = 1800.0  # seconds; also at the end
EVALUATE_BATCHES = 8  # most global batches of one evaluation

# The plan. To change it, edit `decision` in plan.json and compile that file: it is checked and predicted again.
WORLD_SIZE = 4  # processes, one a device
MESH_SHAPE = (2, 2)  # slowest first; each number of shards is a product of the last ones
MESH_AXES = ("pp", "dp_1")
PARAMETER_SHARDS = 1  # devices that share one copy of the parameters
GRADIENT_SHARDS = 2  # of the gradients, from one micro-batch to the next
OPTIMIZER_SHARDS = 2  # of the optimizer's states and its fp32 values
STAGE_RANKS = (0, 1)  # of each stage of the model, its place on the axis pp
STAGE_CUTS = (1,)  # of each stage but the last, how many of BLOCKS lie before its end
COPIES = 2  # processes that have the same stages, each with its own samples
MICRO_BATCH = 6  # samples of one forward on one device
ACCUMULATION = 4  # micro-batches of one step on one pipeline
BLOCKS = [f"blocks.{index}" for index in range(3)]  # the repeated blocks, in order
PREDICTED_STEP_S = 0.0261  # seconds
PREDICTED_PEAK_BYTES = 47185920  # allocated at once on the fullest device


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags for what does not change the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS, help="stop after this step")
    parser.add_argument("--data", type=Path, default=HERE / DATA_ROOT, help="where relative paths of data start")
    return parser.parse_args(argv)


def build_model(device: torch.device, levels: Levels, place: int, batch: Batch) -> tuple[nn.Module, StageStates]:
    """The model with its initial weights, the same for every plan, cut into stages; only own parameters are kept."""
    torch.manual_seed(SEED)
    model: nn.Module = create_model(**MODEL_ARGS)
    # The model's own forward is run once, without values, to see what each stage computes and sends.
    own = [stage for stage, at in enumerate(STAGE_RANKS) if at == place]
    stages = stages_of(model, BLOCKS, STAGE_CUTS, own, summed_loss, batch, torch.float32)
    states = ShardedStates(levels, torch.float32)
    placed = StageStates(model, states, stages, STAGE_RANKS, place)
    for paths in placed.blocks.values():
        for path in paths:
            model.get_submodule(path).to(device)
            placed.take_block(path)
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
    return next_token_loss(model(batch["input_ids"]), batch["targets"])


@torch.no_grad()
def evaluate(model: nn.Module, pipeline: Pipeline, batches: Batches, device: torch.device) -> float:
    """Mean loss per held-out target, over the same EVALUATE_BATCHES global batches each time.

    Where they are more than a pass over the held-out samples fills, over as many as it fills; but over one at least,
    which repeats samples if there are fewer than GLOBAL_BATCH.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for number in range(min(EVALUATE_BATCHES, batches.per_pass())):
        micro_batches = [batches(number, micro) for micro in range(ACCUMULATION)]
        summed = pipeline.evaluate([to_device(batch, device) for batch in micro_batches])
        if summed is not None:  # where the last stage is
            sums[0] += summed
            sums[1] += learnt_targets(micro_batches)
    dist.all_reduce(sums)
    model.train()
    loss, targets = sums.tolist()
    return float(loss / max(targets, 1.0))


def log_step(
    log: MetricsLog,
    late: LateStep,
    loss_sum: LateSum,
    state: TrainState,
    targets: float,
    step_time_s: float,
    peak_bytes: int,
    validation: dict[str, float],
) -> None:
    """Write down the last step, of which by now everything is known."""
    loss, grad_norm = float(loss_sum.read()), late.norm
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
    programs = [read_program(HERE / "program.txt", at, STAGE_RANKS, stages.wires) for at in range(MESH_SHAPE[0])]
    pipeline = Pipeline(
        programs[place],
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

    def update() -> None:
        """One step of the optimizer, and of the average."""
        optimizer.step()
        update_average(optimizer, EMA_DECAY)

    # Each rank steps before it knows the norm of the whole gradient, and steps again where that has to be clipped. What
    # is summed up without waiting for it has a group of its own.
    late = LateStep(
        states,
        optimizer,
        head=heads(programs)[place],
        group=dist.new_group(),
        max_norm=CLIP_GRAD_NORM,
        update=update,
    )
    pipeline.late = late
    told = LateSum(torch.zeros(2, dtype=torch.float64), None)  # whether to stop, and to save
    pending = ExitStack()  # the line in the log that waits for its loss and its norm
    held_out = Batches(
        byte_files(args.data, VALIDATION_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=copy,
        world_size=COPIES,
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
    save_timer = Timer(SAVE_EVERY_S)
    evaluate_timer = Timer(EVALUATE_EVERY_S)
    last_step = min(args.steps, TOTAL_STEPS)

    while state.step < last_step:
        began = time.perf_counter()
        torch.cuda.reset_peak_memory_stats(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step)
        micro_batches = [batches(state.step, micro) for micro in range(ACCUMULATION)]
        # The loss is divided by the learnt targets of the global batch. All stages read the same samples, so processes
        # that have the same stages add them up, and wait for no other ones.
        counted = torch.tensor(learnt_targets(micro_batches), dtype=torch.float64, device=device)
        for axis in MESH_AXES[1:]:
            dist.all_reduce(counted, group=mesh.get_group(axis))
        targets = float(counted)
        # What one process was told at the last step, all know at this one.
        stopping, requests = told.read().tolist()
        evaluating, saving = divmod(requests, WORLD_SIZE + 1)
        if stopping:
            break
        asked = float(signals.save() or (rank == 0 and save_timer.due()))
        # Two requests in one number: at most WORLD_SIZE processes ask for a checkpoint.
        asked += (WORLD_SIZE + 1) * (rank == 0 and evaluate_timer.due())
        told = LateSum(torch.tensor([signals.stop, asked], dtype=torch.float64, device=device), late.group)

        # The gradients of all processes are added up, so each is a share of the mean over the global batch.
        scale.fill_(1.0 / max(targets, 1.0))
        share = pipeline.step([to_device(batch, device) for batch in micro_batches])
        pending.close()  # which writes it: by now everything is known of the step before
        late.step()  # the new values travel while the next forward computes
        # The loss is where the last stage is.
        loss_sum = LateSum(torch.zeros((), device=device).double() if share is None else share.double(), late.group)
        step_time_s = time.perf_counter() - began
        peak_bytes = torch.cuda.max_memory_allocated(device)
        state = TrainState(step=state.step + 1, tokens=state.tokens + int(targets), seed=SEED)

        validation: dict[str, float] = {}
        if evaluating or state.step == last_step:
            validation["validation_loss"] = evaluate(model, pipeline, held_out, device)
        if log is not None:
            pending.callback(log_step, log, late, loss_sum, state, targets, step_time_s, peak_bytes, validation)
        if saving:
            late.settle()  # no step is saved that may have to be done again
            pending.close()
            checkpoints.save(state, model, optimizer)

    late.settle()
    pending.close()
    checkpoints.save(state, model, optimizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, join the other processes, train."""
    args = parse_args(argv)
    with process_group("cuda", WORLD_SIZE) as (rank, device):
        train(args, rank, device)


if __name__ == "__main__":
    main()
