"""Which parameters the stages of a pipeline have, in the units that their states are sharded in.

[Note: units of a stage]
As the runtime's stage_states.py has them: of every stage the parameters of each of its blocks are a unit, and those
that it uses outside of its blocks are one more, its root. What several stages of one rank use is in the first of these
units that it fits into. What stages of several ranks use (a tied embedding and head) is a unit by itself on each of
them. What nobody uses belongs to the stage of its block, or to the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from shardwright.planner.flat import PLAIN, Bucket, buckets
from shardwright.planner.groups import Groups
from shardwright.planner.parts import Part
from shardwright.planner.space import Pipe
from shardwright.schemas.job import OptimizerSpec
from shardwright.schemas.profile import Parameter


@dataclass(frozen=True, slots=True)
class StateUnit:
    """Parameters that are gathered and reduced together ([Note: units of a stage])."""

    stages: tuple[int, ...]
    """Those of the rank that use it."""
    block: int
    """Index in the model; -1 for a root, and for what several ranks have."""
    parameters: tuple[Parameter, ...]
    ranks: tuple[int, ...]
    """That have a copy each."""


class _Users(NamedTuple):
    """Who uses the parameters of a pipeline."""

    stages: dict[str, tuple[int, ...]]
    """Those that have a parameter, by its name."""
    by_ranks: dict[tuple[int, ...], list[Parameter]]
    """Parameters by the ranks of these stages, in the model's order."""


def stage_segments(pipe: Pipe, stage: int, blocks: int) -> range:
    """The segments of a stage ([Note: segments] in costs.py), of a model of so many blocks."""
    own = pipe.blocks(stage, blocks)
    last = stage == pipe.layout.stages - 1
    return range(0 if stage == 0 else own.start + 1, own.stop + 1 + last)


def without_schedule(pipe: Pipe) -> Pipe:
    """The same for all schedules of the same stages."""
    return replace(pipe, schedule="1f1b", activation_limits=())


def placed(pipe: Pipe) -> Pipe:
    """The same for all pipelines that have the same stages on the same ranks."""
    return replace(without_schedule(pipe), checkpointed=())


def by_stage(stages: Sequence[tuple[int, ...]]) -> dict[int, list[int]]:
    """The units of each stage; `stages` are those of each unit."""
    made: dict[int, list[int]] = {}
    for unit, users in enumerate(stages):
        for stage in users:
            made.setdefault(stage, []).append(unit)
    return made


