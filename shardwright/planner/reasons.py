"""What each value of a decision buys, in words and numbers."""

from __future__ import annotations

from collections.abc import Callable

from shardwright.planner.engines import ENGINES
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.predict import Predictor
from shardwright.planner.search import OWN_ENGINE_GAIN, Candidate
from shardwright.planner.space import decide
from shardwright.schemas.plan import Decision
from shardwright.schemas.units import human_bytes, human_seconds


def buys(key: str, predictor: Predictor, chosen: Candidate) -> str:
    """One sentence, without its full stop, on what the chosen point's value of `key` is good for."""
    return _BUYS[key](predictor, chosen)


def shown(decision: Decision, key: str) -> str:
    """The value of a dotted key of the decision, for people."""
    value: object = decision
    for name in key.split("."):
        value = getattr(value, name)
    return _VALUES.get(key, str)(value)


def _engine(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    if point.engine == "single":
        return "One device needs no communication"
    if point.engine == "ddp":
        return "Replicated states need no gathers, only one all-reduce of the gradients a step"
    if point.engine == "amsp":
        return (
            "The only one that shards each state over a number of devices of its own; "
            f"{ENGINES[point.engine].run_on}, so it has to be {100 * OWN_ENGINE_GAIN:g} % faster than a stock engine"
        )
    if point.shard == 1:
        return f"{PRECISIONS[point.precision].short} compute on float32 masters; nothing is sharded"
    return f"Shards parameters and optimizer states over {point.shard} devices, and gathers block by block"


def _mesh(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    if point.world == 1:
        return "There is one device"
    if point.axes:
        levels = decide(point, predictor.job.cluster, 0).mesh.axes
        spans = [f"{axis.name} {axis.size} over {' and '.join(axis.levels)}" for axis in reversed(levels)]
        return f"One axis from each shard degree to the next: {', '.join(spans)}"
    if point.shard == 1:
        return f"A whole copy of the states on each of {point.world} devices"
    copies = f"{point.replicas} copies of the states, each" if point.replicas > 1 else "One copy of the states"
    return f"{copies} over {point.shard} neighbouring devices"


def _states(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    parameters = predictor.memory.prediction(chosen.point).at_rest["parameters"]
    over = f"spread over {point.shard} devices" if point.shard > 1 else "on every device"
    return f"Parameters {over} take {human_bytes(parameters)} each"


def _optimizer(predictor: Predictor, chosen: Candidate) -> str:
    states = predictor.memory.prediction(chosen.point).at_rest["optimizer_states"]
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
    if chosen.point.checkpointed == 0:
        return f"Nothing need be recomputed: {room}"
    parts = {part.name: part.seconds for part in predictor.time.step(chosen.point).parts}
    fewest = "The fewest" if predictor.job.strategy.checkpointing == "auto" else "The fewest of those permitted"
    return f"{fewest} that fit ({room}); recomputing takes {human_seconds(parts['recompute'])} a step"


def _micro_batch(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    tokens = point.micro_batch * predictor.profile.sequence_length
    times = f"{point.accumulation} times" if point.accumulation > 1 else "once"
    return f"{tokens} tokens of one forward on a device, {times} a step"


def _accumulation(predictor: Predictor, chosen: Candidate) -> str:
    point = chosen.point
    at_once = point.micro_batch * point.world
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


_BUYS: dict[str, Callable[[Predictor, Candidate], str]] = {
    "engine.name": _engine,
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
