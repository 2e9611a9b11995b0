"""What sharing one copy of the model buys, and why it is not shared more: tensor, context and expert parallelism."""

from __future__ import annotations

from shardwright.planner.candidates import Candidate
from shardwright.planner.parallels import (
    LEAST_TOKENS,
    context_degrees,
    context_refused,
    expert_degrees,
    experts_refused,
    tensor_degrees,
    tensor_refused,
)
from shardwright.planner.predict import Predictor
from shardwright.schemas.profile import ModelProfile, ParallelAxis
from shardwright.schemas.units import human_seconds

_PARTS: dict[ParallelAxis, str] = {"tp": "tensor parallel", "cp": "context parallel", "ep": "expert parallel"}
"""Parts of the step time: what is exchanged."""
_METHODS = {
    "ring": "keys and values travel around while each part is attended to",
    "gather": "keys and values are gathered before attention",
    "ulysses": "an all-to-all gives each process whole sequences of some heads",
}


def tensor(predictor: Predictor, chosen: Candidate) -> str:
    """Of `tensor_parallel.degree`."""
    degree, profile = chosen.point.parallel.tp, predictor.profile
    if degree == 1:
        refused = tensor_refused(profile, predictor.job)
        if refused:
            return f"The layers cannot be divided: {refused}"
        if len(tensor_degrees(predictor.job, profile)) == 1:
            return "The job or the cluster leaves no number of devices that could share a layer"
        return "Every device has whole layers, and waits for nobody within one"
    sentences = [
        f"Each layer lies on {degree} neighbouring devices; what they tell one another takes "
        f"{_exchanged(predictor, chosen, 'tp')} a step",
        *_key_value_heads(profile, degree),
        _sequence(profile, chosen.point.parallel.sequence),
    ]
    return ". ".join(sentences)


def _key_value_heads(profile: ModelProfile, degree: int) -> list[str]:
    """Whether columns have fewer pieces than there are devices ([Note: parts] of the profile)."""
    columns = [each for each in profile.parameters if each.tensor_parallel == "column"]
    fewest = min((each.tensor_parallel_units for each in columns), default=0)
    if not fewest or fewest == max(each.tensor_parallel_units for each in columns):
        return []
    if fewest < degree:
        return [f"The {fewest} key-value heads are fewer: each is on {degree // fewest} devices, which hold it alike"]
    return [f"The {fewest} key-value heads are divided too, {fewest // degree} to a device"]


def _sequence(profile: ModelProfile, divided: bool) -> str:
    if divided:
        return "Between these layers activations are divided along the sequence"
    why = profile.tensor_parallelism.sequence_reason
    return f"Between these layers every device has whole activations{f': {why}' if why else ''}"


def context(predictor: Predictor, chosen: Candidate) -> str:
    """Of `context_parallel.degree`."""
    parallel, profile = chosen.point.parallel, predictor.profile
    if parallel.cp > 1:
        return (
            f"Each sequence lies on {parallel.cp} neighbouring processes, {profile.sequence_length // parallel.cp} "
            f"tokens on each; {_METHODS[parallel.method]}, which takes {_exchanged(predictor, chosen, 'cp')} a step"
        )
    refused = context_refused(profile, predictor.job)
    if refused:
        return f"Sequences cannot be divided: {refused}"
    if len(context_degrees(predictor.job, profile)) == 1:
        return (
            f"Sequences of {profile.sequence_length} tokens are not divided: below {LEAST_TOKENS} tokens a process "
            "there is too little attention to send keys and values for, unless the job says otherwise"
        )
    return "Every process attends to whole sequences"


def experts(predictor: Predictor, chosen: Candidate) -> str:
    """Of `expert_parallel.degree`."""
    degree, profile = chosen.point.parallel.ep, predictor.profile
    if degree > 1:
        counts = sorted({each.experts // degree for each in profile.expert_layers})
        return (
            f"Each process has {' or '.join(map(str, counts))} experts of a layer; tokens travel to theirs and back, "
            f"which takes {_exchanged(predictor, chosen, 'ep')} a step if the fullest process gets "
            f"{predictor.job.strategy.expert_imbalance:g} times the mean"
        )
    if experts_refused(profile):
        return f"Experts are not shared: {experts_refused(profile)}"
    if len(expert_degrees(predictor.job, profile)) == 1:
        return "The job or the cluster leaves no number of processes that could share experts"
    return "Every process has all experts, and no token travels"


def _exchanged(predictor: Predictor, chosen: Candidate, axis: ParallelAxis) -> str:
    parts = predictor.step(chosen.point).parts
    return human_seconds(sum(part.seconds for part in parts if part.name == _PARTS[axis]))
