"""Bytes that fully_shard holds for parameters and gradients beside the shards, at every moment of a step.

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
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from shardwright.planner.activations import Moment, MomentName
from shardwright.planner.groups import Sizes
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.space import Point


class Fsdp2Holdings:
    """[Note: what fully_shard holds], in the micro-batch of this number ([Note: micro-batches]).

    Experts have groups of their own inside those of their blocks: gathered right after them, in backward too, where
    they are prefetched by their block. `followed`: of each block the elements of its experts' group. `nested`: these
    are the experts' groups.
    """

    def __init__(
        self, point: Point, sizes: Sizes, number: int, *, followed: Sequence[int] = (), nested: bool = False
    ) -> None:
        self._point, self._sizes = point, sizes
        self._followed, self._nested = followed, nested
        self._compute = PRECISIONS[point.precision].compute_bytes
        self._first, self._last = number == 0, number == point.accumulation - 1
        self._stayed = bool(point.kept) and not self._first
        self._stays = bool(point.kept) and not self._last
        self._root = self._compute * sizes.root
        self._blocks = [self._compute * size for size in sizes.blocks]
        self._gathered = prefix(self._blocks)
        self._sharded = prefix(MASTER_BYTES * size // point.shard for size in sizes.block_gradients)
        self._whole = prefix(MASTER_BYTES * size for size in sizes.block_numels)
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
        """As `Holdings.at`."""
        if self._absent.get(moment.name):
            return None
        return self.beside(moment)

    def beside(self, moment: Moment) -> dict[str, int]:
        """The same where others have such a moment."""
        gathered, gradients, buffers = self._rules[moment.name](moment)
        return {"gathered_parameters": gathered, "gradients": gradients, "communication_buffers": buffers}

    def _second(self, blocks: int) -> int:
        """Second copies of the first so many blocks."""
        return self._gathered[blocks] // self._point.secondary if self._point.secondary else 0

    def _buffer(self, block: int) -> int:
        """The all-gather's output of a block, of the root for -1."""
        size = self._root if block < 0 else self._blocks[block]
        return size if self._point.shard > 1 else 0

    def _left(self, block: int) -> int:
        """The same where only the unit behind has let it go."""
        return 0 if block >= 0 and self._followed and self._followed[block] else self._buffer(block)

    def _prefetched(self, block: int) -> int:
        """The same in backward, while the block behind runs."""
        return 0 if self._nested or block < 0 else self._buffer(block)

    def _new(self, moment: Moment, every: int) -> int:
        """Whole gradients of the unit that runs; `every` is the number of all their elements. Those of which only the
        number is known are not counted as experts'."""
        if self._nested and moment.gradients is not None:
            return 0
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
        block, before = moment.block, self._left(moment.block - 1)
        gathered = self._forward_blocks(block) + self._buffer(block)
        if self._nested:
            gathered = max(gathered, before + (self._gathered[block] if self._point.kept else 0))
        else:
            gathered += before
        return self._root + gathered + self._second(block), self._before_backward(), 0

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
        buffer = 0 if self._stayed or moment.in_loss else self._left(len(self._blocks) - 1)
        blocks = self._gathered[-1] if self._point.kept else self._second(len(self._blocks))
        return self._root + buffer + blocks, self._before_backward(), 0

    def _head_backward(self, moment: Moment) -> tuple[int, int, int]:
        gradients = self._before_backward() + self._new(moment, self._sizes.head_numel)
        if self._point.kept:
            return self._root + self._gathered[-1], gradients, 0
        prefetched = self._prefetched(len(self._blocks) - 1) if not moment.in_loss else 0
        return self._root + prefetched + self._second(len(self._blocks)), gradients, 0

    def _backward_gather(self, moment: Moment) -> tuple[int, int, int]:
        """A block's parameters are copied out of their buffer; then it goes, and the next one is filled from a copy of
        the shard in the compute dtype, or from the second copy, which has it already."""
        block = moment.block
        prefetch = self._prefetched(block - 1)
        copied = 0 if self._point.secondary else prefetch // self._point.shard
        own = self._buffer(block) + self._second(block + 1)
        gathered = self._root + self._blocks[block] + max(own, prefetch + copied + self._second(block))
        return gathered, self._carried(block) + self._head, self._input(block + 1)

    def _block_backward(self, moment: Moment) -> tuple[int, int, int]:
        block = moment.block
        if self._point.kept:
            blocks = self._gathered[-1 if self._stays else block + 1]
        else:
            blocks = self._blocks[block] + self._prefetched(block - 1) + self._second(block)
        own = self._new(moment, self._sizes.block_numels[block])
        return self._root + blocks, self._carried(block) + self._head + own, self._input(block + 1)

    def _gradient_reduction(self, moment: Moment) -> tuple[int, int, int]:
        block = moment.block
        if self._point.kept:
            blocks = self._gathered[-1 if self._stays else block]
        else:
            blocks = self._prefetched(block - 1) + self._second(block)
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


def prefix(sizes: Iterable[int]) -> list[int]:
    """Sums of the first 0, 1, 2, ... sizes."""
    return [0, *accumulate(sizes)]
