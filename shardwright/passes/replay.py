"""What checkpointing makes of a unit, derived from a forward and a backward that ran without it.

[Note: checkpointing]
Under `torch.utils.checkpoint` (use_reentrant=False, torch 2.13) a unit keeps its inputs, as its forward gets them. In
backward, when the first saved tensor is needed, forward runs again until the last saved tensor is made (early stop),
and then backward goes on as if nothing had been dropped, except that the inputs stay until its end.

[Note: selective checkpointing]
With `create_selective_checkpoint_contexts` a policy names operators whose results are kept as well: all of them, needed
or not, views as the storages that they lie in. When forward runs again, such an operator is not executed; its results
leave the cache, and live on only while forward or backward needs them. What runs again before the last saved tensor is
made, and in which order, does not depend on the policy; what comes after it stays in the cache until the end. So with
`P(t)` the bytes of kept results that have left the cache by the moment t, the bytes alive at t beyond those before
backward are those under full checkpointing less `P(t)`: kept results that are still alive at t were alive before, and
the dead ones have been freed. One plain run therefore prices every policy.

PyTorch refuses results that a later operator writes into ("has been mutated"): these are never kept. Operators that
return views or write into their arguments make no storage, and always run again. So do collectives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch

from shardwright.passes.record import Event, Recorder, Recording


@dataclass(frozen=True, slots=True)
class Result:
    """What one call of forward returns in new storages that could be kept, in bytes."""

    bytes: int
    needed: int
    """Of `bytes`, what backward needs."""
    outputs: tuple[int, ...]
    """Storages among them that leave the unit, by their index among those of the outputs."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A unit under checkpointing. Bytes are beyond what was alive before backward, under full checkpointing."""

    results: list[Result]
    """Of every event of forward."""
    first: int
    """The first event that belongs to the unit, after its inputs were cast."""
    stop: int
    """The event before which forward stops when it runs again."""
    before: list[int]
    """Bytes alive at the moments of backward before forward runs again."""
    again: list[list[int]]
    """Of every event that runs again: bytes alive at the moments from its results to the next event's."""
    after: list[int]
    """Bytes alive at the moments of backward after forward ran again."""

    def rises(self, kept: Collection[int]) -> list[int]:
        """Bytes alive beyond what was alive before backward, at every moment, with the results of these events kept
        ([Note: selective checkpointing])."""
        rises, taken = list(self.before), 0
        for event, moments in enumerate(self.again, self.first):
            taken += self.results[event].bytes if event in kept else 0
            rises += [alive - taken for alive in moments]
        return rises + [alive - taken for alive in self.after]


class Savings:
    """Watches what is saved in a unit's forward and when backward first needs it, as hooks for saved tensors."""

    def __init__(self, recorder: Recorder, region: str) -> None:
        self.recorder = recorder
        self.region = region
        self.packed: set[int | None] = set()
        """Storages of saved tensors; None is one that does not count."""
        self.last_saved = (0, 0)
        """Events and moments of forward before the last tensor was saved."""
        self.first_needed: int | None = None
        """Moments of backward before the first saved tensor was needed, that moment included."""

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Called with every tensor that is saved."""
        self.packed.add(self.recorder.storages.number(tensor))
        self.last_saved = self.recorder.position()
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Called with every saved tensor that is needed."""
        if self.first_needed is None:
            self.recorder.mark(self.region)
            self.first_needed = self.recorder.position()[1]
        return tensor


@dataclass(frozen=True, slots=True)
class Ended:
    """The state between forward and backward: storages by number."""

    start: tuple[int, int]
    """Events and moments of forward before the unit got its inputs, cast."""
    alive: Set[int]
    """Everything that is kept when nothing is checkpointed."""
    passed: Set[int | None]
    """What checkpointing keeps: the inputs, as forward gets them."""
    given: Mapping[int | None, int]
    """The inputs before they were cast, with their index among the storages of inputs. None: what does not count."""
    outputs: Mapping[int | None, int]
    """What the unit returns, with its index among the storages of outputs."""


def replay(forward: Recording, backward: Recording, savings: Savings, ended: Ended) -> Replay:
    """See [Note: checkpointing]."""
    storages, region = savings.recorder.storages, savings.region
    results = _results(forward.events, savings, ended)
    rises = backward.rises(region)
    first, needed = ended.start[0], savings.first_needed
    if needed is None:
        return Replay(results, first, first, rises, [], [])
    before = rises[:needed]
    beyond = forward.rises(region)
    cast = beyond[ended.start[1] - 1] if ended.start[1] else 0
    beyond = [before[-1] + alive - cast for alive in beyond[: savings.last_saved[1]]]
    stop = max(first, savings.last_saved[0])
    starts = [event.moments - bool(event.made) for event in forward.events[first:stop]]
    ends = [*starts[1:], len(beyond)] if starts else []
    dropped = [n for n in ended.alive if n in savings.packed and n not in ended.given and n not in ended.passed]
    again = sum(storages.size[number] for number in dropped)
    inputs = [moment.inputs for moment in backward.moments]
    held = [inputs[0] - alive for alive in inputs[needed:]]
    return Replay(
        results=results,
        first=first,
        stop=stop,
        before=[*before, *beyond[ended.start[1] : starts[0] if starts else None]],
        again=[beyond[start:end] for start, end in zip(starts, ends, strict=True)],
        after=[again + alive + more for alive, more in zip(rises[needed:], held, strict=True)],
    )


def _results(events: Sequence[Event], savings: Savings, ended: Ended) -> list[Result]:
    """What each call returns that can be kept. Calls that are merged into one operator are kept together or not at
    all, so one whose results are written into later takes the others with it."""
    size, overwritten = savings.recorder.storages.size, savings.recorder.overwritten
    refused = {_merged(event) for event in events if event.exchanged or not overwritten.isdisjoint(event.made)}
    found = []
    for index, event in enumerate(events):
        made: Iterable[int] = event.made
        if index < ended.start[0] or not savings.packed or _merged(event) in refused:
            made = ()
        found.append(
            Result(
                bytes=sum(size[number] for number in made),
                needed=sum(size[number] for number in made if number in ended.alive),
                outputs=tuple(ended.outputs[number] for number in made if number in ended.outputs),
            )
        )
    return found


def _merged(event: Event) -> tuple[object, ...]:
    """Equal for calls that `fit.operators` merges."""
    return event.name, event.module, event.shapes, event.dtype
