"""The machine to plan for: a device, and the levels of the network that join its copies, fastest first."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shardwright.schemas.base import Spec
from shardwright.schemas.units import Bytes, BytesPerSecond, FlopsPerSecond, Seconds

DeviceKind = Literal["cuda", "cpu"]
ComputeDtype = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]


GIVEN = "given in the job"
MAX_LEVEL = 1_000_000
"""Most groups of a level: far beyond any cluster, so that a slip of the pen cannot make a search endless."""


class DeviceSpec(Spec):
    """One accelerator, or one CPU process that stands in for it."""

    name: str
    """What to call it."""
    kind: DeviceKind
    """`cuda` also stands for ROCm, as it does in torch."""
    memory: Bytes
    """Bytes that a training process can really use: what the driver leaves of the nominal size."""
    peak: dict[ComputeDtype, FlopsPerSecond] = Field(min_length=1)
    """Dense matrix-multiply peak of the datasheet per operand type. A missing type is not supported, never chosen."""
    measured: dict[ComputeDtype, FlopsPerSecond] = {}
    """Highest matrix-multiply rate that somebody measured, where it is known; time predictions start from it."""
    memory_bandwidth: BytesPerSecond
    """Bytes per second between the device and its own memory."""
    pcie: BytesPerSecond | None = None
    """Bytes per second between the device and its host, per direction; for offload, which no plan uses yet."""
    source: str = GIVEN
    """Where these numbers come from; `ClusterSpec.sources` tells them apart."""


LevelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", examples=["node"])]


class LevelSpec(Spec):
    """One level of the network: `size` groups of the level below, joined by links of this speed."""

    name: LevelName
    size: int = Field(gt=0, le=MAX_LEVEL)
    """How many groups of the level below."""
    bandwidth: BytesPerSecond
    """Bytes per second that one device can send through this level while all its peers do the same, per direction."""
    latency: Seconds
    """Time of one hop of a collective at this level, software included."""
    source: str = GIVEN


Launcher = Literal["torchrun", "slurm"]

HOST_LEVEL = "node"
"""Name of the level that one host holds, with the levels below it."""
RESERVED_LEVELS = {
    "all": "it means the whole cluster",
    "auto": "it leaves a decision to the planner",
    "none": "it means no level",
}


class ClusterSpec(Spec):
    """A cluster with every number filled in. World size is the product of the level sizes."""

    name: str
    device: DeviceSpec
    levels: tuple[LevelSpec, ...] = Field(min_length=1)
    """Fastest first."""
    host_memory: Bytes
    """Host memory of one node, shared by its `devices_per_node` processes."""
    nvme: Bytes | None = None
    """Free bytes of one node's NVMe; for offload, which no plan uses yet."""
    nvme_bandwidth: BytesPerSecond | None = None
    """Bytes per second that one node reads from, or writes to, its NVMe; for offload, which no plan uses yet."""
    launcher: Launcher = "torchrun"
    sources: dict[str, str] = {}
    """Origin of each number that the job did not state: `device.memory`, `levels.node.bandwidth`, `host_memory` ... to
    `catalogue: SOURCE` or `default: REASON`."""

    @model_validator(mode="after")
    def _distinct_levels(self) -> Self:
        names = [level.name for level in self.levels]
        for name in names:
            if names.count(name) > 1 or name in RESERVED_LEVELS:
                raise ValueError(f"a level cannot be named `{name}`: " + RESERVED_LEVELS.get(name, "it is taken"))
        return self

    @property
    def world_size(self) -> int:
        """Number of processes, one a device."""
        return prod(level.size for level in self.levels)

    @property
    def devices_per_node(self) -> int:
        """Devices that share one host: the size of the level named `node`, with the levels below it; a single level is
        one host whatever its name."""
        names = [level.name for level in self.levels]
        end = names.index(HOST_LEVEL) + 1 if HOST_LEVEL in names else len(names)
        return prod(level.size for level in self.levels[:end])
