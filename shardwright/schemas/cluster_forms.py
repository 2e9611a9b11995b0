"""The inline forms of a job's `cluster`, as a person writes them; `cluster_source` resolves them."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Annotated

from pydantic import Field

from shardwright.schemas.base import Spec, exactly_one
from shardwright.schemas.cluster import MAX_LEVEL, DeviceSpec, Launcher, LevelName
from shardwright.schemas.units import Bytes, BytesPerSecond, Seconds

COUNTED = r"(\d{1,6}) ?x ?(\S+)"
"""Count and name: `8 x h100-sxm-80gb`."""


class LinkForm(Spec):
    """The speed of a link in numbers."""

    bandwidth: BytesPerSecond
    """Bytes per second that one device can send while all its peers do the same, per direction."""
    latency: Seconds | None = None
    """Time of one hop of a collective, software included."""


class LevelForm(Spec):
    """One level of the network: `size` groups of the level below. Exactly one of `link`, `bandwidth`."""

    name: LevelName
    """What to call it. Of several levels, the one that one host holds is called `node`."""
    size: int = Field(gt=0, le=MAX_LEVEL)
    """How many groups of the level below."""
    link: Annotated[str, Field(examples=["nvlink4"])] | None = None
    """A link of the catalogue."""
    bandwidth: BytesPerSecond | None = None
    """Bytes per second that one device can send through this level while all its peers do the same, per direction."""
    latency: Seconds | None = None
    """Time of one hop of a collective at this level, software included; 10us unless given or known from the link."""

    @classmethod
    def conflicts(cls, given: AbstractSet[str]) -> Iterator[tuple[str, str]]:
        """One origin of the speed."""
        yield from exactly_one(given, {"link": "a link of the catalogue", "bandwidth": "for example 50GB/s"})


class Facilities(Spec):
    """What both inline forms may state besides the devices; the catalogue knows the rest."""

    host_memory: Bytes | None = None
    """Host memory of one node."""
    nvme: Bytes | None = None
    """Free bytes of one node's NVMe; for offload, which no plan uses yet."""
    nvme_bandwidth: BytesPerSecond | None = None
    """Bytes per second that one node reads from, or writes to, its NVMe; for offload, which no plan uses yet."""
    launcher: Launcher = "torchrun"
    """What starts the processes."""


class CountedCluster(Facilities):
    """So many devices of the catalogue, in the machines that it names for them."""

    devices: Annotated[str, Field(pattern=f"^{COUNTED}$", examples=["8 x h100-sxm-80gb"])]
    """Count and device: `8 x h100-sxm-80gb`."""
    memory: Bytes | None = None
    """Memory of one device that training can use, in place of the catalogue's."""
    devices_per_node: int | None = Field(gt=0, le=MAX_LEVEL, default=None)
    """Devices of one node, in place of the catalogue's."""
    network: Annotated[str, Field(examples=["ib-ndr-8x400"])] | LinkForm | None = None
    """The link between nodes, by name or in numbers, in place of the catalogue's."""


class LevelledCluster(Facilities):
    """A device, and the levels of the network fastest first."""

    name: str = ""
    """What to call the cluster."""
    device: Annotated[str, Field(examples=["h100-sxm-80gb"])] | DeviceSpec
    """A device of the catalogue, or all its numbers."""
    levels: tuple[LevelForm, ...] = Field(min_length=1)
    """Fastest first; the number of devices is the product of the sizes."""
