"""How well `ShardedStates` hides its collectives, without a network: time is counted, not measured.

Every collective of a group occupies that group's wire for a given time, one after another, gathers and reductions
alike; every block computes for a given time; a wait lasts until the collective is over. What the engine takes is held
against the critical path: the same collectives and computations, each as early as its inputs and its wire allow.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.one_mesh import Mesh
from support.states_reference import layouts
from torch import Tensor, nn

from shardwright.backends.pytorch.runtime.states import Levels, ShardedStates
from shardwright.planner.flat_lanes import Communication, FlatStep, FlatUnit, run_flat

BLOCKS, STEPS, MICRO_BATCHES = 8, 3, 2
"""Of the runs whose time counts."""
EMBED, FORWARD, BACKWARD, OPTIMIZER = 2.0, 10.0, 20.0, 1.0
"""Milliseconds: of the embedding and of the head, of a block, and of the optimizer."""
BOUND = 1.10


@dataclass
class Clock:
    """The time in milliseconds, when each wire is free, and what was issued and computed, in order."""

    now: float = 0.0
    free: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    log: list[str] = field(default_factory=list)

    def compute(self, name: str, duration: float) -> None:
        self.log.append(name)
        self.now += duration


@dataclass
class Work:
    """A collective under way."""

    clock: Clock
    end: float

    def wait(self) -> None:
        self.clock.now = max(self.clock.now, self.end)


class Computes(torch.autograd.Function):
    """Takes its time in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, name: str, forward: float, backward: float) -> Tensor:
        ctx.backward_of = (clock, name, backward)
        clock.compute(f"forward {name}", forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        clock, name, duration = ctx.backward_of
        clock.compute(f"backward {name}", duration)
        return gradients[0], None, None, None, None


def computes(x: Tensor, *of: Any) -> Tensor:
    """Applies `Computes`."""
    result: Tensor = Computes.apply(x, *of)  # type: ignore[no-untyped-call]
    return result


class Block(nn.Module):
    """Blocks differ in size, so that a collective's bytes tell whose it is."""

    def __init__(self, clock: Clock, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64 * (number + 2)))
        self.clock, self.number = clock, number

    def forward(self, x: Tensor) -> Tensor:
        return computes(x, self.clock, str(self.number), FORWARD, BACKWARD) * self.weight.sum()