class Owners:
    """Of every stage its parameters."""

    def __init__(self, groups: Groups) -> None:
        self.profile = groups.profile
        self.paths = groups.profile.block_paths
        known = any(parameter.segments for parameter in self.profile.parameters)
        self._segments = {each.name: each.segments for each in self.profile.parameters} if known else _usual(groups)
        self._inside = _inside(self.profile.parameters, self.paths)
        self._units: Callable[[Pipe, int], tuple[StateUnit, ...]] = lru_cache(maxsize=100_000)(
            lambda pipe, rank: tuple(self._of_rank(pipe, rank))
        )
        self._users: Callable[[Pipe], _Users] = lru_cache(maxsize=1_000)(self._users_of)
        self._trained: Callable[[range], int] = lru_cache(maxsize=100_000)(self._count_trained)
        self._buckets: Callable[..., tuple[Bucket, ...]] = lru_cache(maxsize=100_000)(buckets)

    def trained(self, segments: range) -> int:
        """Elements of the trainable parameters that these segments use."""
        return self._trained(segments)

    def units(self, pipe: Pipe, rank: int) -> tuple[StateUnit, ...]:
        """Of a rank: those of its blocks in order, the roots of its stages, and what it has in common with others."""
        return self._units(placed(pipe), rank)

    def flat(
        self, pipe: Pipe, rank: int, part: Part, optimizer: OptimizerSpec = PLAIN
    ) -> tuple[tuple[Bucket, ...], ...]:
        """The flat buckets of a part of each of these units; `optimizer` says which parameters are of one kind."""
        plain = optimizer if optimizer.groups or optimizer.no_decay != "auto" else PLAIN
        layout, units = part.point.chain, self.units(pipe, rank)
        return tuple(self._buckets(tuple(filter(part.has, unit.parameters)), layout, plain) for unit in units)

    def _stages_of(self, pipe: Pipe) -> dict[str, tuple[int, ...]]:
        """Of each parameter the stages that have it."""
        count = len(self.paths)
        stages = range(pipe.layout.stages)
        stage_of = {segment: stage for stage in stages for segment in stage_segments(pipe, stage, count)}
        blocks = {block: stage for stage in stages for block in pipe.blocks(stage, count)}

        def owner(parameter: Parameter) -> int:
            return next((blocks[block] for block in blocks if parameter.name in self._inside[block]), 0)

        return {
            each.name: tuple(sorted({stage_of[at] for at in self._segments[each.name]})) or (owner(each),)
            for each in self.profile.parameters
        }

    def _users_of(self, pipe: Pipe) -> _Users:
        stages = self._stages_of(pipe)
        by_ranks: dict[tuple[int, ...], list[Parameter]] = {}
        for each in self.profile.parameters:
            ranks = tuple(sorted({pipe.layout.place(stage)[0] for stage in stages[each.name]}))
            by_ranks.setdefault(ranks, []).append(each)
        return _Users(stages, by_ranks)

    def _of_rank(self, pipe: Pipe, rank: int) -> Iterator[StateUnit]:
        users, by_ranks = self._users(pipe)
        mine = [pipe.layout.stage(rank, chunk) for chunk in range(pipe.chunks)]
        alone = by_ranks.get((rank,), [])
        taken = set[str]()

        def unit(block: int, parameters: Sequence[Parameter], ranks: tuple[int, ...]) -> Iterator[StateUnit]:
            own = tuple(each for each in parameters if each.name not in taken)
            taken.update(each.name for each in own)
            if own:
                stages = tuple(stage for stage in mine if any(stage in users[each.name] for each in own))
                yield StateUnit(stages, block, own, ranks)

        for stage in mine:
            for block in pipe.blocks(stage, len(self.paths)):
                yield from unit(block, [each for each in alone if each.name in self._inside[block]], (rank,))
        for stage in mine:
            yield from unit(-1, [each for each in alone if stage in users[each.name]], (rank,))
        for ranks in sorted(ranks for ranks in by_ranks if len(ranks) > 1 and rank in ranks):
            yield from unit(-1, by_ranks[ranks], ranks)

    def _count_trained(self, segments: range) -> int:
        return sum(
            each.numel
            for each in self.profile.parameters
            if each.trainable and any(segment in segments for segment in self._segments[each.name])
        )


def _inside(parameters: Sequence[Parameter], paths: Sequence[str]) -> list[set[str]]:
    """Of every path the names of the parameters that lie in it, by any of their names."""
    inside: dict[str, set[str]] = {path: set() for path in paths}
    for parameter in parameters:
        for name in (parameter.name, *parameter.also):
            for end, character in enumerate(name):
                if character == "." and name[:end] in inside:
                    inside[name[:end]].add(parameter.name)
    return [inside[path] for path in paths]


def _usual(groups: Groups) -> dict[str, tuple[int, ...]]:
    """For profiles that do not say where parameters are used: blocks use their own, the embedding what is registered
    before the first block, the head what comes after it and what is tied."""
    users: dict[str, tuple[int, ...]] = {}
    for index, block in enumerate(groups.blocks):
        users |= {each.name: (index + 1,) for each in block}
    for segment, parameters in zip((0, len(groups.blocks) + 1), groups.root_by_use, strict=True):
        for each in parameters:
            users[each.name] = (*users.get(each.name, ()), segment)
    return users
