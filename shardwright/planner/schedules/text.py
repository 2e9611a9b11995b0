"""A timetable as text: one line a rank, its actions in order with blanks between them.

An action is its kind and micro-batch, `F0`, `I0`, `W0` or `B0`; of a chunk other than the first, with the chunk and a
colon before it, `1:F0`. Empty lines and what follows a `#` are not read. `to_torch_csv` writes the "compute only" form
of `torch.distributed.pipelining.schedules` instead, which numbers the stages of the whole pipeline: `3F0`.

Programs are text of the same form; `PROGRAM_HEAD` says what their words mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.lowering import Program, Step
from shardwright.planner.schedules.timetable import Action, Layout, Timetable

_ACTION = re.compile(r"(?:([0-9]+):)?([FIWB])([0-9]+)", re.ASCII)
_STEP = re.compile(
    r"(?:(F|I|W|B|GATHER|RELEASE|REDUCE):([0-9]+):([0-9]+)|((?:SEND|RECV)_[FI]):([0-9]+):([0-9]+):([0-9]+))", re.ASCII
)

PROGRAM_HEAD = """\
# What each rank of the pipeline does in a step: a line a rank, its steps in order, as KIND:STAGE:MICRO-BATCH.
# F is forward; B backward, or I and W its two parts: the gradient of the stage's input, and those of its weights.
# SEND_F:0:3:1 and RECV_F:1:3:0 are the two sides of one message, activations of micro-batch 3 from stage 0 to stage 1;
# SEND_I and RECV_I those of their gradients. GATHER and RELEASE are of a stage's parameters, REDUCE of its gradients.
# The messages of all ranks lie in one order in which nobody waits for what comes later: do not move single words.
"""


def to_text(timetable: Timetable) -> str:
    """See the module. A rank without actions is written as `-`."""
    return "".join(" ".join(map(action_text, actions) if actions else ["-"]) + "\n" for actions in timetable)


def from_text(text: str) -> Timetable:
    """The inverse of `to_text`. Raises ScheduleError at a word that is no action."""
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    lines = [words for words in lines if words]
    return tuple(
        () if words == ["-"] else tuple(_parse(word, rank, index) for index, word in enumerate(words))
        for rank, words in enumerate(lines)
    )


def action_text(action: Action) -> str:
    """One action, as `to_text` writes it."""
    kind, chunk, micro_batch = action
    return f"{chunk}:{kind}{micro_batch}" if chunk else f"{kind}{micro_batch}"


def program_to_text(programs: Sequence[Program]) -> str:
    """The programs of all ranks, explained; see `PROGRAM_HEAD`."""
    return PROGRAM_HEAD + "".join((" ".join(map(_step_text, program)) or "-") + "\n" for program in programs)


def program_from_text(text: str) -> tuple[Program, ...]:
    """The inverse of `program_to_text`. Raises ScheduleError at a word that is no step."""
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    return tuple(
        () if words == ["-"] else tuple(_parse_step(word, rank, index) for index, word in enumerate(words))
        for rank, words in enumerate(filter(None, lines))
    )


def _step_text(step: Step) -> str:
    kind, *numbers = step if step.peer >= 0 else step[:3]
    return ":".join(map(str, (kind, *numbers)))


def _parse_step(word: str, rank: int, index: int) -> Step:
    found = _STEP.fullmatch(word)
    if found is None:
        raise ScheduleError(rank, index, f"{word!r} is no step; write for instance F:0:3 or SEND_F:0:3:1")
    kind, *numbers = (each for each in found.groups() if each is not None)
    return Step(kind, *map(int, numbers))  # type: ignore[arg-type]


def to_torch_csv(timetable: Timetable, layout: Layout) -> str:
    """What `_PipelineScheduleRuntime._load_csv(file, "compute_only")` of torch 2.8 to 2.14 reads: a line a rank, its
    actions as stage, kind and micro-batch."""
    return "".join(
        ",".join(f"{layout.stage(rank, chunk)}{kind}{micro_batch}" for kind, chunk, micro_batch in actions) + "\n"
        for rank, actions in enumerate(timetable)
    )


def _parse(word: str, rank: int, index: int) -> Action:
    found = _ACTION.fullmatch(word)
    if found is None:
        raise ScheduleError(
            rank, index, f"{word!r} is no action; write for instance F0, I0, W0, B0 or, of chunk 1, 1:F0"
        )
    chunk, kind, micro_batch = found.groups()
    return Action(kind, int(chunk or 0), int(micro_batch))  # type: ignore[arg-type]
