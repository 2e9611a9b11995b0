"""Bytes that `ShardedStates` holds beside the states at rest, at every moment of a step.

[Note: what ShardedStates holds]
Read from the runtime (hooks.py, states.py, buckets.py) and checked against PyTorch's memory tracker
(docs/memory-oracle.md). All buffers are padded ([Note: flat buckets]).
- Parameters are gathered whole in the compute dtype. As many units are on their way ahead of the one that runs as the
  gather has hops, each a hop further than the one behind it. A hop holds what it reads, unless that is at rest, and
  what it writes. The root is whole from the start of a micro-batch to its end. A second copy is cut out of a block's
  whole parameters before they are freed, and goes when they are whole again.
- The first gradient of a unit makes its float32 buffer, whole; the others are added to it, one after the other. The
  root's is there from the head's backward on. The first block stays whole, and its gradients unreduced, until the
  embedding's backward has ended.
- The reduction of a block begins when the backward of the one before it does ([Note: what a chain holds]).
- After the optimizer's step all units are sent off to level p. Until the first forward needs them they hold the new
  values in the compute dtype at level o, and what their hops write before the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TypeAlias

from shardwright.planner.activations import Moment, MomentName
from shardwright.planner.flat import Chain, trained_elements
from shardwright.planner.flat_chains import FlatGathers, FlatGradients, FlatPublishing
from shardwright.planner.groups import Groups
from shardwright.planner.precisions import PRECISIONS
from shardwright.planner.space import Point

Held: TypeAlias = tuple[int, int, int]
"""Bytes gathered, of gradients, and of buffers under way."""


class FlatHoldings:
    """[Note: what ShardedStates holds], in the micro-batch of this number ([Note: micro-batches]).

    `largest`: of each block the elements of its largest gradient. `ahead_of`: the layout that says how many units are
    on their way at once, where it is that of others.
    """

    def __init__(
        self,
        point: Point,
        groups: Groups,
        number: int,
        *,
        largest: Sequence[int] | None = None,
        ahead_of: Chain | None = None,
    ) -> None:
        self._layout = layout = point.chain
        self._ahead_of = ahead_of or layout
        self._sharded = layout.parameters > 0
        self._compute = PRECISIONS[point.precision].compute_bytes
        self._first, self._kept = number == 0, bool(point.kept)
        self._stayed = self._kept and not self._first
        self._stays = self._kept and number < point.accumulation - 1
        units = groups.flat(layout)
        self._count = len(units) - 1
        self._whole = [self._compute * sum(bucket.padded for bucket in unit) for unit in units]
        self._root = self._whole[-1] if self._sharded else 0
        self._sums = [0, *accumulate(self._whole[:-1])]
        trained = [trained_elements(unit) for unit in units]
        self._forward_gathers = FlatGathers(layout, layout.parameters, self._compute, point.int8_gathers)
        self._backward_gathers = FlatGathers(layout, layout.secondary, self._compute, point.int8_gathers)
        self._gradients = FlatGradients(
            layout, trained, point.int4_reductions, number=number, last=number == point.accumulation - 1
        )
        self._publishing = FlatPublishing(layout, trained, self._compute)
        self._outside = groups.outside
        self._largest = groups.sizes(1).block_largest if largest is None else largest
        self._absent = frozenset(self._without())

    def at(self, moment: Moment) -> dict[str, int] | None:
        """As `Holdings.at`."""
        return None if moment.name in self._absent else self.beside(moment)

    def beside(self, moment: Moment) -> dict[str, int]:
        """The same where others have such a moment."""
        gathered, gradients, buffers = _RULES[moment.name](self, moment)
        return {"gathered_parameters": gathered, "gradients": gradients, "communication_buffers": buffers}

    def _without(self) -> Iterator[MomentName]:
        """Moments that do not come, or hold nothing new."""
        gathers = self._forward_gathers.packs and not self._stayed
        if not gathers and not (self._gradients.packs and not self._first):
            yield "block gather"  # its bytes are those of the forward before
        if not self._sharded or self._stayed:
            yield "root gather"
        if not self._sharded or self._kept:
            yield "backward gather"
        if self._kept or self._layout.secondary == self._layout.parameters:
            yield "second copy"
        if not self._gradients.reduces:
            yield from ("gradient reduction", "root gradient reduction")

    # --- parameters -------------------------------------------------------------------------------------------------

    def _ahead(self, block: int, packing: bool = False) -> int:
        """Blocks on their way while a block, or for -1 what comes before the first, runs forward; `packing`: the most
        that one of them takes to be sent on."""
        level, ahead = (0, 0) if self._stayed else (self._layout.parameters, self._ahead_of.parameters)
        units = range(block + 1, min(block + 1 + ahead, self._count))
        hops = {unit: min(level, ahead - place) for place, unit in enumerate(units)}
        return self._under_way(self._forward_gathers, hops, packing)

    def _below(self, unit: int, nearest: int = 1, packing: bool = False) -> int:
        """The same while a unit runs backward, from the `nearest` block before it on."""
        level, ahead = (0, 0) if self._kept else (self._layout.secondary, self._ahead_of.secondary)
        places = range(nearest, min(ahead, unit) + 1)
        hops = {unit - place: min(level, min(self._count - unit, ahead - place) + 1) for place in places}
        return self._under_way(self._backward_gathers, hops, packing)

    def _under_way(self, gathers: FlatGathers, hops: Mapping[int, int], packing: bool) -> int:
        if packing:
            return max((gathers.packing(self._whole[unit], count) for unit, count in hops.items()), default=0)
        return sum(gathers.held(self._whole[unit], count) for unit, count in hops.items())

    def _second(self, blocks: int) -> int:
        """Second copies of the first so many blocks."""
        if self._kept or self._layout.secondary == self._layout.parameters:
            return 0
        return self._sums[blocks] // self._layout.degree(self._layout.secondary)

    def _blocks_forward(self, block: int) -> int:
        """Whole blocks while one runs forward, or for -1 what comes before the first."""
        if not self._sharded or self._kept:
            blocks = self._count if self._stayed else block + 1
            return self._sums[blocks] if self._sharded else 0
        return self._whole[block] if block >= 0 else 0

    def _blocks_backward(self, block: int) -> int:
        """Whole blocks while one runs backward, or for -1 what comes after the last."""
        if not self._sharded or self._kept:
            blocks = self._count if self._stays else block + 1
            return self._sums[blocks] if self._sharded else 0
        return self._whole[block] if block >= 0 else 0

    # --- forward ----------------------------------------------------------------------------------------------------

    def _forward(self, block: int, gathered: int) -> Held:
        """New values have arrived for the units that have been asked for by now."""
        arrived = min(block + 1 + self._ahead_of.parameters, self._count)
        gradients, buffers = self._gradients.left(block + 1)
        return gathered, gradients, self._publishing.behind(arrived) if self._first else buffers

    def _root_gather(self, moment: Moment) -> Held:
        whole, level = self._whole[-1], self._layout.parameters
        packing = max(self._forward_gathers.arrival(whole), self._ahead(-1, packing=True))
        return self._forward(-1, self._forward_gathers.held(whole, level) + self._ahead(-1) + packing)

    def _block_gather(self, moment: Moment) -> Held:
        """Where fewer bits travel: while the block is unpacked, or other blocks or reductions that are left over are
        packed or unpacked."""
        block = moment.block
        arrives = asks = self._blocks_forward(block) + self._ahead(block)
        if self._sharded and not self._stayed:
            before = self._blocks_forward(block - 1) if self._kept else 0
            arrives = before + self._ahead(block - 1) + self._forward_gathers.arrival(self._whole[block])
            asks += self._ahead(block, packing=True)
        others = self._root + self._second(block)
        arriving = self._forward(block - 1, others + max(arrives, asks))
        return max(arriving, (others + asks, *self._gradients.going_on(block)), key=sum)

    def _embedding_forward(self, moment: Moment) -> Held:
        return self._forward(-1, self._root + self._blocks_forward(-1) + self._ahead(-1))

    def _block_forward(self, moment: Moment) -> Held:
        block = moment.block
        gathered = self._root + self._blocks_forward(block) + self._ahead(block)
        return self._forward(block, gathered + self._second(block))

    def _second_copy(self, moment: Moment) -> Held:
        block = moment.block
        gathered = self._root + self._blocks_forward(block) + self._ahead(block)
        return self._forward(block, gathered + self._second(block + 1))

    def _head_forward(self, moment: Moment) -> Held:
        last = self._count - 1
        blocks = self._blocks_forward(last) if self._kept else 0
        return self._forward(last, self._root + blocks + self._second(self._count))

    # --- backward ---------------------------------------------------------------------------------------------------

    def _new(self, unit: int, made: int | None, largest: int, early: int = 0) -> int:
        """A unit's own gradients when so many elements of them have been made, None for all: its buffer, but for the
        first `early` ones that do not go there yet, and the newest gradient in the compute dtype."""
        if made == 0:
            return 0
        buffer = self._gradients.fresh(unit) if made is None or made > early else 0
        return buffer + self._compute * (largest if made is None else min(made, largest))

    def _after_head(self) -> int:
        """The root's buffer, and gradients of tied parameters, which autograd holds until the embedding has added its
        own."""
        own = self._gradients.fresh(self._count) if self._outside.head_numel > self._outside.tied_numel else 0
        return own + self._compute * self._outside.tied_numel

    def _head_backward(self, moment: Moment) -> Held:
        outside, last = self._outside, self._count - 1
        blocks = self._blocks_forward(last) if self._kept else 0
        gathered = self._root + blocks + self._below(self._count) + self._second(self._count)
        if moment.in_loss:
            gathered += self._below(self._count, packing=True)
        new = self._new(self._count, moment.gradients, outside.head_largest, outside.tied_numel)
        return gathered, self._gradients.before + new, 0

    def _backward_gather(self, moment: Moment) -> Held:
        """While the last hop of the block's own gather is under way, or when the next have been asked for."""
        block, whole = moment.block, self._whole[moment.block]
        gradients, buffers = (
            self._gradients.handed_over(block + 1) if block + 1 < self._count else (self._gradients.before, 0)
        )
        behind = self._gradients.fresh(block + 1) if block + 1 < self._count else 0
        if not self._sharded:
            return 0, gradients + behind + self._after_head(), buffers
        own = self._backward_gathers.held(whole, self._layout.secondary) + self._backward_gathers.arrival(whole)
        arrives = own + self._below(block + 1, nearest=2) + self._second(block + 1)
        asks = whole + self._below(block) + self._below(block, packing=True) + self._second(block)
        return self._root + max(arrives, asks), gradients + behind + self._after_head(), buffers

    def _backward(self, block: int) -> Held:
        """While a block runs backward, without its own gradients."""
        gradients, buffers = self._gradients.handed_over(block)
        gathered = self._root + self._blocks_backward(block) + self._below(block) + self._second(block)
        return gathered, gradients + self._after_head(), buffers

    def _block_backward(self, moment: Moment) -> Held:
        gathered, gradients, buffers = self._backward(moment.block)
        return gathered, gradients + self._new(moment.block, moment.gradients, self._largest[moment.block]), buffers

    def _gradient_reduction(self, moment: Moment) -> Held:
        """Of the first block: after the embedding's backward."""
        block = moment.block
        gradients, buffers = self._gradients.handing_over(block)
        gathered = self._root + self._blocks_backward(block - 1)
        if block == 0:
            return gathered, gradients + self._gradients.fresh(self._count), buffers
        return gathered + self._below(block - 1) + self._second(block - 1), gradients + self._after_head(), buffers

    def _embedding_backward(self, moment: Moment) -> Held:
        outside, first = self._outside, min(0, self._count - 1)
        gathered, gradients, buffers = self._backward(first)
        unreduced = self._gradients.fresh(0) if first == 0 else 0
        new = self._new(self._count, moment.gradients, outside.embedding_largest)
        before = self._after_head() if moment.gradients == 0 else self._compute * outside.tied_numel
        return gathered, gradients - self._after_head() + before + unreduced + new, buffers

    def _root_reduction(self, moment: Moment) -> Held:
        """The root is freed first."""
        gathered = self._root + self._sums[-1] if self._stays and self._sharded else 0
        return gathered, *self._gradients.all_handed_over()


_RULES: Mapping[MomentName, Callable[[FlatHoldings, Moment], Held]] = {
    "root gather": FlatHoldings._root_gather,
    "embedding forward": FlatHoldings._embedding_forward,
    "block gather": FlatHoldings._block_gather,
    "block forward": FlatHoldings._block_forward,
    "second copy": FlatHoldings._second_copy,
    "head and loss": FlatHoldings._head_forward,
    "loss backward": FlatHoldings._head_backward,
    "head backward": FlatHoldings._head_backward,
    "backward gather": FlatHoldings._backward_gather,
    "block backward": FlatHoldings._block_backward,
    "gradient reduction": FlatHoldings._gradient_reduction,
    "embedding backward": FlatHoldings._embedding_backward,
    "root gradient reduction": FlatHoldings._root_reduction,
}
