"""What must hold between the values of a job, whatever plan is chosen. Every diagnostic carries its key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, product
from math import prod
from operator import mul
from typing import Literal

from shardwright.schemas.base import permits
from shardwright.schemas.cluster import HOST_LEVEL, ClusterSpec
from shardwright.schemas.diagnostics import Diagnostic
from shardwright.schemas.expected import join, nearest
from shardwright.schemas.job import Degree, JobSpec
from shardwright.schemas.units import human_bytes

Written = Callable[[str], bool]
"""Whether the person wrote the value of a dotted key, rather than left it to its default."""

OPTIMIZER_NUMBERS = {"adamw": ("betas", "eps"), "sgd": ("momentum",)}
"""The numbers that only some optimizers have."""

PRECISION_DTYPES = {"fp32": "fp32", "bf16_mixed": "bf16"}
"""The operand type that each precision multiplies with."""
EXACT_PRECISIONS = ("fp32",)
"""What `quality: exact` permits."""


def check_job(job: JobSpec, written: Written) -> Iterator[Diagnostic]:
    """Everything that contradicts itself in a job whose values are each valid."""
    yield from _host(job.cluster)
    yield from _optimizer(job, written)
    yield from _evaluation(job, written)
    yield from _schedule(job)
    yield from _length(job, written)
    yield from _batch(job)
    yield from _sharing(job)
    yield from _pipeline(job)
    yield from _precision(job)
    yield from _engine(job)
    yield from _budget(job)
    yield from _degrees(job)
    yield from _nesting(job)
    yield from _lossy(job)


def _host(cluster: ClusterSpec) -> Iterator[Diagnostic]:
    """A launcher starts the processes of one host, so it has to be known what that is."""
    names = [level.name for level in cluster.levels]
    if len(names) > 1 and HOST_LEVEL not in names:
        named = join([f"`{name}`" for name in names], "and")
        yield Diagnostic(
            key="cluster.levels",
            message=f"which level is one host? There are {named}, and none named `{HOST_LEVEL}`",
            suggestion=f"name the level that one host holds `{HOST_LEVEL}`",
        )


def _optimizer(job: JobSpec, written: Written) -> Iterator[Diagnostic]:
    name = job.train.optimizer.name
    for owner, numbers in OPTIMIZER_NUMBERS.items():
        for number in numbers:
            key = f"train.optimizer.{number}"
            if owner != name and written(key):
                has = join([f"`{each}`" for each in OPTIMIZER_NUMBERS[name]], "and")
                yield Diagnostic(
                    key=key, message=f"`{name}` has no `{number}`", suggestion=f"leave it out; `{name}` has {has}"
                )


def _evaluation(job: JobSpec, written: Written) -> Iterator[Diagnostic]:
    """Only held-out data can be evaluated on."""
    data, train = job.data, job.train
    if data.validation is not None or data.validation_dataset is not None:
        return
    asked = (("evaluate_every", train.evaluate_every is not None), ("evaluate_batches", True))
    key = "data.validation_dataset" if data.dataset is not None else "data.validation"
    for name, is_set in asked:
        if is_set and written(f"train.{name}"):
            yield Diagnostic(
                key=f"train.{name}",
                message="there is no held-out data to evaluate on",
                suggestion="leave it out" if data.synthetic is not None else f"give `{key}`, or leave it out",
            )


def _schedule(job: JobSpec) -> Iterator[Diagnostic]:
    warmup, steps = int(job.train.schedule.warmup.value), job.train.total_steps
    if warmup > steps:
        yield Diagnostic(
            key="train.schedule.warmup",
            message=f"the warm-up of {warmup} steps is longer than the run of {steps} steps",
            suggestion=f"write at most {steps} steps",
        )


def _length(job: JobSpec, written: Written) -> Iterator[Diagnostic]:
    """Only a dataset says itself how long its samples are."""
    if job.data.dataset is None and not written("train.sequence_length"):
        yield Diagnostic(
            key="train",
            message="`sequence_length` is missing: the data are cut into samples of so many tokens",
            suggestion="write `sequence_length`, for example 1024",
        )


def _batch(job: JobSpec) -> Iterator[Diagnostic]:
    """Every copy of the model takes the same number of sequences of each step: every device has one, or so many devices
    share one as a pipeline, every layer of it, or every sequence."""
    sizes, train = _copy_sizes(job), job.train
    if not sizes:
        return
    sequences, world = train.global_batch_sequences, job.cluster.world_size
    copies = [world // size for size in sizes]
    sharing = [each for each in copies if sequences % each == 0]
    if not sharing:
        fewest = min(copies)
        whole = [count for count in (sequences // fewest * fewest, (sequences // fewest + 1) * fewest) if count]
        is_tokens = train.global_batch.unit == "tokens"
        meant = f"{train.global_batch} are {sequences} sequences of {train.sequence_length} tokens" if is_tokens else ""
        owners = f"{world} devices" if sizes == [1] else f"{fewest} copies of the model on {world} devices"
        yield Diagnostic(
            key="train.global_batch",
            message=f"{meant or f'{sequences} sequences'}, which {owners} cannot share equally",
            suggestion="write " + join([_sequences(count, train.sequence_length) for count in whole], "or"),
        )
        return
    choice = job.strategy.micro_batch
    locals_ = [sequences // each for each in sharing]
    if choice != "auto" and not any(local % size == 0 for local in locals_ for size in choice):
        local = max(locals_)
        possible = [str(size) for size in divisors(local)]
        written = join([str(size) for size in choice], "or")
        owner = "a device" if sharing == [world] else "a copy of the model"
        yield Diagnostic(
            key="strategy.micro_batch",
            message=f"the {local} sequences of {owner} do not divide into micro-batches of {written}",
            suggestion=f"write {join(possible[-8:], 'or')}",
        )


def _copy_sizes(job: JobSpec) -> list[int]:
    """Devices that share one copy of the model in any way, as far as the job and its cluster permit: 1 for none."""
    world = job.cluster.world_size
    tensors, contexts = (_shared_by(job.cluster, choice) for choice in (job.strategy.tp, job.strategy.cp))
    found = {
        tensor * context * stages
        for tensor, context in product(tensors, contexts)
        for stages in _pipeline_sizes(job, tensor)
    }
    return sorted(size for size in found if world % size == 0)


def _shared_by(cluster: ClusterSpec, choice: Literal["auto"] | tuple[int, ...]) -> tuple[int, ...]:
    return (
        shard_degrees(cluster) if choice == "auto" else tuple(each for each in choice if not cluster.world_size % each)
    )


def _pipeline_sizes(job: JobSpec, tensor: int) -> list[int]:
    """Stages of a pipeline, each of whose parts lies on so many devices; 1 for no pipeline."""
    sizes = [each for each in pipeline_sizes(job.cluster) if job.cluster.world_size // tensor % each == 0]
    if not permits(job.strategy.engine, "amsp"):
        sizes = [1]
    return [size for size in sizes if (permits(job.strategy.pp, size) if size > 1 else permits_no_pipeline(job))]


def permits_no_pipeline(job: JobSpec) -> bool:
    """Whether the job may run without pipeline stages: naming a schedule or chunks, or asking for late steps, asks for
    some, unless `pp` says otherwise."""
    strategy = job.strategy
    if strategy.pp == "auto":
        return strategy.schedule == "auto" and strategy.chunks == "auto" and permits(strategy.late_step, False)
    return 1 in strategy.pp


def pipeline_sizes(cluster: ClusterSpec) -> tuple[int, ...]:
    """Numbers of devices that a pipeline may have: the devices of one stage fill the fastest levels of the cluster."""
    world = cluster.world_size
    return tuple(sorted(world // copies for copies in shard_degrees(cluster)))


def _sharing(job: JobSpec) -> Iterator[Diagnostic]:
    """Devices that share layers are neighbours; those that share sequences or experts are so many of the others."""
    cluster, strategy = job.cluster, job.strategy
    valid = shard_degrees(cluster)
    for name in ("tp", "cp", "ep"):
        choice = getattr(strategy, name)
        for index, degree in enumerate(() if choice == "auto" else choice):
            if degree not in valid:
                yield Diagnostic(
                    key=f"strategy.{name}.{index}",
                    message=f"{degree} devices do not fill the levels of the cluster evenly, fastest first",
                    suggestion=f"write {join([str(each) for each in neighbours(valid, degree)], 'or')}",
                )
    yield from _together(job)
    if strategy.cp == (1,) and strategy.context_method != "auto":
        yield Diagnostic(
            key="strategy.context_method",
            message="where no devices share a sequence there is no `context_method` to choose",
            suggestion="leave it out, or leave out `cp: 1`",
        )
    shares_experts = strategy.ep != "auto" and 1 not in strategy.ep
    if shares_experts and strategy.engine != "auto" and NO_SHARED_EXPERTS.issuperset(strategy.engine):
        permitted = join([f"`{name}`" for name in strategy.engine], "and")
        yield Diagnostic(
            key="strategy.ep",
            message=f"only `fsdp2` and `amsp` share experts; `strategy.engine` permits {permitted}",
            suggestion="leave `strategy.engine` out, or permit `fsdp2`",
        )


def _together(job: JobSpec) -> Iterator[Diagnostic]:
    """Groups that share sequences or experts lie among the devices with the same part of every layer."""
    world, valid = job.cluster.world_size, shard_degrees(job.cluster)
    tensors = [] if job.strategy.tp == "auto" else [each for each in job.strategy.tp if each in valid]
    for name, choice in (("cp", job.strategy.cp), ("ep", job.strategy.ep)):
        degrees = [] if choice == "auto" else [each for each in choice if each in valid]
        possible = any(world % (tensor * degree) == 0 for tensor in tensors for degree in degrees)
        if tensors and degrees and not possible:
            yield Diagnostic(
                key=f"strategy.{name}",
                message=f"{world // min(tensors)} groups of {min(tensors)} devices do not divide by {min(degrees)}",
                suggestion=f"write a divisor of {world // min(tensors)}",
            )


def _pipeline(job: JobSpec) -> Iterator[Diagnostic]:
    """Pipeline stages lie on the slowest levels of the cluster, and take an engine that runs them."""
    strategy = job.strategy
    valid = pipeline_sizes(job.cluster)
    pinned = () if strategy.pp == "auto" else strategy.pp
    for index, size in enumerate(pinned):
        if size not in valid:
            world = job.cluster.world_size
            why = (
                f"{world} devices do not divide into pipelines of {size}"
                if world % size
                else f"the {world // size} devices of each of {size} stages do not fill the cluster's levels evenly"
            )
            nearest_two = join([str(each) for each in neighbours(valid, size)], "or")
            yield Diagnostic(key=f"strategy.pp.{index}", message=why, suggestion=f"write {nearest_two}")
    if pinned and 1 not in pinned and not permits(strategy.engine, "amsp"):
        permitted = join([f"`{name}`" for name in strategy.engine], "and")
        yield Diagnostic(
            key="strategy.pp",
            message=f"only `amsp` runs pipeline stages; `strategy.engine` permits {permitted}",
            suggestion="leave `strategy.engine` out, or permit `amsp`",
        )
    if pinned == (1,):
        for name in ("schedule", "chunks"):
            if getattr(strategy, name) != "auto":
                message = f"without pipeline stages there is no `{name}` to choose"
                yield Diagnostic(
                    key=f"strategy.{name}", message=message, suggestion="leave it out, or leave out `pp: 1`"
                )
        if not permits(strategy.late_step, False):
            message = "without pipeline stages no step is late"
            yield Diagnostic(key="strategy.late_step", message=message, suggestion="write false, or leave out `pp: 1`")


def _sequences(count: int, length: int) -> str:
    tokens = count * length
    return f"{count} sequences ({tokens // 2**20}Mi tokens)" if tokens % 2**20 == 0 else f"{count} sequences"


def _precision(job: JobSpec) -> Iterator[Diagnostic]:
    device = job.cluster.device
    able = [name for name, dtype in PRECISION_DTYPES.items() if dtype in device.peak]
    allowed = [name for name in able if job.quality != "exact" or name in EXACT_PRECISIONS]
    chosen = () if job.strategy.precision == "auto" else job.strategy.precision
    for index, name in enumerate(chosen):
        if name not in able:
            why = f"`{device.name}` cannot compute in `{name}`"
        elif name not in allowed:
            why = f"`quality: exact` permits only {join([f'`{each}`' for each in EXACT_PRECISIONS], 'and')}"
        else:
            continue
        way = f"write {join([f'`{each}`' for each in allowed], 'or')}" if allowed else ""
        yield Diagnostic(key=f"strategy.precision.{index}", message=why, suggestion=way)
    if not allowed and not chosen:
        known = join(list(device.peak), "and")
        message = (
            f"no precision is left: `{device.name}` has a peak rate only for {known}, `quality` is `{job.quality}`"
        )
        yield Diagnostic(key="quality", message=message)


NO_GATHERS = frozenset({"single", "ddp"})
"""Engines that never shard parameters."""
NO_SHARED_EXPERTS = NO_GATHERS
"""Engines that hold every expert on every process."""


def _engine(job: JobSpec) -> Iterator[Diagnostic]:
    """Only an engine that gathers parameters can free them."""
    engines, reshard = job.strategy.engine, job.strategy.reshard_after_forward
    if reshard != "auto" and engines != "auto" and NO_GATHERS.issuperset(engines):
        permitted = join([f"`{name}`" for name in engines], "and")
        yield Diagnostic(
            key="strategy.reshard_after_forward",
            message=f"only `fsdp2` and `amsp` gather parameters; `strategy.engine` permits {permitted}",
            suggestion="leave it out, or permit `fsdp2`",
        )


def _budget(job: JobSpec) -> Iterator[Diagnostic]:
    limits = (
        ("device_memory", job.budget.device_memory, job.cluster.device.memory, "a device"),
        ("host_memory", job.budget.host_memory, job.cluster.host_memory, "a node's host"),
    )
    for name, asked, there, owner in limits:
        if asked is not None and asked > there:
            yield Diagnostic(
                key=f"budget.{name}",
                message=f"{human_bytes(asked)} is more than the {human_bytes(there)} that training can use on {owner}",
                suggestion="leave it out to use all, or write less",
            )


def _degrees(job: JobSpec) -> Iterator[Diagnostic]:
    """A shard group fills the levels of the cluster fastest first, whole groups of the faster before the slower."""
    levels = [level.name for level in job.cluster.levels]
    for name in type(job.strategy.states).model_fields:
        choice = getattr(job.strategy.states, name)
        known = [*levels, "all", "none"] if name == "secondary" else [*levels, "all"]
        for index, degree in enumerate(() if choice == "auto" else choice):
            key = f"strategy.states.{name}.{index}"
            if isinstance(degree, str):
                yield from _level(key, degree, known)
            elif isinstance(degree, int) and degree not in (valid := shard_degrees(job.cluster)):
                yield Diagnostic(
                    key=key,
                    message=f"{degree} devices do not fill the levels of the cluster evenly, fastest first",
                    suggestion=f"write {join([str(each) for each in valid], 'or')}",
                )


def _nesting(job: JobSpec) -> Iterator[Diagnostic]:
    """No device works on the optimizer states of parameters, or gathers a second copy, that it has no part in."""
    at_least = "optimizer states are sharded at least as wide as"
    for narrow, wide, key, strictly, rule in (
        ("parameters", "optimizer_states", "optimizer_states", False, f"{at_least} parameters"),
        ("gradients", "optimizer_states", "optimizer_states", False, f"{at_least} gradients"),
        ("secondary", "parameters", "secondary", True, "the second copy lies on fewer devices than parameters"),
    ):
        least = _narrowest(job.cluster, getattr(job.strategy.states, narrow))
        limit = _widest(job.cluster, getattr(job.strategy.states, wide))
        if least is not None and limit is not None and least > limit - strictly:
            yield Diagnostic(
                key=f"strategy.states.{key}",
                message=f"{rule}: {narrow} over {least} devices, {wide} over {limit}",
                suggestion=f"write fewer devices for `{narrow}`, or more for `{wide}`",
            )


def _widest(cluster: ClusterSpec, choice: Literal["auto"] | tuple[int | str, ...]) -> int | None:
    degrees = () if choice == "auto" else [level_degree(cluster, each) for each in choice]
    return max((each for each in degrees if each is not None), default=None)


def _narrowest(cluster: ClusterSpec, choice: Literal["auto"] | tuple[int | str, ...]) -> int | None:
    degrees = [None] if choice == "auto" else [level_degree(cluster, each) for each in choice]
    return None if None in degrees else min(each for each in degrees if each is not None)


def _lossy(job: JobSpec) -> Iterator[Diagnostic]:
    """Communication in fewer bits has to be allowed, and names a level."""
    levels = [level.name for level in job.cluster.levels]
    for name in ("int8_gathers", "int4_reductions"):
        choice = getattr(job.strategy, name)
        for index, level in enumerate(() if choice == "auto" else choice):
            key = f"strategy.{name}.{index}"
            yield from _level(key, level, [*levels, "none"])
            if level in levels and job.quality != "lossy":
                message = f"`quality: {job.quality}` permits no communication in fewer bits"
                yield Diagnostic(key=key, message=message, suggestion="write `quality: lossy`, or `none` here")


def _level(key: str, name: str, known: list[str]) -> Iterator[Diagnostic]:
    if name not in known:
        near = nearest(name, known)
        yield Diagnostic(
            key=key,
            message=f"the cluster has no level `{name}`",
            suggestion=f"did you mean `{near}`?" if near else f"levels: {join(known, 'and')}",
        )


def level_degree(cluster: ClusterSpec, degree: Degree) -> int | None:
    """A degree as the job writes it, as a number: a level's name stands for all devices up to and including it, `all`
    for the world. None for a name that the cluster does not have."""
    if isinstance(degree, int):
        return degree
    if degree == "all":
        return cluster.world_size
    names = [level.name for level in cluster.levels]
    return prod(level.size for level in cluster.levels[: names.index(degree) + 1]) if degree in names else None


def shard_degrees(cluster: ClusterSpec) -> tuple[int, ...]:
    """Every size that a group may have: whole faster levels times a divisor of the next one."""
    below = accumulate((level.size for level in cluster.levels), mul, initial=1)
    return tuple(
        sorted(
            {inner * part for inner, level in zip(below, cluster.levels, strict=False) for part in divisors(level.size)}
        )
    )


def divisors(number: int) -> tuple[int, ...]:
    """The whole numbers that divide a number, smallest first."""
    return tuple(part for part in range(1, number + 1) if number % part == 0)


def neighbours(valid: Sequence[int], number: int) -> list[int]:
    """Of valid numbers, ascending, the one before a number and the one behind."""
    return [each for each in valid if each < number][-1:] + [each for each in valid if each > number][:1]
