"""Numbers that no datasheet, profile or job states, each with its origin. The plan lists those it used.

Fitted ones were fitted on 769 published training runs (docs/cost-model.md lists their sources).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardwright.schemas.cluster import ClusterSpec, DeviceKind, DeviceSpec

_FITTED = "fitted on 769 published runs, see docs/cost-model.md"
_EAGER_LAYER = "3.2 ms over the 38 + 71 operators of an eager Hugging Face Llama layer; " + _FITTED
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number and where it comes from."""

    name: str
    value: float
    unit: str
    origin: Literal["measured", "default"]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConstants:
    """What a kind of device reaches of its stated rates, and what it costs beside them."""

    matmul: Constant
    """Matrix multiplications, of the measured maximum rate."""
    unmeasured: Constant
    """The measured maximum rate, of the datasheet's peak, where nobody measured it."""
    attention: Constant
    """Fused attention kernels, of the measured maximum matrix-multiply rate."""
    memory: Constant
    """Memory traffic, of the datasheet's bandwidth."""
    links: Constant
    """Collectives, of the stated bandwidth of a level."""
    forward_launch: Constant
    """Host time of one operator of an eager forward, autograd included."""
    backward_launch: Constant
    """Host time of one operator of a backward."""
    group_hooks: Constant
    """Host time of fully_shard's hooks around one pass of one parameter group, forward or backward."""
    step_overhead: Constant
    """Host time of a step outside forward, backward and optimizer: batches, logging, synchronisation."""
    fragmentation: Constant
    """Reserved over allocated bytes, minus one, at the peak."""
    context_bytes: Constant
    """Device memory outside the allocator: context, loaded kernels, buffers of the communication library."""
    host_bytes: Constant
    """Host memory of one process before a model is built: interpreter, torch, pinned staging."""


_HOOKS = Constant(
    name="fully_shard hooks, per group and pass",
    value=0.5e-3,
    unit="s",
    origin="measured",
    source="1.0 to 1.3 ms a block, forward and backward, of tiny blocks on one server core, torch 2.13",
)

_CUDA = DeviceConstants(
    matmul=Constant(name="matmul efficiency", value=0.90, unit="", origin="measured", source=_FITTED),
    unmeasured=Constant(
        name="measured maximum of peak",
        value=0.80,
        unit="",
        origin="default",
        source="A100 0.87, H100 0.80, B200 0.78 (github.com/stas00/ml-engineering, compute/accelerator, MAMF)",
    ),
    attention=Constant(
        name="attention efficiency", value=0.45, unit="", origin="default", source="between A100 and H100"
    ),
    memory=Constant(name="memory efficiency", value=0.85, unit="", origin="measured", source=_FITTED),
    links=Constant(name="link efficiency", value=0.88, unit="", origin="measured", source=_FITTED),
    forward_launch=Constant(
        name="launch, forward operator", value=34e-6, unit="s", origin="measured", source=_EAGER_LAYER
    ),
    backward_launch=Constant(
        name="launch, backward operator", value=27e-6, unit="s", origin="measured", source=_EAGER_LAYER
    ),
    group_hooks=_HOOKS,
    step_overhead=Constant(name="host overhead per step", value=5e-3, unit="s", origin="default", source=""),
    fragmentation=Constant(name="fragmentation", value=0.15, unit="", origin="measured", source=_FITTED),
    context_bytes=Constant(
        name="context and communication buffers",
        value=1024 * _MIB,
        unit="B",
        origin="default",
        source="context 0.5 GiB (fitted as fragmentation is), the rest for NCCL's channels",
    ),
    host_bytes=Constant(name="host memory per process", value=3072 * _MIB, unit="B", origin="default", source=""),
)

_CPU = DeviceConstants(
    matmul=Constant(name="matmul efficiency", value=0.70, unit="", origin="default", source=""),
    unmeasured=Constant(name="measured maximum of peak", value=0.80, unit="", origin="default", source=""),
    attention=Constant(name="attention efficiency", value=0.40, unit="", origin="default", source=""),
    memory=Constant(name="memory efficiency", value=0.60, unit="", origin="default", source=""),
    links=Constant(name="link efficiency", value=0.80, unit="", origin="default", source=""),
    forward_launch=Constant(name="launch, forward operator", value=8e-6, unit="s", origin="default", source=""),
    backward_launch=Constant(name="launch, backward operator", value=8e-6, unit="s", origin="default", source=""),
    group_hooks=_HOOKS,
    step_overhead=Constant(name="host overhead per step", value=2e-3, unit="s", origin="default", source=""),
    fragmentation=Constant(name="fragmentation", value=0.0, unit="", origin="default", source="no caching allocator"),
    context_bytes=Constant(
        name="context and communication buffers", value=0, unit="B", origin="default", source="none on a CPU"
    ),
    host_bytes=Constant(name="host memory per process", value=512 * _MIB, unit="B", origin="default", source=""),
)

_BY_KIND: dict[DeviceKind, DeviceConstants] = {"cuda": _CUDA, "cpu": _CPU}

_FLASH_ATTENTION = {"a100": 0.55, "a800": 0.55, "h100": 0.34, "h800": 0.34, "h200": 0.34}
"""FlashAttention-2, which torch's scaled_dot_product_attention runs, has no instructions of its own for Hopper."""


def device_constants(device: DeviceSpec) -> DeviceConstants:
    """The constants of a device: of its kind, and its own where one was fitted."""
    return _BY_KIND[device.kind]


def attention_efficiency(device: DeviceSpec) -> Constant:
    """Of fused attention kernels on this device, of its measured maximum matrix-multiply rate."""
    fitted = next((value for name, value in _FLASH_ATTENTION.items() if name in device.name.lower()), None)
    if fitted is None or device.kind != "cuda":
        return device_constants(device).attention
    return Constant(name="attention efficiency", value=fitted, unit="", origin="measured", source=_FITTED)


def device_budget(cluster: ClusterSpec, stated: int | None) -> int:
    """Bytes that the allocator may reserve on one device: the stated budget, or what the context leaves of the device,
    whichever is less."""
    left = cluster.device.memory - int(device_constants(cluster.device).context_bytes.value)
    return left if stated is None else min(left, stated)
