"""Seconds that the units of a model compute on one device: a roofline per operator, and the host that launches them.

[Note: roofline]
A matrix multiplication takes flops / (efficiency * measured maximum rate) + bytes / (efficiency * memory bandwidth),
other fused kernels (attention) flops over their own efficiency of the same rate, everything else its bytes over the
bandwidth (Williams et al. 2009, "Roofline"; the sum instead of the maximum makes skinny matrices slower, as they are).

[Note: launch]
A unit is as slow as the host that launches its kernels where these are short. On a GPU both run side by side and join
softly: (device^4 + host^4)^(1/4). On a CPU they are one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardwright.planner.constants import attention_efficiency, device_constants
from shardwright.planner.exchanges import NOTHING, UNWIRED, ByAxis, Wiring
from shardwright.schemas.cluster import ComputeDtype, DeviceSpec
from shardwright.schemas.profile import (
    ComputeDtypeName,
    Kind,
    ModelProfile,
    Operator,
    Unit,
    UnitKind,
)

_RATES: Mapping[str, ComputeDtype] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
KINDS: tuple[Kind, ...] = ("matmul", "attention", "elementwise")


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of one pass over one unit, by kind of operator."""

    kinds: tuple[float, float, float]
    """In the order of `KINDS`."""
    launch: float
    """What launching adds to the kernels ([Note: launch])."""
    exchanges: ByAxis = NOTHING
    """Of what is exchanged with the processes that share the unit; the kernels wait for it."""

    @property
    def seconds(self) -> float:
        """The whole pass."""
        return sum(self.kinds) + self.launch + sum(self.exchanges)


@dataclass(frozen=True, slots=True)
class UnitWork:
    """Seconds of one unit at one micro-batch."""

    kind: UnitKind
    count: int
    forward: Work
    backward: Work
    """Of input and weight gradients."""
    recompute: float
    """Of a checkpointed block: its forward once more, without the tail whose results nothing needs."""
    exchanged_again: ByAxis = NOTHING
    """Of these, what is exchanged once more."""


def model_work(
    profile: ModelProfile,
    dtype: ComputeDtypeName,
    micro_batch: int,
    device: DeviceSpec,
    hooked: bool,
    wiring: Wiring = UNWIRED,
) -> list[UnitWork]:
    """Seconds of every unit at a micro-batch ([Note: roofline]); `hooked` where fully_shard's hooks surround it.
    `wiring`: of the processes that share one copy of the model. Raises KeyError for an axis that they exchange over and
    that is not there."""
    return [_unit_work(unit, dtype, micro_batch, device, hooked, wiring) for unit in profile.units]


def model_flops(profile: ModelProfile, dtype: ComputeDtypeName, micro_batch: int) -> int:
    """FLOPs of forward, input gradients and weight gradients of one micro-batch; nothing recomputed.

    The backward of a fused attention kernel counts twice its forward, which is the work that the gradients are; the
    kernel itself does 2.5 times it, since it recomputes the scores (Dao 2023, arXiv 2307.08691, section 4.1).
    """
    return sum(unit.count * _unit_flops(unit.costs[dtype].operators, micro_batch) for unit in profile.units)


def _unit_flops(operators: Sequence[Operator], micro_batch: int) -> int:
    fused = [operator for operator in operators if operator.kind == "attention"]
    forward = sum(operator.flops.at(micro_batch) for operator in fused if operator.phase == "forward")
    trained = any(operator.phase != "forward" for operator in fused)
    others = sum(operator.flops.at(micro_batch) for operator in operators if operator.kind != "attention")
    return others + (3 if trained else 1) * forward


def matmul_rate(device: DeviceSpec, dtype: ComputeDtype) -> float:
    """The highest matrix-multiply rate to expect, in FLOP/s: measured, else a usual share of the peak. Operands of a
    type that the device lists no rate for (a router in fp32) take the slowest rate that it lists."""
    if dtype in device.measured:
        return device.measured[dtype]
    peak = device.peak.get(dtype, min(device.peak.values()))
    return peak * device_constants(device).unmeasured.value


def memory_rate(device: DeviceSpec) -> float:
    """Bytes per second that streaming kernels reach."""
    return device.memory_bandwidth * device_constants(device).memory.value


def _unit_work(
    unit: Unit,
    dtype: ComputeDtypeName,
    micro_batch: int,
    device: DeviceSpec,
    hooked: bool,
    wiring: Wiring,
) -> UnitWork:
    """The root group's hooks are counted with the head."""
    constants, cost = device_constants(device), unit.costs[dtype]
    hooks = constants.group_hooks.value if hooked and unit.kind != "embedding" else 0.0
    forward = [operator for operator in cost.operators if operator.phase == "forward"]
    backward = [operator for operator in cost.operators if operator.phase != "forward"]
    launch = constants.forward_launch.value
    again, skipped = (_work(each, micro_batch, device, launch, 0.0) for each in (forward, cost.not_recomputed))
    exchanged = wiring.seconds(cost, micro_batch, constants.links.value)
    return UnitWork(
        kind=unit.kind,
        count=unit.count,
        forward=replace(_work(forward, micro_batch, device, launch, hooks), exchanges=exchanged.forward),
        backward=replace(
            _work(backward, micro_batch, device, constants.backward_launch.value, hooks), exchanges=exchanged.backward
        ),
        recompute=max(0.0, again.seconds - skipped.seconds) + sum(exchanged.again),
        exchanged_again=exchanged.again,
    )


def _work(operators: Sequence[Operator], micro_batch: int, device: DeviceSpec, launch: float, hooks: float) -> Work:
    kinds = dict.fromkeys(KINDS, 0.0)
    for operator in operators:
        kinds[operator.kind] += _operator_seconds(operator, micro_batch, device)
    kernels = sum(kinds.values())
    host = hooks + launch * sum(operator.count for operator in operators)
    joined = kernels + host if device.kind == "cpu" else (kernels**4 + host**4) ** 0.25
    return Work((kinds["matmul"], kinds["attention"], kinds["elementwise"]), joined - kernels)


def _operator_seconds(operator: Operator, micro_batch: int, device: DeviceSpec) -> float:
    traffic = operator.bytes.at(micro_batch) / memory_rate(device)
    if operator.kind == "elementwise":
        return traffic
    name = _RATES.get(operator.dtype, "fp32")
    rate = matmul_rate(device, name if name in device.peak else "fp32")
    flops = operator.flops.at(micro_batch)
    if operator.kind == "attention":
        return max(flops / (attention_efficiency(device).value * rate), traffic)
    return flops / (device_constants(device).matmul.value * rate) + traffic
