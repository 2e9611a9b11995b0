"""Jobs that differ from a given one in one restriction: to say which of them stands in the way."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.schemas.job import JobSpec, StatesSpec, StrategySpec

AUTO = "auto"
_NO_CHOICES = ("states", "tensor_parallel", "expert_imbalance")
"""Of the strategy, what is no decision by itself."""


def pins(job: JobSpec) -> list[str]:
    """Keys of the strategy that are not left to the planner."""
    strategy = job.strategy
    own = [f"strategy.{name}" for name in StrategySpec.model_fields if name not in _NO_CHOICES]
    states = [f"strategy.states.{name}" for name in StatesSpec.model_fields]
    return [key for key in (*states, *own) if _at(strategy, key) != AUTO]


def without(job: JobSpec, *keys: str) -> JobSpec:
    """The job with these keys of the strategy left to the planner."""
    strategy = job.strategy
    for key in keys:
        name = key.rpartition(".")[2]
        if key.startswith("strategy.states."):
            states = strategy.states.model_copy(update={name: AUTO})
            strategy = strategy.model_copy(update={"states": states})
        else:
            strategy = strategy.model_copy(update={name: AUTO})
    return job.model_copy(update={"strategy": strategy})


def with_budget(job: JobSpec, device_memory: int | None) -> JobSpec:
    """The job with another budget of device memory, or with none."""
    return job.model_copy(update={"budget": job.budget.model_copy(update={"device_memory": device_memory})})


def with_memory(job: JobSpec, device_memory: int) -> JobSpec:
    """The job on devices that have this much memory, all of it to use."""
    device = job.cluster.device.model_copy(update={"memory": device_memory})
    return with_budget(job.model_copy(update={"cluster": job.cluster.model_copy(update={"device": device})}), None)


def larger_clusters(job: JobSpec) -> Iterator[JobSpec]:
    """The job on 2, 3, 4, 8, 16 and 32 times as many devices, as far as they can share the global batch equally."""
    *inner, outermost = job.cluster.levels
    for factor in (2, 3, 4, 8, 16, 32):
        if job.train.global_batch_sequences % (job.cluster.world_size * factor) == 0:
            level = outermost.model_copy(update={"size": outermost.size * factor})
            yield job.model_copy(update={"cluster": job.cluster.model_copy(update={"levels": (*inner, level)})})


def _at(strategy: StrategySpec, key: str) -> object:
    _, *names = key.split(".")
    value: object = strategy
    for name in names:
        value = getattr(value, name)
    return value
