"""Train tiny on 8 x test cpu: pipeline of 2 x 2 (zb-h2), tp 2, cp 2.

    ./launch.sh             # start: checkpoints and metrics.jsonl go to ./out
    ./launch.sh --resume    # go on from the newest checkpoint there

Plan (plan.json)                                              Predicted
  engine        amsp                                          step time    161 ms
  mesh          pp 2 x dp_1 2 x tp 2                          tokens/s     3.58 k
  pipeline      zb-h2, 2 stages, late step                    MFU          42.0%
  tensors       /2, the sequence too                          allocated    403 MiB
  sequences     /2, ring                                      reserved     428 MiB of 8 GiB
  shards        parameters /1, gradients /2, optimizer /2     most time    pipeline (160 ms)
  batch         48 = 1 x 16 x 3 micro-batches                 bubble       0.1%
  precision     float32 throughout
  recomputed    0 of 32 blocks

Compiled by shardwright from ../job.yaml. The file is yours to read and change: it needs torch, transformers, and
beside it shardwright_runtime/. The engine amsp: run here on CPU with gloo; not yet on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from transformers import AutoConfig, LlamaForCausalLM

from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets
from shardwright_runtime.divided_holder import DividedHolder
from shardwright_runtime.held_flat import FlatHolder
from shardwright_runtime.initialize import initialize, parameters_on_meta
from shardwright_runtime.late import LateStep, LateSum, heads
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.pipeline import Pipeline
from shardwright_runtime.program import read_program
from shardwright_runtime.sequence import Sequences, divide_sequence
from shardwright_runtime.session import MetricsLog, Signals, process_group, seed_for
from shardwright_runtime.shares import share_of
from shardwright_runtime.stage_states import StageStates
from shardwright_runtime.stages import stages_of
from shardwright_runtime.states import Levels, ShardedStates
from shardwright_runtime.tensor_parallel import Column, Region, Row, Shared, Vocabulary, matching
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
MESH_AXES = ("pp", "dp_1", "tp")
PARAMETER_SHARDS = 1  # devices that share one copy of the parameters
GRADIENT_SHARDS = 2  # of the gradients, from one micro-batch to the next
OPTIMIZER_SHARDS = 2  # of the optimizer's states and its fp32 values
STAGE_RANKS = (0, 1)  # of each stage of the model, its place on the axis pp
STAGE_CUTS = (16,)  # of each stage but the last, how many of BLOCKS lie before its end
COPIES = 2  # processes that have the same stages and parts of layers
TENSOR_RANKS = 2  # neighbouring processes that share every layer
# Of the modules that each pattern names: how their parameters are divided, and what enters and leaves there.
TENSOR_PARALLEL: dict[str, ParallelStyle] = {
    "model.embed_tokens": Vocabulary(dims={"weight": 0}),
    "model.layers.*.self_attn": Region(sequence_dim=1),
    "model.layers.*.self_attn.q_proj": Column(dims={"weight": 0}, units=6),
    "model.layers.*.self_attn.k_proj": Column(dims={"weight": 0}, units=2),
    "model.layers.*.self_attn.v_proj": Column(dims={"weight": 0}, units=2),
    "model.layers.*.self_attn.o_proj": Row(sequence_dim=1, dims={"weight": 1}, units=6),
    "model.layers.*.mlp": Region(sequence_dim=1),
    "model.layers.*.mlp.gate_proj": Column(dims={"weight": 0}, units=50),
    "model.layers.*.mlp.up_proj": Column(dims={"weight": 0}, units=50),
    "model.layers.*.mlp.down_proj": Row(sequence_dim=1, dims={"weight": 1}, units=50),
    "model.layers.*.input_layernorm": Shared(),
    "model.layers.*.post_attention_layernorm": Shared(),
    "lm_head": Column(enters=True, dims={"weight": 0}),
}
HEAD = "lm_head"  # the module that makes the logits, which are never whole
CONTEXT_RANKS = 2  # neighbours among the processes with the same parts share each sequence
CONTEXT_METHOD = "ring"  # how they attend to all of it
CONTEXT_MESH = (2, 1, 2, 2)
CONTEXT_AXES = ("pp", "outer", "cp", "tp")
MICRO_BATCH = 16  # samples of one forward on one device
ACCUMULATION = 3  # micro-batches of one step on one pipeline
BLOCKS = [f"model.layers.{index}" for index in range(32)]  # the repeated blocks, in order
PREDICTED_STEP_S = 0.1611  # seconds


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags for what does not change the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS, help="stop after this step")
    parser.add_argument("--data", type=Path, default=HERE / DATA_ROOT, help="where relative paths of data start")
    return parser.parse_args(argv)


def build_model(
    device: torch.device, mesh: DeviceMesh, context: DeviceMesh, levels: Levels, place: int, batch: Batch
) -> tuple[nn.Module, StageStates]:
    """The model, cut into stages; parameters of own stages are initialised and sharded, one block at a time."""
    config = AutoConfig.from_pretrained(HERE / "model_config.json", use_cache=False)
    with parameters_on_meta():
        model: nn.Module = LlamaForCausalLM(config)
    parallelize_module(model, mesh["tp"], matching(model, TENSOR_PARALLEL))
    divide_cross_entropy(model, HEAD, mesh["tp"])
    sequences = divide_sequence(
        model, BLOCKS, tensor=mesh["tp"], context=context, head=HEAD, method=CONTEXT_METHOD, causal=True
    )
    # The model's own forward is run once, without values, to see what each stage computes and sends.
    own = [stage for stage, at in enumerate(STAGE_RANKS) if at == place]
    stages = stages_of(
        model, BLOCKS, STAGE_CUTS, own, functools.partial(summed_loss, sequences=sequences), batch, torch.float32
    )
    states = ShardedStates(levels, torch.float32, share_of=share_of(model, TENSOR_RANKS))
    placed = StageStates(model, states, stages, STAGE_RANKS, place)
    for paths in placed.blocks.values():
        for path in paths:
            initialize(model, path, seed=SEED, device=device)
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


def summed_loss(model: nn.Module, batch: Batch, sequences: Sequences) -> Tensor:
    """The loss of one micro-batch, summed over its learnt targets; of the positions that this process has."""
    return next_token_loss(model(input_ids=batch["input_ids"]), sequences.local(batch["targets"]))


def log_step(
    log: MetricsLog,
    late: LateStep,
    loss_sum: LateSum,
    state: TrainState,
    targets: float,
    step_time_s: float,
) -> None:
    """Write down the last step, of which by now everything is known."""
    loss, grad_norm = float(loss_sum.read()) / TENSOR_RANKS, late.norm
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


def train(args: argparse.Namespace, rank: int, device: torch.device) -> None:
    """Train from the start, or with --resume from the newest checkpoint, as process `rank` of WORLD_SIZE."""
    mesh = init_device_mesh("cpu", MESH_SHAPE, mesh_dim_names=MESH_AXES)
    context = init_device_mesh("cpu", CONTEXT_MESH, mesh_dim_names=CONTEXT_AXES)["cp"]
    process = rank // TENSOR_RANKS  # processes with parts of the same layers read the same samples
    place, copy = divmod(process, COPIES)  # along the pipeline, and among the processes that have the same stages
    levels = Levels(
        mesh[MESH_AXES[1:-1]],
        parameters=PARAMETER_SHARDS,
        gradients=GRADIENT_SHARDS,
        optimizer_states=OPTIMIZER_SHARDS,
    )
    batches = Batches(
        byte_files(args.data, TRAIN_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
    )
    model, placed = build_model(device, mesh, context, levels, place, batches(0))
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
        ties=placed.ties(COPIES * TENSOR_RANKS),
        # Dropout follows from the seed, the step and the stage, so resuming needs no saved generator.
        seed=lambda stage, micro: seed_for(SEED, "step", state.step, copy, stage, micro),
    )
    optimizer = make_optimizer(states)
    # Each rank steps before it knows the norm of the whole gradient, and steps again where that has to be clipped. What
    # is summed up without waiting for it has a group of its own.
    late = LateStep(
        states,
        optimizer,
        head=heads(programs)[place],
        group=dist.new_group(),
        max_norm=CLIP_GRAD_NORM,
    )
    pipeline.late = late
    told = LateSum(torch.zeros(2, dtype=torch.float64), None)  # whether to stop, and to save
    pending = ExitStack()  # the line in the log that waits for its loss and its norm

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
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step)
        micro_batches = [batches(state.step, micro) for micro in range(ACCUMULATION)]
        # The loss is divided by the learnt targets of the global batch. All stages read the same samples, so processes
        # that have the same stages add them up, and wait for no other ones.
        counted = torch.zeros((), dtype=torch.float64, device=device)
        if copy % CONTEXT_RANKS == 0:  # one of the processes that share each sequence
            counted += learnt_targets(micro_batches)
        for axis in MESH_AXES[1:-1]:
            dist.all_reduce(counted, group=mesh.get_group(axis))
        targets = float(counted)
        # What one process was told at the last step, all know at this one.
        stopping, saving = told.read().tolist()
        if stopping:
            break
        asked = float(signals.save())
        told = LateSum(torch.tensor([signals.stop, asked], dtype=torch.float64, device=device), late.group)

        # The gradients of all processes are added up, so each is a share of the mean over the global batch.
        scale.fill_(1.0 / max(targets, 1.0))
        share = pipeline.step(micro_batches)
        pending.close()  # which writes it: by now everything is known of the step before
        late.step()  # the new values travel while the next forward computes
        # The loss is where the last stage is.
        loss_sum = LateSum(torch.zeros((), device=device).double() if share is None else share.double(), late.group)
        step_time_s = time.perf_counter() - began
        state = TrainState(step=state.step + 1, tokens=state.tokens + int(targets), seed=SEED)

        if log is not None:
            pending.callback(log_step, log, late, loss_sum, state, targets, step_time_s)
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
    with process_group("cpu", WORLD_SIZE) as (rank, device):
        train(args, rank, device)


if __name__ == "__main__":
    main()
