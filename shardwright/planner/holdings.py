"""Bytes that each engine holds for parameters and gradients beside the shards, at every moment of a step.

[Note: what fully_shard holds]
Read from torch 2.13 (_fsdp_param_group.py, _fsdp_collectives.py, _fsdp_state.py) and checked against its memory tracker
(docs/memory-oracle.md); sizes are padded ([Note: dimension-0 shards]).
- A gathered group takes its elements in the compute dtype, beside the all-gather's output buffer of the same size. In
  forward that buffer stays alive until the parameters of the next group have been copied out of theirs, so a block's
  gather holds two buffers; the last one goes when the model returns, before a loss outside of it. In backward it
  belongs to the group that is prefetched, one ahead, from the moment when the model's backward begins. It is filled
  from a copy of the shard in the compute dtype.
- The root group is gathered from the start of a micro-batch to its end.
- A block's gradients are whole, in the compute dtype, until its backward has ended. Then its parameters are freed and
  the gradients copied into the float32 input of the reduce-scatter, which stays alive until the next block's is made.
  Whole gradients are gone before its output, the sharded gradient, is made, but for the last of the group, which a
  variable of `foreach_reduce` still holds.
- Whole gradients that wait for a later micro-batch are float32.
- Over a shard group of one the parameters are copied all the same, without a gather buffer.
- With a number as `reshard_after_forward` a part of each parameter of a block is copied before the whole is freed, one
  parameter after the other, and goes when the block has been gathered from these parts for its backward
  (_fsdp_param.py, `to_sharded_post_forward`).

[Note: micro-batches]
Of several micro-batches of a step, the first finds no gradients and nothing gathered; in the last, kept parameters are
freed block by block and everything is reduced; in those between, all that accumulates and all that is kept is alive.

[Note: what DistributedDataParallel holds]
The buckets, from construction on. A gradient is made beside its bucket and becomes a view of it when its reduction is
due; so while micro-batches accumulate under `no_sync`, a whole second set of gradients is alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Protocol

from shardwright.planner.activations import Moment, MomentName
from shardwright.planner.engines import ENGINES
from shardwright.planner.flat_holdings import FlatHoldings
from shardwright.planner.groups import Groups, Sizes
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.space import Point


class Holdings(Protocol):
    """What an engine holds at a point in one micro-batch."""

    def at(self, moment: Moment) -> dict[str, int] | None:
        """Bytes of `gathered_parameters`, `gradients` and `communication_buffers`; None where the engine has no such
        moment."""


def holdings(point: Point, groups: Groups) -> tuple[Holdings, ...]:
    """The holdings of the point's engine in each kind of micro-batch. The micro-batch's size and checkpointing make no
    difference to them, nor do more than three micro-batches."""
    numbers = sorted({0, min(1, point.accumulation - 1), point.accumulation - 1})
    if not ENGINES[point.engine].shards:
        return (_in_micro_batch(point, groups, 0),)
    return tuple(_in_micro_batch(point, groups, number) for number in numbers)


def last_holdings(point: Point, groups: Groups) -> Holdings:
    """The holdings in the last micro-batch of a step."""
    return _in_micro_batch(point, groups, point.accumulation - 1)


def _in_micro_batch(point: Point, groups: Groups, number: int) -> Holdings:
    if ENGINES[point.engine].flat:
        return FlatHoldings(point, groups, number)
    sizes = groups.sizes(point.shard)
    return _Fsdp2(point, sizes, number) if ENGINES[point.engine].shards else _Replicated(point, sizes, groups)


class _Fsdp2:
    """[Note: what fully_shard holds], in the micro-batch of this number ([Note: micro-batches])."""

    def __init__(self, point: Point, sizes: Sizes, number: int) -> None:
        self._point, self._sizes = point, sizes
        self._compute = PRECISIONS[point.precision].compute_bytes
        self._first, self._last = number == 0, number == point.accumulation - 1
        self._stayed = bool(point.kept) and not self._first
        self._stays = bool(point.kept) and not self._last
        self._root = self._compute * sizes.root
        self._blocks = [self._compute * size for size in sizes.blocks]
        self._gathered = _prefix(self._blocks)
        self._sharded = _prefix(MASTER_BYTES * size // point.shard for size in sizes.block_gradients)
        self._whole = _prefix(MASTER_BYTES * size for size in sizes.block_numels)
        self._head = self._compute * sizes.head_numel
        self._reduces = self._last or not point.gradients_wait

        self._absent = {
            "root gather": True,
            "block gather": self._stayed,
            "second copy": point.secondary is None,
            "backward gather": bool(point.kept),
        }
        self._rules: dict[MomentName, Callable[[Moment], tuple[int, int, int]]] = {
            "embedding forward": self._embedding_forward,
            "block gather": self._block_gather,
            "block forward": self._block_forward,
            "second copy": self._second_copy,
            "head and loss": self._head_forward,
            "loss backward": self._head_backward,
            "head backward": self._head_backward,
            "backward gather": self._backward_gather,
            "block backward": self._block_backward,
            "gradient reduction": self._gradient_reduction,
            "embedding backward": self._embedding_backward,
            "root gradient reduction": self._root_reduction,
        }

    def at(self, moment: Moment) -> dict[str, int] | None:
        if self._absent.get(moment.name):
            return None
        gathered, gradients, buffers = self._rules[moment.name](moment)
        return {"gathered_parameters": gathered, "gradients": gradients, "communication_buffers": buffers}

    def _second(self, blocks: int) -> int:
        """Second copies of the first so many blocks."""
        return self._gathered[blocks] // self._point.secondary if self._point.secondary else 0

    def _buffer(self, block: int) -> int:
        """The all-gather's output of a block, of the root for -1."""
        size = self._root if block < 0 else self._blocks[block]
        return size if self._point.shard > 1 else 0

    def _new(self, moment: Moment, every: int) -> int:
        """Whole gradients of the unit that runs; `every` is the number of all their elements."""
        return self._compute * (every if moment.gradients is None else moment.gradients)

    def _carried(self, block: int) -> int:
        """Gradients of blocks and root, reduced or waiting, when those of the blocks after `block` have been handed
        over in this micro-batch."""
        root = MASTER_BYTES * self._sizes.root_gradients // self._point.shard
        if self._reduces and not self._point.gradients_wait:
            after = self._sharded[-1] - self._sharded[block + 1]
            return after if self._first else self._sharded[-1] + root
        if self._first:
            return self._whole[-1] - self._whole[block + 1]
        waiting = self._whole[-1] + MASTER_BYTES * self._sizes.root_numel
        if self._last:
            waiting += self._sharded[-1] - self._sharded[block + 1] - (self._whole[-1] - self._whole[block + 1])
        return waiting

    def _input(self, block: int) -> int:
        """Input of the reduce-scatter of a block's gradients."""
        gradients = self._sizes.block_gradients
        return MASTER_BYTES * gradients[block] if self._reduces and block < len(gradients) else 0

    def _handed_over(self, numel: int, largest: int, last: int, padded: int) -> tuple[int, int]:
        """What a group's gradients hold while they are copied, beside the reduce-scatter's input and what is carried
        before and after: whole gradients, and the output."""
        whole = self._compute * numel
        if not self._reduces:
            # The first are converted one after the other, later ones added to them.
            converts = MASTER_BYTES * numel + self._compute * largest if self._compute < MASTER_BYTES else whole
            return (converts if self._first else 0), 0
        if self._point.gradients_wait:
            return 0, 0  # the sum is carried
        left = self._compute * last if self._point.shard > 1 else 0
        output = MASTER_BYTES * padded // self._point.shard
        return max((whole, 0), (left, output), key=sum)

    def _embedding_forward(self, moment: Moment) -> tuple[int, int, int]:
        gathered = self._gathered[-1] if self._stayed else self._buffer(-1)
        return self._root + gathered, self._before_backward(), 0

    def _before_backward(self) -> int:
        return 0 if self._first else self._carried(len(self._blocks) - 1)

    def _forward_blocks(self, block: int) -> int:
        """Blocks that are gathered while `block` runs forward."""
        if self._stayed:
            return self._gathered[-1]
        return self._gathered[block + 1] if self._point.kept else self._blocks[block]

    def _block_gather(self, moment: Moment) -> tuple[int, int, int]:
        buffers = self._buffer(moment.block - 1) + self._buffer(moment.block)
        gathered = self._root + self._forward_blocks(moment.block) + buffers + self._second(moment.block)
        return gathered, self._before_backward(), 0

    def _block_forward(self, moment: Moment) -> tuple[int, int, int]:
        buffer = 0 if self._stayed else self._buffer(moment.block)
        gathered = self._root + self._forward_blocks(moment.block) + buffer + self._second(moment.block)
        return gathered, self._before_backward(), 0

    def _second_copy(self, moment: Moment) -> tuple[int, int, int]:
        """Of the largest parameter, at most, before the first of the whole ones has gone."""
        gathered, gradients, buffers = self._block_forward(moment)
        largest = self._compute * self._sizes.block_largest[moment.block]
        return gathered + largest // (self._point.secondary or 1), gradients, buffers

    def _head_forward(self, moment: Moment) -> tuple[int, int, int]:
        buffer = 0 if self._stayed or moment.in_loss else self._buffer(len(self._blocks) - 1)
        blocks = self._gathered[-1] if self._point.kept else self._second(len(self._blocks))
        return self._root + buffer + blocks, self._before_backward(), 0

    def _head_backward(self, moment: Moment) -> tuple[int, int, int]:
        gradients = self._before_backward() + self._new(moment, self._sizes.head_numel)
        if self._point.kept:
            return self._root + self._gathered[-1], gradients, 0
        prefetched = self._buffer(len(self._blocks) - 1) if self._blocks and not moment.in_loss else 0
        return self._root + prefetched + self._second(len(self._blocks)), gradients, 0

    def _backward_gather(self, moment: Moment) -> tuple[int, int, int]:
        """A block's parameters are copied out of their buffer; then it goes, and the next one is filled from a copy of
        the shard in the compute dtype, or from the second copy, which has it already."""
        block = moment.block
        prefetch = self._buffer(block - 1) if block else 0
        copied = 0 if self._point.secondary else prefetch // self._point.shard
        own = self._buffer(block) + self._second(block + 1)
        gathered = self._root + self._blocks[block] + max(own, prefetch + copied + self._second(block))
        return gathered, self._carried(block) + self._head, self._input(block + 1)

    def _block_backward(self, moment: Moment) -> tuple[int, int, int]:
        block = moment.block
        if self._point.kept:
            blocks = self._gathered[-1 if self._stays else block + 1]
        else:
            blocks = self._blocks[block] + (self._buffer(block - 1) if block else 0) + self._second(block)
        own = self._new(moment, self._sizes.block_numels[block])
        return self._root + blocks, self._carried(block) + self._head + own, self._input(block + 1)

    def _gradient_reduction(self, moment: Moment) -> tuple[int, int, int]:
        block = moment.block
        if self._point.kept:
            blocks = self._gathered[-1 if self._stays else block]
        else:
            blocks = (self._buffer(block - 1) if block else 0) + self._second(block)
        sizes = self._sizes
        own, output = self._handed_over(
            sizes.block_numels[block], sizes.block_largest[block], sizes.block_last[block], sizes.block_gradients[block]
        )
        return self._root + blocks, self._carried(block) + self._head + own, self._input(block) + output

    def _embedding_backward(self, moment: Moment) -> tuple[int, int, int]:
        gradients = self._carried(-1) + self._head + self._new(moment, self._sizes.embedding_numel)
        return self._root + (self._gathered[-1] if self._stays else 0), gradients, self._input(0)

    def _root_reduction(self, moment: Moment) -> tuple[int, int, int]:
        sizes = self._sizes
        own, output = self._handed_over(sizes.root_numel, sizes.root_largest, sizes.root_last, sizes.root_gradients)
        entering = MASTER_BYTES * sizes.root_gradients if self._reduces else 0
        gathered = self._root + self._gathered[-1] if self._stays else 0
        return gathered, self._carried(-1) + own, entering + output


