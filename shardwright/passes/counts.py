"""Integers of modules that count what tensor parallelism divides.

A module that views its features as heads, or splits a fused projection, often keeps the number of heads or the size of
a part as an integer attribute, and each process has its share of it. The candidates are attributes whose value is the
size of a divided dimension that an operator of the module states (`view`, `split`, `zeros`); which of them matter is
found out by running the model in its local form with ever more of them divided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

from torch import fx, nn

from shardwright.passes.axes import innermost, size_of
from shardwright.passes.axis_walk import tensors_of
from shardwright.passes.blocks import NUMBERING
from shardwright.passes.dataflow import Dataflow, operator_name_of
from shardwright.passes.graph import Exported
from shardwright.passes.kernels import AttentionCall
from shardwright.passes.layers import is_conv1d
from shardwright.passes.styles import Styles
from shardwright.passes.trial import Ran

Counts = Mapping[str, tuple[str, ...]]
"""Paths of modules to the names of their attributes."""
Key = tuple[str, str]
"""A module's class, and the name of an attribute."""
MOST_CANDIDATES = 7
_STATING_NAMES = (
    "view reshape _unsafe_view unflatten split split_with_sizes expand new_empty new_zeros new_ones new_full "
    "zeros ones full empty slice repeat narrow"
)
_STATING = frozenset(_STATING_NAMES.split())


class Candidates:
    """Attributes that might count what is divided."""

    def __init__(self, model: nn.Module, exported: Exported, flow: Dataflow, styles: Styles) -> None:
        self.model, self.exported, self.flow, self.styles = model, exported, flow, styles
        self.axes = frozenset().union(*(group.axes for group in flow.analysis.groups))
        self.places: dict[Key, set[str]] = {}
        for node in flow.nodes:
            if operator_name_of(node) in _STATING:
                sizes = set(self._sizes(node))
                for path in self._own(flow.stack(node)) if sizes else ():
                    self._note(exported.path(path), sizes)
        for path in styles.by_path:
            if is_conv1d(model.get_submodule(path)) and styles.by_path[path].style == "column":
                self.places.setdefault((type(model.get_submodule(path)).__qualname__, "nf"), set()).add(path)

    def _own(self, stack: Sequence[str]) -> Sequence[str]:
        """Of the modules that call a node, the block and those inside of it."""
        at = next((at for at, path in enumerate(stack) if path in self.exported.blocks), None)
        return stack[1 if at is None and not self.exported.blocks else len(stack) if at is None else at :]

    def _sizes(self, node: fx.Node) -> Iterator[int]:
        """Sizes of the divided dimensions of an operator's operands and results."""
        for each in (node, *self.flow.takes[node], *self.flow.users[node]):
            for dims in tensors_of(self.flow.analysis.found.dims.get(each)):
                for axes in dims:
                    if self.axes & {*innermost(axes)} or (not self.axes and each in self.styles.divided):
                        yield size_of(axes)

    def _note(self, path: str, sizes: set[int]) -> None:
        module = self.model.get_submodule(path)
        style = self.styles.by_path.get(path)
        if is_conv1d(module) and (style is None or style.style != "column"):
            return
        for name, value in vars(module).items():
            plain = type(value) is int and value > 1 and not name.startswith("_")
            if plain and value in sizes and name not in NUMBERING:
                self.places.setdefault((type(module).__qualname__, name), set()).add(path)

    def sets(self) -> Iterator[tuple[Key, ...]]:
        """Sets of candidates to divide, those with the fewest first."""
        fixed = tuple(key for key in self.places if key[1] == "nf" and key[0].endswith("Conv1D"))
        free = sorted((key for key in self.places if key not in fixed), key=_unlikely)[:MOST_CANDIDATES]
        for number in range(len(free) + 1):
            for chosen in combinations(free, number):
                yield *fixed, *chosen

    def counts(self, keys: Iterable[Key]) -> Counts:
        """The attributes of each module."""
        found: dict[str, list[str]] = {}
        for key in keys:
            for path in sorted(self.places[key]):
                found.setdefault(path, []).append(key[1])
        return {path: tuple(names) for path, names in found.items()}


def _unlikely(key: Key) -> tuple[bool, bool, str, str]:
    """Names that say heads or sizes of splits come first."""
    name = key[1].lower()
    return "head" not in name, "split" not in name, *key


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of one run."""

    fused: frozenset[tuple[tuple[int, ...], tuple[int, ...]]]
    """Shapes of queries and keys."""
    softmax: tuple[tuple[int, ...], ...]
    """Shapes of the scores of modules that take the softmax themselves."""

    @classmethod
    def of(cls, calls: Sequence[AttentionCall], ran: Sequence[Ran], modules: Collection[str]) -> Attention:
        """`modules` are those whose own softmax is divided."""
        own = [each.shapes[0] for each in ran if each.operator == "_softmax" and each.module in modules]
        return cls(frozenset((call.query, call.key) for call in calls), tuple(own))


def wrong_heads(whole: Attention, local: Attention, degree: int, *, all_divided: bool) -> str:
    """Why attention in the local form is not that of some of the heads: a view that states the number of all heads
    divides the features of each instead. Empty if it is."""
    expected = {(_with_heads(query, degree), _with_heads(key, degree)) for query, key in whole.fused}
    if not all_divided:
        expected |= whole.fused
    for query, key in sorted(local.fused - expected):
        return f"attention runs with queries {query} and keys {key} instead of {sorted(expected)[0]}"
    if len(whole.softmax) != len(local.softmax):
        return "attention runs otherwise than in the whole model"
    for theirs, mine in zip(whole.softmax, local.softmax, strict=True):
        if prod(mine) * degree != prod(theirs) or mine[-1] != theirs[-1]:
            return f"the scores of attention have shape {mine}, all heads' have {theirs}"
    return ""


def _with_heads(shape: tuple[int, ...], degree: int) -> tuple[int, ...]:
    """The shape (..., heads, length, features) of one process's heads."""
    return (*shape[:-3], max(1, shape[-3] // degree), *shape[-2:])
