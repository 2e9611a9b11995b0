"""What a point is called."""

from __future__ import annotations

from shardwright.planner.engines import ENGINES
from shardwright.planner.flat import chain
from shardwright.planner.parallel import WHOLE, Parallel
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.space import Pipe, Point
from shardwright.schemas.expected import join


def plan_name(point: Point, blocks: int) -> str:
    """The field's name of a point, for example `FSDP2 x 8 (ZeRO-3), bf16, 12 of 32 blocks checkpointed` or
    `TP 8 x PP 4 (zb-h1) x AMSP 1/1/16 of 16 (ZeRO-1), bf16`."""
    parts = [_layout(point), PRECISIONS[point.precision].short]
    if point.recomputed:
        parts.append(f"{point.recomputed} of {blocks} blocks checkpointed")
    return ", ".join(parts)


def summary(point: Point, blocks: int) -> str:
    """The name, and all else in which two points may differ: how the batch is cut, and when gradients are reduced."""
    cut = f"micro-batch {point.micro_batch} x {point.accumulation}"
    waits = ", gradients reduced once a step" if point.gradients_wait and not ENGINES[point.engine].flat else ""
    return f"{plan_name(point, blocks)}, {cut}{waits}"


def family(point: Point) -> str:
    """The method whose point it is, whatever engine runs it.

    ZeRO-1 to -3: Rajbhandari et al. 2020, arXiv 1910.02054. ZeRO-1.5: ZeRO-1 inside groups, `zero1.size` of InternEvo.
    MiCS: Zhang et al. 2022, arXiv 2205.00119; with PyTorch's name HSDP. hpZ: ZeRO++, arXiv 2306.10209. Frontier: three
    degrees on three levels, arXiv 2501.04266. Everything else is only AMSP's, arXiv 2311.00257. With one micro-batch a
    step no gradient accumulates, and ZeRO-1 is ZeRO-2. All pipelines are one method, whatever their schedule, and so
    are all points that share a copy of the model in the same ways, whatever else they do.
    """
    if point.parallel != WHOLE:
        return shared_by(point.parallel)
    if point.pipe is not None:
        return "pipeline"
    return "one device" if point.world == 1 else _sharding(point)


def shared_by(parallel: Parallel) -> str:
    """`tensor parallel`, `tensor and context parallel`: how processes share one copy of the model; empty where they do
    not."""
    degrees = {"tensor": parallel.tp, "context": parallel.cp, "expert": parallel.ep}
    names = [name for name, degree in degrees.items() if degree > 1]
    return f"{join(names, 'and')} parallel" if names else ""


def _sharding(point: Point) -> str:
    """Of the states among the processes that have the same parameters."""
    world = point.copies
    parameters, gradients, states = point.shard, point.gradient_degree, point.optimizer_degree
    if point.secondary is not None:
        return "ZeRO++ hpZ" if parameters == states == world else "AMSP with hpZ"
    if states == 1:
        return "data parallel"
    if parameters == states:
        return "ZeRO-3" if states == world else "MiCS / HSDP"
    if parameters == 1 and gradients in (1, states):
        if states < world:
            return "ZeRO-1.5"
        return "ZeRO-1" if gradients == 1 else "ZeRO-2"
    if 1 < parameters < gradients < states == world:
        return "Frontier"
    return "AMSP"


def _layout(point: Point) -> str:
    """`TP 8 x CP 2 (ring) x EP 4 x FSDP2 x 64 (ZeRO-3)`: what is shared, then the states among the data processes."""
    parallel = point.parallel
    names = [f"TP {parallel.tp}"] if parallel.tp > 1 else []
    names += [f"CP {parallel.cp} ({parallel.method})"] if parallel.cp > 1 else []
    names += [f"EP {parallel.ep}"] if parallel.ep > 1 else []
    if point.world > 1 or not names:
        names.append(_data(point))
    return " x ".join(names)


def _data(point: Point) -> str:
    kept = " (parameters kept)" if point.kept else ""
    again = f" (hpZ {point.secondary})" if point.secondary is not None else ""
    if point.pipe is not None:
        return _pipeline(point, point.pipe)
    if point.world == 1:
        return f"one device{kept}"
    if point.engine == "ddp":
        return f"DDP x {point.world}"
    if ENGINES[point.engine].flat:
        return _flat(point)
    if point.shard == 1:
        return f"FSDP2, replicated x {point.world}{kept}"
    if point.replicas > 1:
        return f"HSDP {point.replicas} x {point.shard}{kept}{again}"
    return f"FSDP2 x {point.shard}{kept or again or ' (ZeRO-3)'}"


def _pipeline(point: Point, pipe: Pipe) -> str:
    """`PP 4 (zb-v, 2 chunks) x AMSP 1/1/16 of 16 (ZeRO-1)`: devices of a pipeline, then the states among its copies."""
    chunks = f", {pipe.chunks} chunks" if pipe.chunks > 1 else ""
    late = ", late step" if pipe.late_step else ""
    name = f"PP {pipe.ranks} ({pipe.schedule}{chunks}{late})"
    return f"{name} x {_flat(point)}" if point.copies > 1 else name


def _flat(point: Point) -> str:
    """`AMSP 2/8/64 of 64 (Frontier, parameters kept)`: degrees of parameters, gradients and optimizer states."""
    method, world = _sharding(point), point.copies
    notes = [] if method.startswith("AMSP") else [method]
    if point.secondary is not None:
        notes = [f"hpZ {point.secondary}"]
    if point.kept:
        notes.append("parameters kept")
    if point.int8_gathers:
        notes.append("int8 gathers")
    if point.int4_reductions:
        notes.append("int4 reductions")
    degrees = (point.shard, point.gradient_degree, point.optimizer_degree)
    if point.axes != chain(world, *degrees, point.secondary).sizes:
        notes.append("hierarchical")
    name = f"AMSP {'/'.join(map(str, degrees))} of {world}"
    return f"{name} ({', '.join(notes)})" if notes else name
