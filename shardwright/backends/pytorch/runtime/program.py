"""Reads this process's part of a pipeline's program from the text file beside the script."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from .pipeline import Step

NUMBERS = dict.fromkeys(("F", "I", "W", "B", "GATHER", "RELEASE", "REDUCE"), 2)
"""How many numbers follow each kind of step: stage and micro-batch, and of a message the stage at its other end."""
NUMBERS |= dict.fromkeys(("SEND_F", "RECV_F", "SEND_I", "RECV_I"), 3)


class ProgramError(Exception):
    """The file of programs is broken, or is not one for this model."""


def read_program(path: Path, rank: int, ranks: Sequence[int], wires: Collection[tuple[int, int]]) -> tuple[Step, ...]:
    """The program of one rank of a pipeline: a line of the file, which explains itself in comments.

    `ranks`: of every stage its rank. `wires`: between which stages the model has something to send. Raises ProgramError
    for a file that holds anything else than a program for each rank, and for a program of a model that sends otherwise.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    if len(lines) != max(ranks) + 1:
        raise ProgramError(f"{path}: holds programs of {len(lines)} ranks, and there are {max(ranks) + 1}")
    program = tuple(_step(word, path) for word in lines[rank].split() if word != "-")
    sent = {(min(stage, peer), max(stage, peer)) for _, stage, _, peer in program if peer >= 0}
    needed = {(a, b) for a, b in wires if ranks[a] != ranks[b] and rank in (ranks[a], ranks[b])}
    if sent != needed:
        raise ProgramError(
            f"{path}: rank {rank} has messages between the stages {sorted(sent)}, and the model needs some between "
            f"{sorted(needed)}: compile the job again for this model"
        )
    return program


def _step(word: str, path: Path) -> Step:
    kind, *numbers = word.split(":")
    if len(numbers) != NUMBERS.get(kind) or not all(each.isascii() and each.isdecimal() for each in numbers):
        raise ProgramError(f"{path}: {word[:80]!r} is no step")
    stage, micro_batch, peer = (*map(int, numbers), -1)[:3]
    return kind, stage, micro_batch, peer
