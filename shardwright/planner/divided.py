"""A job and a profile as one process of each tensor and context group sees them.

[Note: divided jobs]
Processes that share one copy of a model are planned for as one: the cluster has its fastest levels divided by those
that share each layer; parameters and costs are those of the fullest of them, with what they tell one another
(`UnitCost.exchanges`). Processes that share a sequence are data processes that train on parts of it, so that the job
has as many times more and shorter sequences. Experts that several processes share are parameters with fewer of them. Of
such a job engines, states, checkpointing and pipelines are planned as of any other.
"""

from __future__ import annotations

from dataclasses import replace

from shardwright.planner.divided_context import shared_sequence
from shardwright.planner.divided_costs import sent
from shardwright.planner.divided_experts import layers_of, local_parameter, shared_experts
from shardwright.planner.parallel import WHOLE, Parallel, without_fastest
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import Affine, ComputeDtypeName, ModelProfile, Parameter, Unit, UnitCost
from shardwright.schemas.units import Amount


def divided(
    job: JobSpec, profile: ModelProfile, parallel: Parallel, tensor_rank: int = 0
) -> tuple[JobSpec, ModelProfile]:
    """See [Note: divided jobs]; of `WHOLE` both as they are. `tensor_rank`: whose parameters these are, of those that
    share each layer; the costs are the fullest one's. Raises KeyError for a degree of tensor parallelism that the
    profile has no costs for."""
    if parallel == WHOLE:
        return job, profile
    return divided_job(job, parallel), _profile(job, profile, parallel, tensor_rank)


def divided_job(job: JobSpec, parallel: Parallel) -> JobSpec:
    """The job of one process."""
    job = job.model_copy(update={"cluster": without_fastest(job.cluster, parallel.tp)})
    if parallel.cp == 1:
        return job
    train = job.train
    parts = Amount(train.global_batch_sequences * parallel.cp, "sequences")
    length = train.sequence_length // parallel.cp
    return job.model_copy(update={"train": train.model_copy(update={"global_batch": parts, "sequence_length": length})})


def _profile(job: JobSpec, profile: ModelProfile, parallel: Parallel, tensor_rank: int) -> ModelProfile:
    degree = parallel.cp * (parallel.tp if parallel.sequence else 1)
    tokens = profile.sequence_length // parallel.cp

    def cost(unit: Unit, whole: UnitCost, dtype: ComputeDtypeName) -> UnitCost:
        found = whole
        if parallel.cp > 1:
            found = shared_sequence(unit, found, profile.context_parallelism, parallel, _hidden(profile, dtype))
        if parallel.ep > 1:
            found = shared_experts(
                unit,
                found,
                profile.expert_layers,
                dtype=dtype,
                tokens=tokens,
                degree=parallel.ep,
                imbalance=job.strategy.expert_imbalance,
                elements=_expert_elements(unit, profile, parallel),
            )
        return found

    def of(unit: Unit) -> Unit:
        costs = unit.costs if parallel.tp == 1 else unit.divided[parallel.tp]
        made = {dtype: cost(unit, whole, dtype) for dtype, whole in costs.items()}
        return replace(unit, costs=made, compiled={}, divided={})

    return replace(
        profile,
        sequence_length=tokens,
        parameters=tuple(_parameter(each, parallel, tensor_rank) for each in profile.parameters),
        units=tuple(map(of, profile.units)),
        edges=tuple(sent(edge, degree) for edge in profile.edges),
    )


def _hidden(profile: ModelProfile, dtype: ComputeDtypeName) -> Affine:
    """Bytes of what leaves the embedding."""
    return next((unit.costs[dtype].output for unit in profile.units if unit.kind == "embedding"), Affine(0, 0))


def _parameter(parameter: Parameter, parallel: Parallel, tensor_rank: int) -> Parameter:
    local = parameter.local_shape(parallel.tp, tensor_rank)
    own = parameter if local == parameter.shape else replace(parameter, shape=local)
    return local_parameter(own, parallel.ep) if parallel.ep > 1 else own


def _expert_elements(unit: Unit, profile: ModelProfile, parallel: Parallel) -> int:
    """Of the experts of one block of a unit, of all processes that share them together."""
    paths = tuple(f"{each.path}." for each in layers_of(unit, profile.expert_layers))
    found = [each for each in profile.parameters if each.experts and each.name.startswith(paths)] if paths else []
    return sum(replace(each, shape=each.local_shape(parallel.tp)).numel for each in found)
