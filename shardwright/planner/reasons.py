"""What each value of a decision buys, in words and numbers."""

from __future__ import annotations

from collections.abc import Callable

from shardwright.planner import sharing_reasons
from shardwright.planner.candidates import Candidate
from shardwright.planner.engines import ENGINES
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.predict import Predictor
from shardwright.planner.schedules.table import SCHEDULES
from shardwright.planner.search import OWN_ENGINE_GAIN
from shardwright.planner.space import TENSOR_AXIS, Point, block_count, decide
from shardwright.schemas.plan import Decision
from shardwright.schemas.units import human_bytes, human_seconds


def buys(key: str, predictor: Predictor, chosen: Candidate) -> str:
    """One sentence, without its full stop, on what the chosen point's value of `key` is good for."""
    own = predictor if key in _OF_THE_WHOLE else predictor.of(chosen.point.parallel)
    return _BUYS[key](own, chosen)


def shown(decision: Decision, key: str) -> str:
    """The value of a dotted key of the decision, for people."""
    value: object = decision
    for name in key.split("."):
        value = getattr(value, name)
    return _VALUES.get(key, str)(value)


def _engine(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    if point.engine == "single":
        alone = "One device needs no communication"
        return alone if point.devices == 1 else "One process of each part of the layers needs none to shard states over"
    if point.engine == "ddp":
        return "Replicated states need no gathers, only one all-reduce of the gradients a step"
    if point.pipe is not None:
        return f"Runs pipeline stages; {_has_to_be_faster(point)}"
    if point.engine == "amsp":
        return f"The only one that shards each state over a number of devices of its own; {_has_to_be_faster(point)}"
    if point.shard == 1:
        return f"{PRECISIONS[point.precision].short} compute on float32 masters; nothing is sharded"
    return f"Shards parameters and optimizer states over {point.shard} devices, and gathers block by block"


def _has_to_be_faster(point: Point) -> str:
    least = f"{100 * OWN_ENGINE_GAIN:g} %"
    return f"{ENGINES[point.engine].run_on}, so it has to be {least} faster than a stock engine"


def _ranks(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    if point.pipe is None:
        return "Every device runs the whole model, and none waits for another one's activations"
    sent = max(predictor.pipelines.costs.messages(point).values(), default=0)
    copies = f"{point.copies} such copies train side by side" if point.copies > 1 else "there is one such copy"
    return (
        f"One copy of the model lies on {point.pipe.ranks} devices; {copies}. From stage to stage go up to "
        f"{human_bytes(sent)} a micro-batch"
    )


def _schedule(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    assert point.pipe is not None, "only pipelines have a schedule"
    predicted = predictor.pipelines.prediction(point)
    summary = SCHEDULES[point.pipe.schedule].summary
    bubble, gap = 100 * max(0.0, predicted.bubble_rate), 100 * max(0.0, predicted.gap)
    limits = "within these memory limits" if point.pipe.activation_limits else "of these stages"
    return (
        f"{summary[:1].upper()}{summary[1:]}; its bubble is {bubble:.1f} % of the busiest device's time, and no "
        f"schedule {limits} is shorter by more than {gap:.1f} %"
    )


def _cuts(predictor: Predictor, chosen: Candidate) -> str:
    pipe = chosen.point.pipe
    assert pipe is not None, "only pipelines are cut"
    costs = predictor.pipelines.costs.costs(chosen.point)
    times = [sum(each) for each in zip(costs.forward, costs.input_gradient, costs.weight_gradient, strict=True)]
    sizes = pipe.sizes(block_count(predictor.profile))
    blocks = (
        f"{min(sizes)} to {max(sizes)} blocks"
        if min(sizes) < max(sizes)
        else f"{sizes[0]} block{'s' * (sizes[0] != 1)}"
    )
    return (
        f"Stages of {blocks}, balanced with embedding, head and what is recomputed: the slowest takes "
        f"{human_seconds(max(times))} of a micro-batch, all of them {human_seconds(sum(times) / len(times))} on average"
    )


def _late_step(predictor: Predictor, chosen: Candidate) -> str:
    pipelines, point = predictor.pipelines, chosen.point
    kept = human_bytes(max(pipelines.memory.kept(point)))
    period, makespan = pipelines.time.period(point), pipelines.time.schedule(point).simulation.makespan
    return (
        f"No device waits for the last one to end the step: {human_seconds(period)} from one step to the next instead "
        f"of {human_seconds(makespan)}. It keeps {kept} to step again where gradients turn out to be clipped, which "
        "takes longer than waiting"
    )


def _mesh(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    if point.devices == 1:
        return "There is one device"
    if point.world == 1:
        return f"All {point.devices} devices share every layer"
    if point.axes or point.pipe is not None:
        levels = decide(point, predictor.job.cluster, 0).mesh.axes
        data = [axis for axis in levels if axis.name != TENSOR_AXIS]
        spans = [f"{axis.name} {axis.size} over {' and '.join(axis.levels)}" for axis in reversed(data)]
        stages = "One axis for the stages, then one" if point.pipe is not None else "One axis"
        return f"{stages} from each shard degree to the next: {', '.join(spans)}"
    if point.shard == 1:
        return f"A whole copy of the states on each of {point.world} devices"
    copies = f"{point.replicas} copies of the states, each" if point.replicas > 1 else "One copy of the states"
    return f"{copies} over {point.shard} neighbouring devices"


def _at_rest(predictor: Predictor, point: Point) -> dict[str, int]:
    """Bytes of the states on the fullest device."""
    memory = predictor.memory if point.pipe is None else predictor.pipelines.memory
    return {str(name): size for name, size in memory.prediction(point).at_rest.items()}


def _states(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    parameters = _at_rest(predictor, point)["parameters"]
    over = f"spread over {point.shard} devices" if point.shard > 1 else "on every device"
    return f"Parameters {over} take {human_bytes(parameters)} each"


def _optimizer(predictor: Predictor, chosen: Candidate) -> str:
    states = _at_rest(predictor, chosen.point)["optimizer_states"]
    if not states:
        return "The optimizer keeps none"
    return f"Optimizer states take {human_bytes(states)} a device and are never gathered"


def _secondary(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    if point.secondary is None:
        return "The backward gathers from where the parameters rest"
    element = PRECISIONS[point.precision].compute_bytes
    copy = human_bytes(element * sum(predictor.groups.sizes(point.secondary).blocks) // point.secondary)
    return f"A second copy over {point.secondary} devices takes {copy}, and the backward gathers stay among them"


def _communication(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    if not point.int8_gathers and not point.int4_reductions:
        return "Nothing travels in fewer bits"
    return "Fewer bits over the slower links; rounding errors are within half a step of each block's scale"


def _checkpointing(predictor: Predictor, chosen: Candidate) -> str:
    room = f"{human_bytes(chosen.reserved)} of {human_bytes(predictor.device_budget)} reserved at the peak"
    if chosen.point.recomputed == 0:
        return f"Nothing need be recomputed: {room}"
    parts = {part.name: part.seconds for part in predictor.step(chosen.point).parts}
    if chosen.point.pipe is not None:
        where = "where micro-batches in flight leave no room"
        slowest = human_seconds(parts.get("recompute", 0.0))
        return f"Recomputed {where} ({room}); on the busiest device that takes {slowest} a step"
    fewest = "The fewest" if predictor.job.strategy.checkpointing == "auto" else "The fewest of those permitted"
    return f"{fewest} that fit ({room}); recomputing takes {human_seconds(parts['recompute'])} a step"


def _micro_batch(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    tokens = point.micro_batch * predictor.profile.sequence_length
    times = f"{point.accumulation} times" if point.accumulation > 1 else "once"
    return f"{tokens} tokens of one forward on a device, {times} a step"


def _accumulation(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    at_once = point.micro_batch * point.copies // point.parallel.cp
    if point.pipe is not None:
        return f"{point.accumulation} micro-batches of {at_once} sequences fill the pipeline"
    if point.accumulation == 1:
        return f"The {at_once} sequences of a global batch run at once"
    return f"{at_once} sequences run at once, so a global batch takes {point.accumulation} rounds"


def _kept(predictor: Predictor, chosen: Candidate) -> str:
    element = PRECISIONS[chosen.point.precision].compute_bytes
    gathered = human_bytes(element * sum(predictor.groups.sizes(chosen.point.shard).blocks))
    if chosen.point.kept:
        return f"Keeping the blocks gathered takes {gathered} and saves every gather of a step but the first"
    return f"Freeing gathered blocks saves up to {gathered}, for a second gather in backward"


def _gradients(predictor: Predictor, chosen: Candidate) -> str:
    if chosen.point.accumulation == 1:
        return "One micro-batch a step: nothing accumulates"
    if chosen.point.gradients_wait:
        return f"Whole gradients accumulate and are reduced once, not {chosen.point.accumulation} times a step"
    if chosen.point.gradient_degree == 1:
        return "Whole gradients accumulate, as parameters are whole"
    return f"Reduced after every micro-batch, so that each device keeps one of {chosen.point.gradient_degree} shards"


_OF_THE_WHOLE = ("mesh", "tensor_parallel.degree", "context_parallel.degree", "expert_parallel.degree")
"""Keys of what is decided of all devices together, not of one process."""

_BUYS: dict[str, Callable[[Predictor, Candidate], str]] = {
    "tensor_parallel.degree": sharing_reasons.tensor,
    "context_parallel.degree": sharing_reasons.context,
    "expert_parallel.degree": sharing_reasons.experts,
    "engine.name": _engine,
    "pipeline.ranks": _ranks,
    "pipeline.schedule": _schedule,
    "pipeline.cuts": _cuts,
    "pipeline.late_step": _late_step,
    "mesh": _mesh,
    "states.parameters": _states,
    "states.gradients": _gradients,
    "states.optimizer_states": _optimizer,
    "states.secondary": _secondary,
    "communication": _communication,
    "engine.reshard_after_forward": _kept,
    "micro_batch": _micro_batch,
    "accumulation": _accumulation,
    "checkpointing": _checkpointing,
    "precision": lambda predictor, chosen: f"{PRECISIONS[chosen.point.precision].summary.capitalize()}",
}

_VALUES: dict[str, Callable[..., str]] = {
    "tensor_parallel.degree": lambda degree: str(degree) if degree > 1 else "none",
    "context_parallel.degree": lambda degree: str(degree) if degree > 1 else "none",
    "expert_parallel.degree": lambda degree: str(degree) if degree > 1 else "none",
    "pipeline.ranks": lambda ranks: str(ranks) if ranks > 1 else "no pipeline",
    "pipeline.cuts": lambda cuts: f"after blocks {', '.join(map(str, cuts))}",
    "pipeline.late_step": lambda late: str(late).lower(),
    "mesh": lambda mesh: " x ".join(f"{axis.name} {axis.size}" for axis in mesh.axes) or "one device",
    "states.parameters": lambda state: str(state.degree),
    "states.gradients": lambda state: str(state.degree),
    "states.optimizer_states": lambda state: str(state.degree),
    "states.secondary": lambda state: "none" if state is None else str(state.degree),
    "communication": lambda sent: (
        ", ".join(
            f"{what} over {' and '.join(axes)}"
            for what, axes in (("int8 gathers", sent.int8_gathers), ("int4 reductions", sent.int4_reductions))
            if axes
        )
        or "exact"
    ),
    "engine.reshard_after_forward": lambda reshard: str(reshard).lower(),
    "checkpointing": lambda checkpointing: f"{checkpointing.blocks} of {checkpointing.of} blocks",
}
