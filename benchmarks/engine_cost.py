"""What the runtime's engine costs on CPU, against FSDP2 and DDP at the points that both can run.

    python benchmarks/engine_cost.py

Four processes over gloo train small blocks, so that what an engine does around the computation counts. The engines take
turns of a few steps within one run, and a row gives the median step of each and their ratio; the times themselves say
nothing about GPUs. HSDP is FSDP2 on a mesh of two nodes of two.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates

WORLD, BLOCKS, WIDTH, ROWS = 4, 8, 128, 64
TURNS, STEPS, WARM_UP = 12, 6, 2


class Block(nn.Module):
    """As many parameters as a Transformer's block has, small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = x + F.gelu(layer(self.norms[index % 2](x)))
        return x


class Model(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x).square().mean()
        return result


Step = Callable[[Tensor], None]


class Point(NamedTuple):
    """Shard degrees of all three states, and PyTorch's own engine for it."""

    name: str
    stock: str
    sizes: tuple[int, ...]
    """Of the mesh's axes, the slowest first."""
    degree: int


POINTS = (
    Point("all states on all devices", "FSDP2", (WORLD,), WORLD),
    Point("all states whole", "DDP", (WORLD,), 1),
    Point("all states within a node", "FSDP2 (HSDP)", (2, 2), 2),
)


def stock_step(point: Point) -> Step:
    """A training step with PyTorch's engine."""
    mesh = init_device_mesh("cpu", point.sizes, mesh_dim_names=("outer", "inner")[-len(point.sizes) :])
    model = Model()
    if point.degree == 1:
        wrapped: nn.Module = DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        wrapped = model
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)

    def step(x: Tensor) -> None:
        torch.autograd.backward(wrapped(x))
        optimizer.step()
        optimizer.zero_grad()

    return step


def own_step(point: Point) -> Step:
    """The same with `ShardedStates`."""
    names = tuple(f"dp_{index}" for index in range(len(point.sizes), 0, -1))
    mesh, degree = init_device_mesh("cpu", point.sizes, mesh_dim_names=names), point.degree
    states = ShardedStates(Levels(mesh, parameters=degree, gradients=degree, optimizer_states=degree), torch.float32)
    model = Model()
    for block in model.blocks:
        states.shard(block)
    states.shard(model, root=True)
    optimizer = torch.optim.AdamW(states.parameter_groups([{}, {}]), lr=1e-3)

    def step(x: Tensor) -> None:
        states.backward(model(x) / WORLD, last=True)
        optimizer.step()
        states.publish()

    return step


def measure(point: Point) -> tuple[float, float]:
    """Median seconds of a step, of the stock engine and of ours."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH)
    steps = (stock_step(point), own_step(point))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS + 1):
        for step, found in zip(steps, times, strict=True):
            for number in range(STEPS):
                dist.barrier()
                start = time.perf_counter()
                step(x)
                if turn and number >= WARM_UP:
                    found.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def run(rank: int, store: str) -> None:
    """One of the processes; the first prints the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    if rank == 0:
        print(f"{WORLD} processes, {BLOCKS} blocks of width {WIDTH}, milliseconds a step")
        print(f"{'point':28} {'stock':14} {'stock':>7} {'ours':>7} {'ours / stock':>13}")
    for point in POINTS:
        stock, own = measure(point)
        if rank == 0:
            print(f"{point.name:28} {point.stock:14} {stock * 1e3:7.1f} {own * 1e3:7.1f} {own / stock:13.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(f"{folder}/store",), nprocs=WORLD)  # type: ignore[attr-defined, no-untyped-call]
