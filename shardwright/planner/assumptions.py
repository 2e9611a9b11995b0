"""What a prediction rests on beside the job and the profile, each number with its origin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from shardwright.planner.constants import Constant, attention_efficiency, device_constants
from shardwright.planner.engines import DDP_BUCKET_CAP_MIB, ENGINES
from shardwright.planner.parallel import WHOLE
from shardwright.planner.pipelines.costs import WHOLE_BACKWARD
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.space import Pipe, Point
from shardwright.schemas.cluster import ClusterSpec
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Assumption
from shardwright.schemas.profile import ModelProfile
from shardwright.schemas.units import format_flops, format_rate, format_seconds, human_bytes

Origin = Literal["measured", "catalogue", "default", "job"]


def assumptions(point: Point, job: JobSpec, profile: ModelProfile) -> tuple[Assumption, ...]:
    """Everything assumed for this point."""
    cluster = job.cluster
    dtype = PRECISIONS[point.precision].compute
    kernel = profile.attention[dtype]
    listed = [*_device(point, cluster), *_levels(point, cluster), *_constants(point, cluster, kernel)]
    if kernel != "none":
        listed.append(
            Assumption(name="attention kernel", value=kernel, origin="default", source="what torch picks on the device")
        )
    if point.engine == "ddp":
        value = f"{DDP_BUCKET_CAP_MIB} MiB, filled in reverse order of registration"
        listed.append(Assumption(name="gradient buckets", value=value, origin="default", source="set in the script"))
    if point.engine == "fsdp2" and point.secondary is not None:
        value = "the memory of their communicators is not counted"
        source = "torch 2.13 makes two process groups for every block (_fsdp_init.py, `_get_post_forward_mesh_info`)"
        listed.append(Assumption(name="groups of the second copy", value=value, origin="default", source=source))
    if point.pipe is not None:
        listed += _pipeline(point.pipe)
    listed += _shared(point, job)
    if point.devices > 1:
        traits = ENGINES[point.engine]
        listed.append(Assumption(name="engine", value=point.engine, origin="measured", source=traits.run_on))
    return tuple(listed)


def _shared(point: Point, job: JobSpec) -> Iterator[Assumption]:
    """Of processes that share one copy of the model."""
    if point.parallel != WHOLE:
        yield Assumption(
            name="exchanges within a layer",
            value="the compute waits for all of them",
            origin="default",
            source="what travels beside it (of a ring) is not credited",
        )
    if point.parallel.ep > 1:
        yield Assumption(
            name="tokens of the fullest process, of the mean",
            value=f"{job.strategy.expert_imbalance:g}",
            origin="job",
            source="strategy.expert_imbalance; the script logs what it is",
        )


def _pipeline(pipe: Pipe) -> Iterator[Assumption]:
    yield Assumption(
        name="pipeline placement",
        value=f"{pipe.ranks} stages' devices on the slowest levels, copies on the fastest",
        origin="default",
        source="activations are fewer bytes than gradients",
    )
    if pipe.schedule not in WHOLE_BACKWARD:
        yield Assumption(
            name="held by a pending weight gradient",
            value="inputs and gradients of outputs of the linear layers",
            origin="default",
            source="what the runtime's deferred.py queues, counted in the profile",
        )
    if pipe.late_step:
        yield Assumption(
            name="late step",
            value="few gradients are clipped, and forward changes no buffers",
            origin="job",
            source="a clipped step, and the forwards begun behind it, are done twice; so would be what they change",
        )
    yield Assumption(
        name="messages between stages",
        value="beside compute, without slowing it down; each over one link of the slowest level",
        origin="default",
        source="not measured",
    )


def _device(point: Point, cluster: ClusterSpec) -> Iterator[Assumption]:
    device, hardware = cluster.device, PRECISIONS[point.precision].hardware
    yield _of_cluster(cluster, "device.memory", human_bytes(device.memory), device.source)
    yield _of_cluster(cluster, f"device.peak.{hardware}", format_flops(device.peak[hardware]), device.source)
    if hardware in device.measured:
        rate = format_flops(device.measured[hardware])
        yield _of_cluster(cluster, f"device.measured.{hardware}", rate, device.source)
    yield _of_cluster(cluster, "device.memory_bandwidth", format_rate(device.memory_bandwidth), device.source)


def _levels(point: Point, cluster: ClusterSpec) -> Iterator[Assumption]:
    for level in cluster.levels if point.devices > 1 else ():
        name = f"levels.{level.name}"
        yield _of_cluster(cluster, f"{name}.bandwidth", format_rate(level.bandwidth), level.source)
        yield _of_cluster(cluster, f"{name}.latency", format_seconds(level.latency), level.source)


def _constants(point: Point, cluster: ClusterSpec, kernel: str) -> Iterator[Assumption]:
    constants = device_constants(cluster.device)
    used = [constants.matmul, constants.memory]
    if PRECISIONS[point.precision].hardware not in cluster.device.measured:
        used.append(constants.unmeasured)
    if kernel != "none":
        used.append(attention_efficiency(cluster.device))
    if point.devices > 1:
        used.append(constants.links)
    if ENGINES[point.engine].shards:
        used.append(constants.group_hooks)
    used += [constants.forward_launch, constants.backward_launch, constants.step_overhead]
    used += [constants.fragmentation, constants.context_bytes, constants.host_bytes]
    for constant in used:
        yield Assumption(name=constant.name, value=_shown(constant), origin=constant.origin, source=constant.source)


def _shown(constant: Constant) -> str:
    if constant.unit == "B":
        return human_bytes(constant.value)
    return format_seconds(constant.value) if constant.unit == "s" else f"{constant.value:g}"


def _of_cluster(cluster: ClusterSpec, name: str, value: str, source: str) -> Assumption:
    """A number of the cluster; its origin is noted there as `catalogue: SOURCE` or `default: REASON`, unless the job
    states it."""
    noted = cluster.sources.get(name, "")
    kind, _, said = noted.partition(": ")
    origins: dict[str, Origin] = {"catalogue": "catalogue", "default": "default"}
    return Assumption(name=name, value=value, origin=origins.get(kind, "job"), source=said or source)
