"""The precisions that a plan may choose, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from shardwright.schemas.base import permits
from shardwright.schemas.cluster import ComputeDtype
from shardwright.schemas.job import JobSpec
from shardwright.schemas.profile import ComputeDtypeName

Precision = Literal["fp32", "bf16_mixed"]
Quality = Literal["exact", "standard", "lossy"]

QUALITIES: tuple[Quality, ...] = ("exact", "standard", "lossy")
"""Each permits what those before it permit."""

MASTER_BYTES = 4
"""Bytes of an element of a parameter at rest, of its gradient and of each optimizer state: always float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionTraits:
    """Number formats of one training step. Parameters at rest, reductions and optimizer states are float32 in all."""

    summary: str
    short: str
    """What the plan's name calls it."""
    compute: ComputeDtypeName
    """Of forward and backward: the profile's key."""
    compute_bytes: int
    """Bytes of an element of a parameter, and of its gradient, while a block computes."""
    hardware: ComputeDtype
    """The operand type that the device must have a rate for."""
    quality: Quality
    """The strictest quality that permits it."""


PRECISIONS: Mapping[Precision, PrecisionTraits] = MappingProxyType(
    {
        "fp32": PrecisionTraits(
            summary="float32 throughout",
            short="fp32",
            compute="fp32",
            compute_bytes=4,
            hardware="fp32",
            quality="exact",
        ),
        "bf16_mixed": PrecisionTraits(
            summary="bfloat16 compute, float32 master parameters, reductions and optimizer states",
            short="bf16",
            compute="bf16",
            compute_bytes=2,
            hardware="bf16",
            quality="standard",
        ),
    }
)


def possible_precisions(job: JobSpec) -> tuple[Precision, ...]:
    """Those that the job's quality and the device's datasheet allow, in the table's order."""
    return tuple(
        name
        for name, traits in PRECISIONS.items()
        if QUALITIES.index(job.quality) >= QUALITIES.index(traits.quality)
        and traits.hardware in job.cluster.device.peak
    )


def permitted_precisions(job: JobSpec) -> tuple[Precision, ...]:
    """The possible ones that the job's strategy allows."""
    return tuple(name for name in possible_precisions(job) if permits(job.strategy.precision, name))


def needed_dtypes(job: JobSpec) -> tuple[ComputeDtypeName, ...]:
    """Compute dtypes that a profile must hold for `make_plan` to consider everything that the job permits, and, where
    nothing of that fits, what another precision would do."""
    return tuple(PRECISIONS[name].compute for name in possible_precisions(job))
