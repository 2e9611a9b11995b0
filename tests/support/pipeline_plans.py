"""Pipeline plans made by hand out of other plans. What they predict follows from invented costs of a block, so stages,
timetable, times and memory agree with each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from shardwright.planner.schedules.bounds import lower_bound
from shardwright.planner.schedules.simulator import Simulation, simulate
from shardwright.planner.schedules.table import SCHEDULES, make_schedule
from shardwright.planner.schedules.text import to_text
from shardwright.planner.schedules.timetable import Costs, Layout
from shardwright.schemas.plan import (
    Checkpointing,
    Decision,
    Engine,
    Memory,
    MemoryPhase,
    Mesh,
    MeshAxis,
    Pipeline,
    PipelinePrediction,
    Plan,
    StageMemory,
    StageTime,
    States,
    StateSharding,
    TimePart,
)

_WHOLE = StateSharding(degree=1, levels=())
_BLOCK_S, _SEND_S = 1e-3, 1e-4
"""Of each of a block's F, I and W, and of sending between ranks."""
_ACTIVATIONS, _INPUT, _HELD = 3 << 20, 1 << 20, 2 << 20
"""What a block keeps, what it keeps where it is recomputed, and what its pending W holds."""
_STATES = {"parameters": 4 << 20, "gradients": 4 << 20, "optimizer_states": 8 << 20}
"""Of one block."""


def pipeline_plan(
    plan: Plan,
    *,
    ranks: int,
    chunks: int = 1,
    family: str = "1f1b",
    copies: int = 1,
    micro_batches: int = 4,
    cuts: Sequence[int] | None = None,
    checkpointed: Sequence[int] | None = None,
    embedding: float = 0.0,
    head: float = 0.0,
    limits: Sequence[int] | None = None,
    late_step: bool = False,
) -> Plan:
    """The plan with a pipeline of `ranks` times `copies` devices, which its cluster must have.

    Of a plan of amsp whose `dp` axes count to `copies`, axes and states are kept; otherwise states are whole. `cuts`
    are as even as they can be unless given. `embedding` and `head` cost as much as so many blocks. `limits` are the
    bytes of activations that a schedule is searched under.
    """
    world, blocks = ranks * copies, plan.decision.checkpointing.of
    stages = ranks * chunks
    cut = tuple(cuts) if cuts is not None else _even_cuts(stages, blocks)
    again = tuple(checkpointed) if checkpointed is not None else (0,) * stages
    if plan.job.cluster.world_size != world:
        raise ValueError(f"{ranks} ranks times {copies} copies on {plan.job.cluster.world_size} devices")
    if len(cut) != stages - 1 or len(again) != stages:
        raise ValueError(f"{len(cut)} cuts and {len(again)} numbers of recomputed blocks for {stages} stages")
    sequences, parts = plan.job.train.global_batch_sequences, copies * micro_batches
    if sequences % parts:
        raise ValueError(f"{sequences} sequences do not divide into {parts} micro-batches")
    sizes = [after - before for before, after in pairwise((0, *cut, blocks))]
    layout = Layout(ranks, chunks, SCHEDULES[family].placement)
    layout, costs, timetable = make_schedule(
        family, ranks, micro_batches, _costs(layout, sizes, again, embedding, head), memory_limit=limits, chunks=chunks
    )
    pipeline = Pipeline(
        ranks=ranks,
        chunks=chunks,
        placement=layout.placement,
        schedule=family,  # type: ignore[arg-type]
        cuts=cut,
        checkpointed=again,
        activation_limits=tuple(limits or ()),
        late_step=late_step,
    )
    simulation = simulate(timetable, layout, costs)
    bound = lower_bound(layout, costs, micro_batches, limits)
    predicted = PipelinePrediction(
        stages=tuple(_stage_time(stage, layout, costs) for stage in range(stages)),
        edges=tuple(pairwise(range(stages))),
        timetable=tuple(to_text(timetable).splitlines()),
        makespan_s=simulation.makespan,
        bubble_rate=simulation.bubble_rate(),
        lower_bound_s=bound,
        gap=simulation.span / bound - 1,
    )
    decision = _decision(plan, pipeline, copies, micro_batches)
    step = simulation.makespan + _BLOCK_S
    tokens = sequences * plan.job.train.sequence_length
    prediction = plan.prediction.model_copy(
        update={
            "step_time_s": step,
            "tokens_per_s": tokens / step,
            "time": (
                TimePart(name="pipeline", seconds=simulation.makespan),
                TimePart(name="optimizer", seconds=step - simulation.makespan),
            ),
            "memory": _memory(plan, simulation, sizes),
            "pipeline": predicted,
        }
    )
    name = f"pipeline of {ranks} x {copies} ({family})"
    return Plan.model_validate(
        plan.model_copy(update={"name": name, "decision": decision, "prediction": prediction}).model_dump()
    )


