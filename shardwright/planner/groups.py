"""The model as the engines see it: groups of parameters that are gathered and reduced together, and what runs when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from shardwright.planner.flat import PLAIN, Bucket, Chain, buckets
from shardwright.planner.sharding import own_shard, padded_numel
from shardwright.schemas.job import OptimizerSpec
from shardwright.schemas.profile import ModelProfile, Parameter

PartName = Literal["all", "dense", "experts"]
"""Parameters of a model: all, those that are no experts, those that are ([Note: states of experts] in parts.py)."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Elements of every parameter group for one shard degree; padded ones as [Note: dimension-0 shards] has them."""

    blocks: tuple[int, ...]
    """Padded elements of each block's group."""
    block_gradients: tuple[int, ...]
    """Padded elements of each block's trainable parameters."""
    block_numels: tuple[int, ...]
    """Elements of each block's trainable parameters, without padding."""
    block_largest: tuple[int, ...]
    """Elements of the largest of them."""
    block_last: tuple[int, ...]
    """Elements of the last of them, in order of registration."""
    root: int
    root_gradients: int
    head_numel: int
    """Elements of the root group's trainable parameters that the head's backward has gradients for."""
    embedding_numel: int
    """Of those that the embedding's backward has gradients for; a tied parameter counts in both."""
    root_numel: int
    root_largest: int
    root_last: int
    own: int
    """Elements of trainable parameters that shard rank 0, the fullest, owns."""
    tensors: int
    """Trainable parameters."""


class Outside(NamedTuple):
    """Elements of trainable parameters outside the blocks."""

    head_numel: int
    head_largest: int
    embedding_largest: int
    tied_numel: int
    """Of those that both head and embedding have gradients for."""