class Model(nn.Module):
    """Embedding, blocks and head."""

    def __init__(self, clock: Clock, blocks: int) -> None:
        super().__init__()
        self.clock = clock
        self.embed, self.head = nn.Parameter(torch.ones(32)), nn.Parameter(torch.ones(32))
        self.blocks = nn.ModuleList(Block(clock, number) for number in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = computes(x * self.embed.sum(), self.clock, "embed", EMBED, EMBED)
        for block in self.blocks:
            x = block(x)
        return computes(x * self.head.sum(), self.clock, "head", EMBED, EMBED)


@dataclass(frozen=True)
class Case:
    """A layout, and for how long a collective occupies the wire of each axis, in milliseconds."""

    sizes: tuple[int, ...]
    degrees: tuple[int, int, int]
    second: int | None
    wires: tuple[float, ...]
    reshard: bool = True

    def levels(self) -> Levels:
        p, g, o = self.degrees
        mesh: Any = Mesh(self.sizes)
        return Levels(mesh, parameters=p, gradients=g, optimizer_states=o, secondary=self.second)


def train(case: Case, patch: pytest.MonkeyPatch, steps: int, micro_batches: int, blocks: int) -> Clock:
    """Trains under a clock of its own, up to the last optimizer step."""
    clock, levels = Clock(), case.levels()
    units = {64 * (number + 2): str(number) for number in range(blocks)} | {64: "root"}

    def collective(kind: str, whole: int) -> Callable[..., Work]:
        def call(*tensors: Tensor, group: int, async_op: bool) -> Work:
            assert async_op
            level = levels.optimizer_states if kind == "all_reduce" else group
            clock.log.append(f"{kind} {units[tensors[whole].numel() * levels.degree(level)]} dp_{group + 1}")
            start = max(clock.now, clock.free[group])
            clock.free[group] = start + case.wires[group]
            tensors[0].zero_()
            return Work(clock, clock.free[group])

        return call

    patch.setattr(dist, "all_gather_single", collective("gather", 0))
    patch.setattr(dist, "reduce_scatter_single", collective("reduce_scatter", 1))
    patch.setattr(dist, "all_reduce", collective("all_reduce", 0))
    model = Model(clock, blocks)
    states = ShardedStates(levels, torch.float32, reshard_after_forward=case.reshard)
    for block in model.blocks:
        states.shard(block)
    states.shard(model, root=True)
    for step in range(steps):
        if step:
            states.publish()
        for micro in range(micro_batches):
            states.backward(model(torch.ones(1)).sum(), last=micro == micro_batches - 1)
        clock.compute("optimizer", OPTIMIZER)
    return clock


class Paths:
    """Computations in order, collectives between them; `end` of each, as early as inputs and wires allow."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Any, float, list[int], int]] = []

    def task(self, resource: Any, duration: float, after: Iterable[int | None], priority: int = 0) -> int:
        self.tasks.append((resource, duration, [each for each in after if each is not None], priority))
        return len(self.tasks) - 1

    def sends(
        self, axes: Iterable[int], wires: Sequence[float], after: list[int | None], priority: int = 0
    ) -> list[int]:
        """One collective after another; the end of what is before them, and of each."""
        ends = [self.task(None, 0.0, after)]
        for axis in axes:
            ends.append(self.task(axis, wires[axis], [ends[-1]], priority))
        return ends

    def end(self, last: int) -> float:
        """When a task is done: each wire takes what is ready first."""
        waiting = [len(set(after)) for _, _, after, _ in self.tasks]
        followers = defaultdict(list)
        for index, (_, _, after, _) in enumerate(self.tasks):
            for before in set(after):
                followers[before].append(index)
        ready = [(0.0, self.tasks[index][3], index) for index, count in enumerate(waiting) if not count]
        heapq.heapify(ready)
        ends = [0.0] * len(self.tasks)
        free: dict[Any, float] = defaultdict(float)
        while ready:
            at, _, index = heapq.heappop(ready)
            resource, duration, _, _ = self.tasks[index]
            ends[index] = (max(at, free[resource]) if resource is not None else at) + duration
            free[resource] = ends[index]
            for follower in followers[index]:
                waiting[follower] -= 1
                if not waiting[follower]:
                    start = max(ends[before] for before in self.tasks[follower][2])
                    heapq.heappush(ready, (start, self.tasks[follower][3], follower))
        return ends[last]


def critical_path(case: Case) -> float:
    """Of the same training, under three rules of memory.

    Units are gathered as many ahead as a gather has axes. A block's backward waits for the first reduction of the block
    two behind it, and a block's forward for the next reduction of every unit of the micro-batch before, so that their
    buffers do not pile up.
    """
    levels, wires, paths, root = case.levels(), case.wires, Paths(), BLOCKS
    p, g, o, second = levels.parameters, levels.gradients, levels.optimizer_states, levels.secondary
    published: dict[int, int | None] = dict.fromkeys(range(BLOCKS + 1))
    reduced: list[list[int]] = []
    before: int | None = None
    for _ in range(STEPS):
        for micro in range(MICRO_BATCHES):
            last = micro == MICRO_BATCHES - 1
            gathered = range(p - 1, -1, -1) if case.reshard or micro == 0 else ()
            begin = paths.task(None, 0.0, [before])
            *_, here = paths.sends(gathered, wires, [begin, published[root]])
            before = paths.task("compute", EMBED, [begin, here])
            starts = [begin] * max(p, 1)
            for unit in range(BLOCKS):
                *_, here = paths.sends(gathered, wires, [starts[unit], published[unit]])
                due = [ends[unit + turn + 1] for turn, ends in enumerate(reduced) if unit + turn + 1 < len(ends)]
                starts.append(paths.task(None, 0.0, [before, here, *due]))
                before = paths.task("compute", FORWARD, [starts[-1]])
            before = paths.task("compute", EMBED, [before])
            starts = [before] * max(second, 1)
            before = paths.task("compute", EMBED, [before])
            reduced = []
            for turn, unit in enumerate((*reversed(range(BLOCKS)), root)):
                if unit != root:
                    *_, here = paths.sends(range(second - 1, -1, -1) if case.reshard else (), wires, [starts[turn]])
                    due = [ends[1] for ends in reduced[1:2] if len(ends) > 1]
                    starts.append(paths.task(None, 0.0, [before, here, *due]))
                duration, ready = (EMBED, before) if unit == root else (BACKWARD, starts[-1])
                before = paths.task("compute", duration, [ready])
                reduced.insert(0, paths.sends(range(len(case.sizes) if last else g), wires, [before], priority=1))
        before = paths.task("compute", OPTIMIZER, [before, *(ends[-1] for ends in reduced)])
        reduced = []
        for unit in (root, *range(BLOCKS)):
            *_, published[unit] = paths.sends(range(o - 1, p - 1, -1), wires, [before])
    assert before is not None
    return paths.end(before)


WIRES = {"fast": (2.0, 4.0, 6.0), "even": (8.0, 8.0, 8.0), "slow": (12.0, 18.0, 25.0)}
"""Against 10 of a block's forward and 20 of its backward, which gather and reduce."""
CASES = [
    Case(sizes, degrees, second, wires[: len(sizes)], reshard)
    for sizes, degrees, second in layouts((4,), (2, 2), (2, 2, 2))
    for wires in WIRES.values()
    for reshard in (True, False)
]


def takes(case: Case, patch: pytest.MonkeyPatch) -> float:
    """Milliseconds of the engine."""
    return train(case, patch, STEPS, MICRO_BATCHES, BLOCKS).now


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_takes_little_longer_than_its_critical_path(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    least, taken = critical_path(case), takes(case, monkeypatch)
    assert least <= taken * (1 + 1e-9)
    assert taken <= BOUND * least


def planned(case: Case) -> float:
    """Milliseconds of a step as the planner predicts them, the optimizer's aside."""
    levels = case.levels()
    p, g, o, second = levels.parameters, levels.gradients, levels.optimizer_states, levels.secondary

    def hops(*axes: int) -> tuple[tuple[tuple[int, float], ...]]:
        return (tuple((axis, case.wires[axis]) for axis in axes),)

    sends = Communication(
        gathers=hops(*reversed(range(p))),
        again=hops(*reversed(range(second))),
        reductions=hops(*range(g)),
        last_reductions=hops(*range(len(case.sizes))),
        publications=hops(*reversed(range(p, o))),
    )
    step = FlatStep(
        blocks=[FlatUnit(FORWARD, BACKWARD, sends)] * BLOCKS,
        root=sends,
        embedding=(EMBED, EMBED),
        head=(EMBED, EMBED),
        micro_batches=MICRO_BATCHES,
        kept=not case.reshard,
        wires=len(case.sizes),
        gather_hops=p,
        again_hops=second,
        publish_hops=o - p,
    )
    return run_flat(step).compute


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_planner_predicts_the_time_that_the_engine_takes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a second step adds: new values on their way, its micro-batches, and the optimizer."""
    first, second = (train(case, monkeypatch, steps, MICRO_BATCHES, BLOCKS).now for steps in (1, 2))
    assert planned(case) == pytest.approx(second - first - OPTIMIZER)


SHARDED = Case((2, 2), (4, 4, 4), None, WIRES["even"][:2])


def test_without_gathers_ahead_it_would_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardedStates, "gather", lambda *_, **__: None)
    assert takes(SHARDED, monkeypatch) > 1.2 * critical_path(SHARDED)


def test_with_reductions_that_are_waited_for_it_would_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = ShardedStates.reduce

    def reduce_and_wait(self: ShardedStates, unit: int, *, last: bool) -> None:
        reduce(self, unit, last=last)
        while self._reducing:
            self.advance()

    monkeypatch.setattr(ShardedStates, "reduce", reduce_and_wait)
    assert takes(SHARDED, monkeypatch) > 1.2 * critical_path(SHARDED)


FORWARD_ORDER = """
    gather root dp_1, gather 0 dp_1, forward embed, gather 1 dp_1, forward 0, gather 2 dp_1, forward 1, forward 2,
    forward head
"""
FULLY_SHARDED = f"""
    {FORWARD_ORDER.strip()},
    gather 2 dp_1, backward head, gather 1 dp_1, backward 2, gather 0 dp_1, reduce_scatter 2 dp_1, backward 1,
    reduce_scatter 1 dp_1, backward 0, backward embed, reduce_scatter 0 dp_1, reduce_scatter root dp_1, optimizer
"""
WIDER_OPTIMIZER = f"""
    {FORWARD_ORDER.strip()},
    gather 2 dp_1, backward head, gather 1 dp_1, backward 2, gather 0 dp_1, reduce_scatter 2 dp_1, backward 1,
    reduce_scatter 2 dp_2, reduce_scatter 1 dp_1, backward 0, backward embed, reduce_scatter 1 dp_2,
    reduce_scatter 0 dp_1, reduce_scatter 0 dp_2, reduce_scatter root dp_1, reduce_scatter root dp_2, optimizer
"""
PUBLISHED = "gather root dp_2, gather 0 dp_2, gather 1 dp_2, gather 2 dp_2"
ORDERS = {
    Case((4,), (4, 4, 4), None, (8.0,)): f"{FULLY_SHARDED}, {FULLY_SHARDED}",
    Case((2, 2), (2, 2, 4), None, (8.0, 8.0)): f"{WIDER_OPTIMIZER}, {PUBLISHED}, {WIDER_OPTIMIZER}",
}


@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_collectives_are_issued_in_this_order(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    log = train(case, monkeypatch, steps=2, micro_batches=1, blocks=3).log
    assert log == [each.strip() for each in ORDERS[case].split(",")]
