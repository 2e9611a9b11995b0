"""Whether the executor takes the time that the simulator says, on CPU, with latency between the ranks.

    python benchmarks/pipeline_latency.py

Four processes over gloo run every family of schedules. Their stages sleep for the planned times of F, I and W, and do
not compute; every value that crosses ranks carries the time at which it was made, so that whoever receives it can wait
until the link would have delivered it. A row gives the makespan of one iteration, simulated and measured (the median),
in ms; below stands the rank correlation over the families. What the executor itself costs adds to every action.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime.deferred import WeightQueue
from shardwright.backends.pytorch.runtime.messages import Wire
from shardwright.backends.pytorch.runtime.pipeline import Pipeline
from shardwright.backends.pytorch.runtime.replicas import Replicas
from shardwright.planner.schedules.lowering import lower, neighbours
from shardwright.planner.schedules.simulator import simulate
from shardwright.planner.schedules.table import SCHEDULES, make_schedule
from shardwright.planner.schedules.timetable import Costs, Layout

RANKS, MICRO_BATCHES, STEPS = 4, 8, 4
FORWARD_S, INPUT_GRADIENT_S, WEIGHT_GRADIENT_S = 0.024, 0.028, 0.020
LATENCIES_S = (0.0, 0.012, 0.040)


class Sleeper(nn.Module):
    """A stage that takes its time; what it makes is the time at which it was made."""

    def __init__(self, stage: int, layout: Layout, costs: Costs, queue: WeightQueue) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.queue, self.is_last = queue, stage == layout.stages - 1
        self.forward_s, self.input_s = costs.forward[stage], costs.input_gradient[stage]
        self.weight_s = costs.weight_gradient[stage]
        self.from_before = costs.send[stage - 1] if stage else 0.0
        self.from_after = costs.send[stage] if stage < layout.stages - 1 else 0.0

    def forward(self, _: int, *received: tuple[Tensor]) -> Any:
        """Sleeps; `received` is one time, or nothing for the first stage."""
        made = _Sleep.apply(received[0][0] if received else self.start, self)  # type: ignore[no-untyped-call]
        return made if self.is_last else ((made,),)

    def sleep_weight(self) -> None:
        """W."""
        time.sleep(self.weight_s)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, stage: Sleeper) -> Tensor:
        ctx.stage = stage
        return _sleep(made, stage.from_before, stage.forward_s)

    @staticmethod
    def backward(ctx: Any, made: Tensor) -> tuple[Tensor, None]:
        stage: Sleeper = ctx.stage
        whole = 0.0 if stage.queue.defers else stage.weight_s
        return _sleep(made, stage.from_after, stage.input_s + whole), None


def _sleep(made: Tensor, latency: float, seconds: float) -> Tensor:
    """Sleeps from when a value made at that time has arrived; returns the time at the end."""
    time.sleep(max(float(made) + latency - time.monotonic(), 0.0) + seconds)
    return torch.full_like(made, time.monotonic())


def measure(name: str, latency: float) -> tuple[float, float]:
    """Makespans of a family in seconds, simulated and measured, the same in all processes."""
    times = (FORWARD_S, INPUT_GRADIENT_S, WEIGHT_GRADIENT_S, latency)
    layout, costs, timetable = make_schedule(name, RANKS, MICRO_BATCHES, times)
    rank, queue, states = dist.get_rank(), WeightQueue(), Replicas()
    own = [layout.stage(rank, chunk) for chunk in range(layout.chunks)]
    stages = {stage: Sleeper(stage, layout, costs, queue) for stage in own}
    pipeline = Pipeline(
        lower(timetable, layout, costs=costs)[rank],
        stages,
        ranks=[layout.place(stage)[0] for stage in range(layout.stages)],
        wires={edge: [Wire((1,), torch.float64)] for edge in neighbours(layout)},
        loss=lambda output, _: output.sum(),
        queue=queue,
        states=states,
        units={stage: [states.take(module.parameters())] for stage, module in stages.items()},
        device=torch.device("cpu"),
    )
    weight = pipeline.actions["W"]

    def sleep_weight(stage: int, micro_batch: int, peer: int) -> None:
        weight(stage, micro_batch, peer)
        stages[stage].sleep_weight()

    pipeline.actions["W"] = sleep_weight
    measured = []
    for _ in range(STEPS):
        dist.barrier()
        start = time.monotonic()
        pipeline.step(range(MICRO_BATCHES))
        dist.barrier()
        measured.append(time.monotonic() - start)
    return simulate(timetable, layout, costs).makespan, statistics.median(measured[1:])


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, with the mean rank for equals (closer than a microsecond)."""

    def ranks(values: Sequence[float]) -> list[float]:
        rounded = [round(value, 6) for value in values]
        return [sum(each < value for each in rounded) + (rounded.count(value) - 1) / 2 for value in rounded]

    return statistics.correlation(ranks(one), ranks(other))


def work(rank: int, meeting: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    for latency in LATENCIES_S:
        found = {name: measure(name, latency) for name in SCHEDULES}
        if rank == 0:
            print(f"latency {latency * 1e3:.0f} ms        simulated  measured  ratio")
            for name, (simulated, measured) in sorted(found.items(), key=lambda item: item[1]):
                print(f"  {name:18} {simulated * 1e3:10.1f} {measured * 1e3:9.1f} {measured / simulated:6.3f}")
            print(f"  rank correlation {rank_correlation(*zip(*found.values(), strict=True)):.3f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(f"{folder}/meeting",), nprocs=RANKS)  # type: ignore[attr-defined, no-untyped-call]
