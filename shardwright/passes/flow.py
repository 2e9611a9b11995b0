"""Where activations come from and where they go, and what parameters do, from one forward and its loss on fake tensors.

[Note: segments]
The blocks, in the order in which they are called, divide a forward into segments: `embedding` before the first one,
then one for each block, then `head`, the loss included. What runs between two blocks belongs to the later one's
segment, so a cut after a block comes before it.

[Note: carried activations]
A later segment needs of an earlier one the storages that were made there and are used later, as far as they depend on
parameters. What follows from the batch alone (masks, positions, rotary tables) is computed wherever it is needed, and
the batch is given to every stage. Of a storage that is used through views, as many bytes count as the largest view has.

[Note: refused cuts]
A stage runs the model's own forward, in which other stages' calls and blocks return what was received, or nothing of
use. It cannot be given what a block made and passed on by other means than its return value: no stage begins after such
a block. And what followed from the batch alone until something that is carried was written into it, in a later segment
than made it, is neither: such a model is not divided at all. Both are told from storages; a runtime, which sees
tensors, may find more.

As everywhere, a block that is equal to an earlier one is not run again: it takes and returns what that one did. Bytes
are those of micro-batches 2 and 3, taken back to 1 along the line ([Note: affine in the micro-batch]).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from shardwright.passes.blocks import Block
from shardwright.passes.flow_watch import Watch
from shardwright.passes.step_run import EMBEDDING, HEAD, Step, replaced_forwards
from shardwright.schemas.profile import Cut, Edge, Role

MICRO_BATCHES = (2, 3)
_K = TypeVar("_K", int, tuple[int, int])


@dataclass(frozen=True, slots=True)
class Flow:
    """What one forward showed."""

    cuts: tuple[Cut, ...]
    """After the embedding and after each block; none for a model without blocks."""
    edges: tuple[Edge, ...]
    like: dict[str, str]
    """Every block's path to that of the first block which is equal to it."""
    roles: dict[str, Role]
    """Of the parameters that are used, under all their names; a block that was not run has those of `like`."""
    segments: dict[str, tuple[int, ...]]
    """By number, those that use a parameter: of the parameters that are used, under all their names."""


def watch(
    model: nn.Module,
    blocks: Sequence[Block],
    prepare: Callable[[nn.Module], None],
    steps: Sequence[tuple[Step, Sequence[torch.Tensor]]],
) -> Flow:
    """Runs a step at each of `MICRO_BATCHES`, given with the tensors of its batch, on a model of fake tensors without
    those of its blocks. A block is given to `prepare` before it is run."""
    watched = []
    for step, batch in steps:
        seen = Watch(prepare, batch)
        seen.name_parameters(model, "")
        with replaced_forwards(blocks, seen.stand_in), seen:
            step.loss(step.forward())
        watched.append(seen)
    names = [EMBEDDING, *watched[0].like, HEAD] if blocks else [HEAD]
    refused = _refusals(watched[0], names)
    return Flow(
        cuts=tuple(
            Cut(after=names[at], tensors=tensors, bytes=size, refused=refused.get(at, ""))
            for at, (tensors, size) in _sizes(watched, _crossing).items()
        ),
        edges=tuple(
            Edge(
                source=names[made],
                target=names[used],
                kind="chain" if used == made + 1 else "skip",
                tensors=tensors,
                bytes=size,
            )
            for (made, used), (tensors, size) in _sizes(watched, _between).items()
        ),
        like=watched[0].like,
        roles=watched[0].roles,
        segments={name: tuple(sorted(numbers)) for name, numbers in watched[0].segments.items()},
    )


def _sizes(watched: Sequence[Watch], measure: Callable[[Watch], dict[_K, list[int]]]) -> dict[_K, tuple[int, int]]:
    """Tensors and bytes at micro-batch 1 of what two runs measured."""
    two, three = map(measure, watched)
    return {key: (two[key][0], max(0, 2 * two[key][1] - three.get(key, two[key])[1])) for key in sorted(two)}


def _crossing(seen: Watch) -> dict[int, list[int]]:
    """Tensors and bytes alive after every segment but the last."""
    result = {segment: [0, 0] for segment in range(seen.segment)}
    for value in seen.values:
        for segment in range(value.made, max(value.uses, default=0) if value.carried else 0):
            size = value.bytes_after(segment)
            result[segment][0] += 1
            result[segment][1] += size
    return result


def _between(seen: Watch) -> dict[tuple[int, int], list[int]]:
    """Tensors and bytes from one segment to another."""
    result: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    for value in seen.values:
        for segment, size in value.uses.items():
            if value.carried and segment > value.made:
                result[value.made, segment][0] += 1
                result[value.made, segment][1] += size
    return result


def _refusals(seen: Watch, names: Sequence[str]) -> dict[int, str]:
    """Why no stage can begin after some segments ([Note: refused cuts])."""
    cuts = range(len(names) - 1)
    leaks = [value for kind in seen.kinds.values() for value in kind.leaks if value.uses]
    found = {
        at: f"{names[value.made]} makes a tensor that is used after it, and does not return it"
        for value in sorted(leaks, key=lambda value: value.made, reverse=True)
        for at in cuts[value.made :]
    }
    for value in seen.values:
        if value.before is not None and value.carried and not value.before.carried and value.born < value.made:
            why = f"{names[value.made]} changes in place a tensor that until then depends on the batch alone"
            found = dict.fromkeys(cuts, why)
    return found
