"""Which ways of sharing one copy of a model there are for a job, and why the others are not.

[Note: which parallels there are]
Tensor parallelism talks several times a layer and waits each time, so that unless the job says otherwise it stays on
the fastest level of the cluster (Narayanan et al. 2021, arXiv 2104.04473, section 3.2). Context parallelism is there
for sequences that are too long for one device; unless the job says otherwise every process keeps LEAST_TOKENS of each,
below which there is too little attention to send keys and values for. Expert parallelism spreads over up to
MOST_EXPERT_RANKS devices, as the widest published run has it (DeepSeek-V3, arXiv 2412.19437, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import gcd
from typing import Literal, get_args

from shardwright.planner.parallel import Parallel
from shardwright.schemas.base import permits
from shardwright.schemas.checks import divisors, neighbours, shard_degrees
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.expected import join
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import ContextMethod
from shardwright.schemas.profile import ModelProfile

LEAST_TOKENS = 8192
"""[Note: which parallels there are]."""
MOST_EXPERT_RANKS = 64
"""[Note: which parallels there are]."""
Axis = Literal["tp", "cp", "ep"]


def parallels(job: JobSpec, profile: ModelProfile) -> tuple[Parallel, ...]:
    """All that the job permits and the model can do, the simplest first. Raises InputError, with what would be
    possible, where a value that the job names is impossible by itself for the model or on the cluster."""
    wrong = list(_mistakes(job, profile))
    if wrong:
        raise InputError(wrong)
    found = [
        Parallel(tp=tp, sequence=tp > 1 and profile.tensor_parallelism.sequence, cp=cp, method=method, ep=ep)
        for tp, cp, ep in product(
            tensor_degrees(job, profile), context_degrees(job, profile), expert_degrees(job, profile)
        )
        for method in _methods(job, profile, tp, cp)
        if _fits(job, profile, tp, cp, ep)
    ]
    return tuple(sorted(found, key=lambda each: (each.tp * each.cp * each.ep, each.tp, each.cp)))


def _methods(job: JobSpec, profile: ModelProfile, tp: int, cp: int) -> tuple[Literal["none"] | ContextMethod, ...]:
    return context_methods(job, profile, tp, cp) if cp > 1 else ("none",)


def _fits(job: JobSpec, profile: ModelProfile, tp: int, cp: int, ep: int) -> bool:
    """Whether the degrees go together: the data processes hold whole groups of both other axes, and the part of each
    sequence that a process has is divided once more where tensor parallelism divides the sequence."""
    data = job.cluster.world_size // tp
    divided = tp if profile.tensor_parallelism.sequence else 1
    return data % cp == 0 and data % ep == 0 and profile.sequence_length % (cp * divided) == 0


# --- tensor parallelism ---------------------------------------------------------------------------------------------


def tensor_degrees(job: JobSpec, profile: ModelProfile) -> tuple[int, ...]:
    """Devices that may share every layer, fewest first; 1 is none of them."""
    choice = job.strategy.tp
    found = [each for each in _tensor_possible(job, profile) if permits(choice, each)]
    if choice == "auto":
        fastest = _fastest(job.cluster)
        found = [each for each in found if each <= fastest]
    return tuple(found)


def tensor_refused(profile: ModelProfile, job: JobSpec) -> str:
    """Why tensor parallelism cannot divide the model at all; empty where it can."""
    how = profile.tensor_parallelism
    if how.refused or not how.degrees:
        return how.refused or "nothing of it can be divided"
    wanted = job.strategy.tensor_parallel.sequence
    if not permits(wanted, how.sequence):
        return how.sequence_reason or "its sequences can be divided only together with its layers"
    return ""


def _tensor_possible(job: JobSpec, profile: ModelProfile) -> list[int]:
    able = () if tensor_refused(profile, job) else profile.tensor_parallelism.degrees
    groups = shard_degrees(job.cluster)
    return [1, *(each for each in sorted(able) if each in groups)]


def _fastest(cluster: ClusterSpec) -> int:
    return next((level.size for level in cluster.levels if level.size > 1), 1)


# --- context parallelism --------------------------------------------------------------------------------------------


def context_degrees(job: JobSpec, profile: ModelProfile) -> tuple[int, ...]:
    """Processes that may share each sequence, fewest first; 1 is none of them."""
    choice = job.strategy.cp
    found = [each for each in _context_possible(job, profile) if permits(choice, each)]
    if choice == "auto":
        found = [each for each in found if each == 1 or _is_worth_it(profile, each)]
    return tuple(found)


def _is_worth_it(profile: ModelProfile, degree: int) -> bool:
    """[Note: which parallels there are]."""
    return degree & (degree - 1) == 0 and profile.sequence_length // degree >= LEAST_TOKENS


def context_refused(profile: ModelProfile, job: JobSpec) -> str:
    """Why no number of processes can share a sequence; empty where some may."""
    if job.model.loss == "model":
        return "the loss inside the model would see a part of each sequence; leave it to the script (`model.loss`)"
    return profile.context_parallelism.refused


def _context_possible(job: JobSpec, profile: ModelProfile) -> list[int]:
    able = () if context_refused(profile, job) else shard_degrees(job.cluster)
    return [1, *(each for each in able if each > 1 and context_methods(job, profile, 1, each))]


def context_methods(job: JobSpec, profile: ModelProfile, tp: int, cp: int) -> tuple[ContextMethod, ...]:
    """Ways to attend over the whole sequence that the job permits and that so many processes can: `ulysses` gives each
    of them whole heads, of those that its part of the model has; of causal attention the others give each two chunks,
    one from either end of the sequence."""
    how, divided = profile.context_parallelism, tp if profile.tensor_parallelism.sequence else 1
    chunks = 2 if how.causal else 1
    able = {
        "ulysses": max(1, how.heads // tp) % cp == 0 and profile.sequence_length % (cp * divided) == 0,
        "zigzag": profile.sequence_length % (chunks * cp * divided) == 0,
    }
    return tuple(
        method
        for method in get_args(ContextMethod)
        if permits(job.strategy.context_method, method) and able.get(method, able["zigzag"])
    )


# --- expert parallelism ---------------------------------------------------------------------------------------------


def expert_degrees(job: JobSpec, profile: ModelProfile) -> tuple[int, ...]:
    """Processes that may share the experts of each layer, fewest first; 1 is none of them."""
    choice = job.strategy.ep
    found = [each for each in _expert_possible(job, profile) if permits(choice, each)]
    return tuple(each for each in found if choice != "auto" or each <= MOST_EXPERT_RANKS)


def experts_refused(profile: ModelProfile) -> str:
    """Why expert parallelism cannot divide the model; empty where it can."""
    if not profile.expert_layers:
        return "it has no layers of experts that can be divided"
    inside = [f"{path}." for path in profile.block_paths]
    outside = [each.path for each in profile.expert_layers if not any(each.path.startswith(path) for path in inside)]
    return f"the experts of {outside[0]} lie outside of the repeated blocks" if outside else ""


def _expert_possible(job: JobSpec, profile: ModelProfile) -> list[int]:
    if experts_refused(profile):
        return [1]
    shared = gcd(*(each.experts for each in profile.expert_layers))
    groups = shard_degrees(job.cluster)
    return [each for each in divisors(shared) if each in groups]


# --- what is said ---------------------------------------------------------------------------------------------------


def _mistakes(job: JobSpec, profile: ModelProfile) -> Iterator[Diagnostic]:
    """Values that the job names and that are impossible by themselves."""
    strategy = job.strategy
    if strategy.tp != "auto":
        why = tensor_refused(profile, job) or "its heads and features do not divide into so many equal parts"
        yield from _impossible("tp", strategy.tp, _tensor_possible(job, profile), f"the model cannot be divided: {why}")
    wanted = strategy.tensor_parallel.sequence
    if wanted == (True,) and not profile.tensor_parallelism.sequence and strategy.tp != (1,):
        why = profile.tensor_parallelism.sequence_reason or profile.tensor_parallelism.refused
        yield Diagnostic(
            key="strategy.tensor_parallel.sequence",
            message=f"the sequence cannot be divided between the divided layers: {why or 'no layer can be divided'}",
            suggestion="write false, or leave it out",
        )
    if strategy.cp != "auto":
        why = f"the sequence cannot be divided: {context_refused(profile, job) or _uneven(job, profile)}"
        yield from _impossible("cp", strategy.cp, _context_possible(job, profile), why)
    if strategy.ep != "auto":
        counts = join([str(each) for each in sorted({each.experts for each in profile.expert_layers})], "and")
        why = experts_refused(profile) or f"layers have {counts} experts"
        yield from _impossible("ep", strategy.ep, _expert_possible(job, profile), f"experts cannot be shared: {why}")


def _uneven(job: JobSpec, profile: ModelProfile) -> str:
    how = profile.context_parallelism
    parts = "two chunks" if how.causal else "one chunk"
    heads = ""
    if job.strategy.context_method == ("ulysses",):
        heads = f", and `ulysses` gives each of them whole ones of {how.heads} heads"
    return f"each process has {parts} of {profile.sequence_length} tokens{heads}"


def _impossible(axis: Axis, wanted: tuple[int, ...], possible: list[int], why: str) -> Iterator[Diagnostic]:
    for index, degree in enumerate(wanted):
        if degree not in possible:
            near = join([str(each) for each in neighbours(possible, degree)], "or")
            message = f"{degree} devices cannot share it: {why}"
            yield Diagnostic(key=f"strategy.{axis}.{index}", message=message, suggestion=f"write {near}")