def _even_cuts(stages: int, blocks: int) -> tuple[int, ...]:
    """As even as can be; with fewer blocks than stages the last stages have one block each, and the head is alone."""
    if blocks >= stages:
        return tuple(stage * blocks // stages for stage in range(1, stages))
    return tuple(range(blocks - stages + 2, blocks + 1))


def _costs(layout: Layout, sizes: Sequence[int], again: Sequence[int], embedding: float, head: float) -> Costs:
    work = [float(size) for size in sizes]
    work[0] += embedding
    work[-1] += head
    here = [layout.place(stage)[0] for stage in range(layout.stages)]
    return Costs(
        forward=[_BLOCK_S * each for each in work],
        input_gradient=[_BLOCK_S * (each + recomputed) for each, recomputed in zip(work, again, strict=True)],
        weight_gradient=[_BLOCK_S * each for each in work],
        send=[_SEND_S * (first != second) for first, second in pairwise(here)],
        activations=[
            _ACTIVATIONS * (size - recomputed) + _INPUT * (recomputed + 1)
            for size, recomputed in zip(sizes, again, strict=True)
        ],
        held_by_weight=[min(_HELD * size, _INPUT * (size + 1)) for size in sizes],
    )


def _stage_time(stage: int, layout: Layout, costs: Costs) -> StageTime:
    return StageTime(
        stage=stage,
        rank=layout.place(stage)[0],
        forward_s=costs.forward[stage],
        input_gradient_s=costs.input_gradient[stage],
        weight_gradient_s=costs.weight_gradient[stage],
        send_s=(*costs.send, 0.0)[stage],
        activation_bytes=round(costs.activations[stage]),
        held_by_weight_bytes=round(costs.held_by_weight[stage]),
    )


def _decision(plan: Plan, pipeline: Pipeline, copies: int, micro_batches: int) -> Decision:
    old, levels = plan.decision, tuple(level.name for level in plan.job.cluster.levels)
    axes = tuple(axis for axis in old.mesh.axes if axis.name != "pp")
    states, product = old.states, 1
    for axis in axes:
        product *= axis.size
    if old.engine.name != "amsp" or product != copies:
        axes = (MeshAxis(name="dp_1", size=copies, levels=levels),) if copies > 1 else ()
        states = States(parameters=_WHOLE, gradients=_WHOLE, optimizer_states=_WHOLE)
    across = MeshAxis(name="pp", size=pipeline.ranks, levels=levels)
    recomputed = sum(pipeline.checkpointed)
    return old.model_copy(
        update={
            "mesh": Mesh(world_size=pipeline.ranks * copies, axes=(across, *axes)),
            "states": states,
            "micro_batch": plan.job.train.global_batch_sequences // (copies * micro_batches),
            "accumulation": micro_batches,
            "checkpointing": Checkpointing(
                policy="full" if recomputed else "none", blocks=recomputed, of=old.checkpointing.of
            ),
            "engine": Engine(name="amsp", reshard_after_forward=True if states.parameters.degree > 1 else None),
            "pipeline": pipeline,
        }
    )


def _memory(plan: Plan, simulation: Simulation, sizes: Sequence[int]) -> Memory:
    stages = tuple(_rank_memory(rank, simulation, sizes) for rank in range(simulation.layout.ranks))
    fullest = max(stages, key=lambda stage: stage.peak_allocated_bytes)
    return Memory(
        peak_allocated_bytes=fullest.peak_allocated_bytes,
        peak_reserved_bytes=fullest.peak_reserved_bytes,
        stages=stages,
        at_rest=stages[0].phases[-1].bytes,
        host_bytes=plan.prediction.memory.host_bytes,
    )


def _rank_memory(rank: int, simulation: Simulation, sizes: Sequence[int]) -> StageMemory:
    layout = simulation.layout
    blocks = sum(sizes[layout.stage(rank, chunk)] for chunk in range(layout.chunks))
    states = {name: size * blocks for name, size in _STATES.items()}
    busy = {**states, "activations": round(simulation.peak_memory[rank])}
    phases = tuple(
        MemoryPhase(name=name, bytes=sizes, total_bytes=sum(sizes.values()))
        for name, sizes in (("pipeline", busy), ("optimizer", states))
    )
    peak = phases[0].total_bytes
    return StageMemory(
        stage=rank,
        phases=phases,
        peak_phase="pipeline",
        peak_allocated_bytes=peak,
        peak_reserved_bytes=peak + peak // 16,
    )
