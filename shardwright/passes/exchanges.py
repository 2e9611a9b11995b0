"""What the processes that share a unit tell one another, from the events of its runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from shardwright.passes.fit import NotAffine, fit
from shardwright.passes.record import Event
from shardwright.schemas.profile import Exchange

_KINDS = {"all_reduce_": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter"}


def exchanges(
    forward: Sequence[Sequence[Event]], backward: Sequence[Sequence[Event]], again: range = range(0)
) -> tuple[Exchange, ...]:
    """The collectives of a unit from its events at each micro-batch, equal ones merged. `again` are the events of
    forward that a checkpointed block makes again in backward. Raises NotAffine."""
    found: Counter[Exchange] = Counter()
    for phase, runs in (("forward", forward), ("backward", backward)):
        if len({len(events) for events in runs}) > 1:
            raise NotAffine(f"{phase} runs other operators at one micro-batch than at another")
        for at, events in enumerate(zip(*runs, strict=True)):
            if not events[0].exchanged:
                continue
            sizes = fit([event.exchanged for event in events], f"the bytes of {events[0].name} are")
            one = Exchange(
                axis="tp",
                kind=_KINDS[events[0].name],  # type: ignore[arg-type]
                phase=phase,  # type: ignore[arg-type]
                bytes=sizes,
                count=1,
                again=phase == "forward" and at in again,
            )
            found[one] += 1
    return tuple(replace(one, count=count) for one, count in found.items())
