"""One rank of a pipeline through its program, and the bytes that it holds beside what is at rest.

[Note: memory of a rank]
At rest: its part of the states of its stages, the batch, the buffers. As it goes through its program, step by step: the
activations of the micro-batches in flight, what the action that runs needs beyond them (working.py), gradients and
gathered parameters (buffers.py), messages; before its first backward what a late step keeps. A message is there from
when it is asked for until it is used, and on the other side from when it is made until IN_FLIGHT later ones have been
sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from shardwright.planner.pipelines.buffers import RankGathered, RankGradients, RankSizes
from shardwright.planner.pipelines.costs import pipe_of
from shardwright.planner.pipelines.working import Need, Working
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.schedules.lowering import Program, Step
from shardwright.planner.schedules.timetable import Costs
from shardwright.planner.space import Point

IN_FLIGHT = 4
"""Sends that are not waited for: `IN_FLIGHT` of the runtime's messages.py."""


class Walk:
    """One rank through its program ([Note: memory of a rank])."""

    def __init__(
        self,
        point: Point,
        sizes: RankSizes,
        working: Mapping[int, Working],
        costs: Costs,
        messages: Mapping[tuple[int, int], int],
        program: Program,
        kept: Mapping[str, int],
    ) -> None:
        """`kept`: bytes that go with the first backward, by category."""
        self._kept = kept
        self._working, self._costs, self._messages, self._program = working, costs, messages, program
        self._checkpointed = pipe_of(point).checkpointed
        element = PRECISIONS[point.precision].compute_bytes
        self._gradients = RankGradients(sizes, program)
        self._gathered = RankGathered(sizes, element)
        self._activations = 0
        self._values: dict[tuple[str, int, int, int], int] = {}
        """Messages, by what they are, from where to where, and the micro-batch."""
        self._sends: deque[int] = deque()
        self.worst: dict[str, tuple[int, dict[str, int], bool]] = {}

    def run(self) -> dict[str, tuple[int, dict[str, int], bool]]:
        """Of every kind of step that computes or reduces its worst moment: bytes beyond those at rest, these by
        category, and whether a block is recomputed."""
        for step in self._program:
            self._ACTIONS[step.kind](self, step)
        return self.worst

    def _forward(self, step: Step) -> None:
        self._take("F", step)
        self._activations += round(self._costs.activations[step.stage])
        self._note("F", self._working[step.stage].forward)
        self._make("F", step, ahead=True)

    def _backward(self, step: Step) -> None:
        kind, stage = step.kind, step.stage
        working = self._working[stage]
        self._take("I", step)
        self._kept = {}
        fresh = self._gradients.fresh(stage)
        self._note(
            kind, working.first_backward if fresh else working.backward, recomputes=self._checkpointed[stage] > 0
        )
        self._gradients.make(stage)
        self._activations -= round(self._costs.activations[stage])
        self._activations += 0 if kind == "B" else round(self._costs.held_by_weight[stage])
        self._make("I", step, ahead=False)

    def _weight(self, step: Step) -> None:
        self._note("W", self._working[step.stage].weight)
        self._activations -= round(self._costs.held_by_weight[step.stage])

    def _reduce(self, step: Step) -> None:
        beside = self._gradients.reduce(step.stage) - self._gradients.bytes - self._gradients.sending
        self._note("REDUCE", Need(0, False), reducing=max(0, beside))

    def _gather(self, step: Step) -> None:
        self._gathered.gather(step.stage)

    def _release(self, step: Step) -> None:
        self._gathered.release(step.stage)

    def _receive(self, step: Step) -> None:
        kind, stage, micro_batch, peer = step
        self._values[kind[-1], peer, stage, micro_batch] = self._size(stage, peer)

    def _send(self, step: Step) -> None:
        kind, stage, micro_batch, peer = step
        self._sends.append(self._values.pop((kind[-1], stage, peer, micro_batch), self._size(stage, peer)))
        if len(self._sends) > IN_FLIGHT:
            self._sends.popleft()

    def _size(self, stage: int, peer: int) -> int:
        return self._messages[min(stage, peer), max(stage, peer)]

    def _take(self, kind: str, step: Step) -> None:
        """What an action uses is counted with it."""
        for value in [value for value in self._values if value[0] == kind and value[2:] == (step.stage, step[2])]:
            del self._values[value]

    def _make(self, kind: str, step: Step, *, ahead: bool) -> None:
        """What an action has made."""
        for (source, target), size in self._messages.items():
            made_by, used_by = (source, target) if ahead else (target, source)
            if made_by == step.stage:
                self._values[kind, made_by, used_by, step.micro_batch] = size

    def _note(self, kind: str, need: Need, *, recomputes: bool = False, reducing: int = 0) -> None:
        gradients, sending = self._gradients.bytes, self._gradients.sending
        buffers = sending + reducing + sum(self._values.values()) + sum(self._sends)
        total = self._activations + need.bytes + gradients + buffers + self._gathered.bytes + sum(self._kept.values())
        if kind not in self.worst or total > self.worst[kind][0]:
            temporaries = "head_and_loss" if need.in_head else "activation_temporaries"
            self.worst[kind] = (
                total,
                {
                    "saved_activations": self._activations,
                    "gradients": gradients + self._kept.get("gradients", 0),
                    "optimizer_states": self._kept.get("optimizer_states", 0),
                    "communication_buffers": buffers,
                    "gathered_parameters": self._gathered.bytes,
                    temporaries: need.bytes,
                },
                recomputes,
            )

    _ACTIONS: Mapping[str, Callable[[Walk, Step], None]] = {
        "F": _forward,
        "I": _backward,
        "B": _backward,
        "W": _weight,
        "REDUCE": _reduce,
        "GATHER": _gather,
        "RELEASE": _release,
        "RECV_F": _receive,
        "RECV_I": _receive,
        "SEND_F": _send,
        "SEND_I": _send,
    }
