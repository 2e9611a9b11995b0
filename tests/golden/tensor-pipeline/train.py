"""Train tiny on 8 x test cpu: pipeline of 2 x 2 (zb-h1), tp 2.

    ./launch.sh             # start: checkpoints and metrics.jsonl go to ./out
    ./launch.sh --resume    # go on from the newest checkpoint there

Plan (plan.json)                                              Predicted
  engine        amsp                                          step time    161 ms
  mesh          pp 2 x dp_1 2 x tp 2                          tokens/s     3.57 k
  pipeline      zb-h1, 2 stages                               MFU          42.0%
  tensors       /2, the sequence too                          allocated    354 MiB
  shards        parameters /1, gradients /2, optimizer /2     reserved     376 MiB of 8 GiB
  batch         48 = 2 x 8 x 3 micro-batches                  most time    pipeline (160 ms)
  precision     float32 throughout                            bubble       10.2%
  recomputed    0 of 32 blocks

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
from transformers import AutoConfig, LlamaForCausalLM

from shardwright_runtime.checkpoint import Checkpoints, TrainState
from shardwright_runtime.data import Batch, Batches, byte_files, learnt_targets
from shardwright_runtime.divided_holder import DividedHolder
from shardwright_runtime.held_flat import FlatHolder
from shardwright_runtime.initialize import initialize, parameters_on_meta
from shardwright_runtime.losses import next_token_loss
from shardwright_runtime.pipeline import Pipeline
from shardwright_runtime.program import read_program
from shardwright_runtime.sequence import divide_sequence
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
WORLD_SIZE = 8  # processes, one a device
MESH_SHAPE = (2, 2, 2)  # slowest first; each number of shards is a product of the last dp ones
MESH_AXES = ("pp", "dp_1", "tp")
PARAMETER_SHARDS = 1  # devices that share one copy of the parameters
GRADIENT_SHARDS = 2  # of the gradients, from one micro-batch to the next
OPTIMIZER_SHARDS = 2  # of the optimizer's states and its fp32 values
STAGE_RANKS = (0, 1)  # of each stage of the model, its place on the axis pp
STAGE_CUTS = (16,)  # of each stage but the last, how many of BLOCKS lie before its end
COPIES = 2  # processes that have the same stages and parts of layers, each with its own samples
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
MICRO_BATCH = 8  # samples of one forward on one device
ACCUMULATION = 3  # micro-batches of one step on one pipeline
BLOCKS = [f"model.layers.{index}" for index in range(32)]  # the repeated blocks, in order
PREDICTED_STEP_S = 0.1614  # seconds


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags for what does not change the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of checkpoints and metrics")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS, help="stop after this step")
    parser.add_argument("--data", type=Path, default=HERE / DATA_ROOT, help="where relative paths of data start")
    return parser.parse_args(argv)


def build_model(
    device: torch.device, mesh: DeviceMesh, levels: Levels, place: int, batch: Batch
) -> tuple[nn.Module, StageStates]:
    """The model, cut into stages; parameters of own stages are initialised and sharded, one block at a time."""
    config = AutoConfig.from_pretrained(HERE / "model_config.json", use_cache=False)
    with parameters_on_meta():
        model: nn.Module = LlamaForCausalLM(config)
    parallelize_module(model, mesh["tp"], matching(model, TENSOR_PARALLEL))
    divide_cross_entropy(model, HEAD, mesh["tp"])
    divide_sequence(model, BLOCKS, tensor=mesh["tp"])
    # The model's own forward is run once, without values, to see what each stage computes and sends.
    own = [stage for stage, at in enumerate(STAGE_RANKS) if at == place]
    stages = stages_of(model, BLOCKS, STAGE_CUTS, own, summed_loss, batch, torch.float32)
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


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of one micro-batch, summed over its learnt targets."""
    return next_token_loss(model(input_ids=batch["input_ids"]), batch["targets"])


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
        summed = pipeline.evaluate(micro_batches)
        if summed is not None:  # where the last stage is
            sums[0] += summed
            sums[1] += learnt_targets(micro_batches)
    dist.all_reduce(sums)
    model.train()
    loss, targets = sums.tolist()
    return float(loss / max(targets, 1.0))


def train(args: argparse.Namespace, rank: int, device: torch.device) -> None:
    """Train from the start, or with --resume from the newest checkpoint, as process `rank` of WORLD_SIZE."""
    mesh = init_device_mesh("cpu", MESH_SHAPE, mesh_dim_names=MESH_AXES)
    process, part = divmod(rank, TENSOR_RANKS)  # the part of every layer
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
        rank=copy,
        world_size=COPIES,
    )
    model, placed = build_model(device, mesh, levels, place, batches(0))
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
        ties=placed.ties(COPIES * TENSOR_RANKS),
        # Dropout follows from the seed, the step and the stage, so resuming needs no saved generator.
        seed=lambda stage, micro: seed_for(SEED, "step", state.step, copy, stage, micro),
    )
    optimizer = make_optimizer(states)
    held_out = Batches(
        byte_files(args.data, VALIDATION_FILES, SEQUENCE_LENGTH),
        seed=SEED,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        rank=copy,
        world_size=COPIES,
        shuffle=False,
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
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step)
        micro_batches = [batches(state.step, micro) for micro in range(ACCUMULATION)]
        # Several processes read the same samples; one of them counts them.
        targets = float(learnt_targets(micro_batches)) if place == 0 and part == 0 else 0.0
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
        loss = float(loss_sum) / TENSOR_RANKS
        step_time_s = time.perf_counter() - began
        state = TrainState(step=state.step + 1, tokens=state.tokens + int(targets), seed=SEED)

        validation: dict[str, float] = {}
        if state.step == last_step:
            validation["validation_loss"] = evaluate(model, pipeline, held_out, device)
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
