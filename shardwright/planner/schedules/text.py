"""A timetable as text: one line a rank, its actions in order with blanks between them.

An action is its kind and micro-batch, `F0`, `I0`, `W0` or `B0`; of a chunk other than the first, with the chunk and a
colon before it, `1:F0`. Empty lines and what follows a `#` are not read. `to_torch_csv` writes the "compute only" form
of `torch.distributed.pipelining.schedules` instead, which numbers the stages of the whole pipeline: `3F0`.
"""

from __future__ import annotations

import re

from shardwright.planner.schedules.execution import ScheduleError
from shardwright.planner.schedules.timetable import Action, Layout, Timetable

_ACTION = re.compile(r"(?:([0-9]+):)?([FIWB])([0-9]+)", re.ASCII)


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