class Groups:
    """Parameter groups of a model: one for each block in order of execution, and the root's for all others."""

    def __init__(self, profile: ModelProfile) -> None:
        self.profile = profile
        self.blocks, self.root = parameter_groups(profile.parameters, profile.block_paths)
        self._parts: dict[PartName, Groups] = {"all": self}
        self._sizes: dict[int, Sizes] = {}
        self._flat: dict[tuple[int, OptimizerSpec], tuple[tuple[Bucket, ...], ...]] = {}

    def part(self, name: PartName) -> Groups:
        """As many groups, with only some of the parameters."""
        if name not in self._parts:
            own = tuple(each for each in self.profile.parameters if (each.experts > 0) == (name == "experts"))
            self._parts[name] = Groups(replace(self.profile, parameters=own))
        return self._parts[name]

    def sizes(self, degree: int) -> Sizes:
        """Elements of every group when each parameter is spread over `degree` devices."""
        if degree not in self._sizes:
            self._sizes[degree] = self._measure(degree)
        return self._sizes[degree]

    def flat(self, layout: Chain, optimizer: OptimizerSpec = PLAIN) -> tuple[tuple[Bucket, ...], ...]:
        """Flat buckets of every group, the blocks' in order and the root's last; `optimizer` says which parameters are
        of one kind."""
        names_matter = optimizer.groups or optimizer.no_decay != "auto"
        key = layout.alignment * layout.degree(layout.optimizer_states), optimizer if names_matter else PLAIN
        if key not in self._flat:
            groups = (*self.blocks, self.root)
            alike = range(len(groups)) if names_matter else self.kinds
            made = {index: buckets(groups[index], layout, optimizer) for index in dict.fromkeys(alike)}
            self._flat[key] = tuple(made[index] for index in alike)
        return self._flat[key]

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For every group, the blocks' in order and the root's last, the first group that is made like it."""
        first: dict[object, int] = {}
        made = [
            tuple((each.shape, each.trainable, each.experts > 0) for each in group)
            for group in (*self.blocks, self.root)
        ]
        return tuple(first.setdefault(shapes, index) for index, shapes in enumerate(made))

    @cached_property
    def outside(self) -> Outside:
        """The trainable parameters of the root group, by whose backward has their gradient."""
        embedding, head = self._split([parameter for parameter in self.root if parameter.trainable])
        names = {parameter.name for parameter in embedding}
        return Outside(
            head_numel=sum(parameter.numel for parameter in head),
            head_largest=max((parameter.numel for parameter in head), default=0),
            embedding_largest=max((parameter.numel for parameter in embedding), default=0),
            tied_numel=sum(parameter.numel for parameter in head if parameter.name in names),
        )

    @cached_property
    def root_by_use(self) -> tuple[list[Parameter], list[Parameter]]:
        """The root group's parameters that the embedding uses, and those that the head does; a tied one is in both."""
        return self._split(self.root)

    @cached_property
    def numel(self) -> int:
        """Elements of all parameters."""
        return self.profile.numel

    @cached_property
    def largest(self) -> int:
        """Elements of the largest group: what initialisation holds whole."""
        return max(sum(parameter.numel for parameter in group) for group in (*self.blocks, self.root))

    @cached_property
    def largest_parameter(self) -> int:
        """Elements of the largest trainable parameter."""
        return max((parameter.numel for parameter in self.profile.parameters if parameter.trainable), default=0)

    def _measure(self, degree: int) -> Sizes:
        def padded(group: Sequence[Parameter]) -> int:
            return sum(_padded(parameter.shape, degree) for parameter in group)

        def numel(group: Sequence[Parameter]) -> int:
            return sum(parameter.numel for parameter in group)

        def largest(group: Sequence[Parameter]) -> int:
            return max((parameter.numel for parameter in group), default=0)

        def last(group: Sequence[Parameter]) -> int:
            return group[-1].numel if group else 0

        trainable = [[parameter for parameter in block if parameter.trainable] for block in self.blocks]
        root = [parameter for parameter in self.root if parameter.trainable]
        everything = [parameter for parameter in self.profile.parameters if parameter.trainable]
        embedding, head = self._split(root)
        return Sizes(
            blocks=tuple(padded(block) for block in self.blocks),
            block_gradients=tuple(padded(block) for block in trainable),
            block_numels=tuple(numel(block) for block in trainable),
            block_largest=tuple(largest(block) for block in trainable),
            block_last=tuple(last(block) for block in trainable),
            root=padded(self.root),
            root_gradients=padded(root),
            head_numel=numel(head),
            embedding_numel=numel(embedding),
            root_numel=numel(root),
            root_largest=largest(root),
            root_last=last(root),
            own=sum(own_shard(parameter.shape, degree, 0) for parameter in everything),
            tensors=len(everything),
        )

    def _split(self, root: Sequence[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
        """Root parameters by whose backward has their gradient: registered before the first block, the embedding's;
        after it, the head's; tied under several names, both. Without blocks all are the head's."""
        if not self.blocks:
            return [], list(root)
        order = {parameter.name: index for index, parameter in enumerate(self.profile.parameters)}
        first = min((order[parameter.name] for block in self.blocks for parameter in block), default=len(order))
        early = [parameter for parameter in root if order[parameter.name] < first]
        late = [parameter for parameter in root if order[parameter.name] > first]
        return early, late + [parameter for parameter in early if parameter.also]


def parameter_groups(
    parameters: Sequence[Parameter], block_paths: Sequence[str]
) -> tuple[tuple[tuple[Parameter, ...], ...], tuple[Parameter, ...]]:
    """The groups that `fully_shard` on each block and then on the model makes: one a block in order, and the root's."""
    blocks: dict[str, list[Parameter]] = {path: [] for path in block_paths}
    root: list[Parameter] = []
    for parameter in parameters:
        parts = parameter.name.split(".")
        owner = next((path for path in (".".join(parts[:end]) for end in range(len(parts))) if path in blocks), None)
        (root if owner is None else blocks[owner]).append(parameter)
    return tuple(tuple(group) for group in blocks.values()), tuple(root)


@lru_cache(maxsize=4096)
def _padded(shape: tuple[int, ...], degree: int) -> int:
    return padded_numel(shape, degree)
