"""What a pipeline schedule is made of: actions in an order for each rank, and what they cost.

[Note: actions]
A stage's backward is cut in two (Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 2): I makes
the gradient of the stage's input, which the stage before waits for, W that of its weights, at any time after its I. The
papers write B for I; here B is both in one, I and then W at once. F of stage s waits for F of stage s - 1, I of stage s
for I of stage s + 1 (of the last stage, for its own F), each with the time that sending takes where the two lie on
different ranks.

[Note: memory of an action]
F keeps a stage's activations of a micro-batch; I lets go of all of them but the share that W needs; W of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "I", "W", "B"]
Placement = Literal["loop", "wave"]


class Action(NamedTuple):
    """One pass over one stage for one micro-batch."""

    kind: Kind
    chunk: int
    """Which of the rank's stages, in the order of the model."""
    micro_batch: int


Timetable = tuple[tuple[Action, ...], ...]
"""For each rank its actions in order."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Stages on ranks. `loop`: stage s on rank s mod p. `wave`: back and forth, ranks 0 .. p-1, p-1 .. 0, and so on, so
    that with two chunks first and last stage share a rank (a V)."""

    ranks: int
    chunks: int = 1
    placement: Placement = "loop"

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.ranks * self.chunks

    def stage(self, rank: int, chunk: int) -> int:
        """The stage that is a rank's chunk."""
        turned = self.placement == "wave" and chunk % 2 == 1
        return chunk * self.ranks + (self.ranks - 1 - rank if turned else rank)

    def place(self, stage: int) -> tuple[int, int]:
        """Rank and chunk of a stage."""
        chunk, at = divmod(stage, self.ranks)
        turned = self.placement == "wave" and chunk % 2 == 1
        return (self.ranks - 1 - at if turned else at), chunk


@dataclass(frozen=True, slots=True)
class Costs:
    """Of every stage, in the order of the model, for one micro-batch; times and memory in any unit."""

    forward: Sequence[float]
    input_gradient: Sequence[float]
    weight_gradient: Sequence[float]
    send: Sequence[float]
    """From each stage to the next, and of the gradient back; 0 where both lie on one rank. One fewer than stages."""
    activations: Sequence[float]
    """Kept from F to I."""
    held_by_weight: Sequence[float]
    """Of these, kept from I to W."""

    @property
    def stages(self) -> int:
        """Stages."""
        return len(self.forward)


def even_costs(
    layout: Layout, times: tuple[float, float, float, float], held_by_weight: float, activations: float = 1.0
) -> Costs:
    """Equal stages: `times` are those of a device's F, I and W of a micro-batch, shared by its chunks, and of sending;
    `activations` a device's of one micro-batch, `held_by_weight` the share of them that a pending W holds."""
    forward, input_gradient, weight_gradient, send = times
    stages, part = layout.stages, 1.0 / layout.chunks
    ranks = [layout.place(stage)[0] for stage in range(stages)]
    return Costs(
        forward=(forward * part,) * stages,
        input_gradient=(input_gradient * part,) * stages,
        weight_gradient=(weight_gradient * part,) * stages,
        send=tuple(0.0 if ranks[stage] == ranks[stage + 1] else send for stage in range(stages - 1)),
        activations=(activations * part,) * stages,
        held_by_weight=(activations * held_by_weight * part,) * stages,
    )
