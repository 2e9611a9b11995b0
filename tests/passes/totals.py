"""Sums over the units of a profile, to be compared with the whole model."""

from __future__ import annotations

from shardwright.schemas.profile import ComputeDtypeName, ModelProfile, Policy, UnitCost


def costs(profile: ModelProfile, dtype: ComputeDtypeName) -> list[tuple[str, UnitCost]]:
    """Every unit in order, repeated as often as it runs."""
    return [(unit.kind, unit.costs[dtype]) for unit in profile.units for _ in range(unit.count)]


def saved(profile: ModelProfile, dtype: ComputeDtypeName, policy: Policy, micro_batch: int) -> int:
    """Bytes kept from forward to backward with every block under one policy."""
    return sum(cost.saved[policy].at(micro_batch) for _, cost in costs(profile, dtype))


def flops(profile: ModelProfile, dtype: ComputeDtypeName, micro_batch: int, *phases: str) -> int:
    """FLOPs of these phases."""
    return sum(
        operator.flops.at(micro_batch)
        for _, cost in costs(profile, dtype)
        for operator in cost.operators
        if operator.phase in phases
    )


def peaks(profile: ModelProfile, dtype: ComputeDtypeName, micro_batch: int) -> dict[str, int]:
    """Most bytes alive in forward, and in backward with every block under one policy."""
    before, entering, forward = 0, 0, 0
    backward: dict[str, int] = {"none": 0, "full": 0}
    kept = {"none": 0, "full": 0}
    for kind, cost in costs(profile, dtype):
        forward = max(forward, before + entering + cost.forward_peak.at(micro_batch))
        before, entering = before + cost.saved["none"].at(micro_batch), cost.output.at(micro_batch)
        gradient = 0 if kind == "head" else entering
        for policy in ("none", "full"):
            kept[policy] += cost.saved[policy].at(micro_batch)
            now = kept[policy] + gradient + cost.backward_peak[policy].at(micro_batch)
            backward[policy] = max(backward[policy], now)
    return {"forward": forward, **backward}