class _Replicated:
    """`single`, and `ddp` ([Note: what DistributedDataParallel holds])."""

    def __init__(self, point: Point, sizes: Sizes, groups: Groups) -> None:
        self._sizes = sizes
        self._blocks = _prefix(MASTER_BYTES * size for size in sizes.block_numels)
        self._head = MASTER_BYTES * sizes.head_numel
        self._everything = self._blocks[-1] + MASTER_BYTES * sizes.root_numel
        self._buckets = self._everything if point.world > 1 else 0
        self._carried = self._everything if point.accumulation > 1 else 0
        self._newest = MASTER_BYTES * groups.largest_parameter if self._buckets or self._carried else None

    def at(self, moment: Moment) -> dict[str, int] | None:
        if moment.name in _SHARDED_ONLY:
            return None
        return {"gradients": self._carried + self._new(moment), "communication_buffers": self._buckets}

    def _new(self, moment: Moment) -> int:
        """Gradients made in this micro-batch: one at a time where an older one takes it in, else all so far."""
        if "backward" not in moment.name:
            return 0
        before, every = self._made(moment)
        own = every if moment.gradients is None else moment.gradients
        if self._newest is not None:
            return self._newest if own else 0
        return min(before + MASTER_BYTES * own, self._everything)

    def _made(self, moment: Moment) -> tuple[int, int]:
        """Bytes of gradients before the unit's backward, and how many elements its own are."""
        if moment.name == "block backward":
            after = self._blocks[-1] - self._blocks[moment.block + 1]
            return self._head + after, self._sizes.block_numels[moment.block]
        if moment.name == "embedding backward":
            return self._head + self._blocks[-1], self._sizes.embedding_numel
        return 0, self._sizes.head_numel


_SHARDED_ONLY: frozenset[MomentName] = frozenset(
    (
        "root gather",
        "block gather",
        "second copy",
        "backward gather",
        "gradient reduction",
        "root gradient reduction",
    )
)


def _prefix(sizes: Iterable[int]) -> list[int]:
    """Sums of the first 0, 1, 2, ... sizes."""
    return [0, *accumulate(sizes)]
