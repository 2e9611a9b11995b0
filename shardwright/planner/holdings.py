"""Bytes that each engine holds for parameters and gradients beside the shards, at every moment of a step.

[Note: what fully_shard holds]
Read from torch 2.13 (_fsdp_param_group.py, _fsdp_collectives.py); sizes are padded ([Note: dimension-0 shards]).
- A gathered group takes its elements in the compute dtype, beside the all-gather's output buffer of the same size. In
  forward that buffer stays alive until the next group has been gathered; in backward it belongs to the group that is
  prefetched, one ahead.
- The root group is gathered from the start of a micro-batch to its end.
- A block's gradients are whole, in the compute dtype, until its backward has ended. Then they are copied into the
  float32 input of the reduce-scatter, which stays alive until the next block's are. Its output is the sharded gradient.
- Whole gradients that accumulate over micro-batches are float32.
- Over a shard group of one the parameters are copied all the same, without a gather buffer.
The later micro-batches of a step are the worst: gradients of the earlier ones are alive, and kept parameters too.

[Note: what DistributedDataParallel holds]
The buckets, from construction on. A gradient is made beside its bucket and becomes a view of it when its reduction is
due; so while micro-batches accumulate under `no_sync`, a whole second set of gradients is alive.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Protocol

from shardwright.planner.activations import Moment
from shardwright.planner.engines import ENGINES
from shardwright.planner.groups import Groups, Sizes
from shardwright.planner.precisions import MASTER_BYTES, PRECISIONS
from shardwright.planner.space import Point


class Holdings(Protocol):
    """What an engine holds at a point."""

    def at(self, moment: Moment) -> dict[str, int] | None:
        """Bytes of `gathered_parameters`, `gradients` and `communication_buffers`; None where the engine has no such
        moment."""


def holdings(point: Point, groups: Groups) -> Holdings:
    """The holdings of the point's engine. Checkpointing makes no difference to them."""
    sizes = groups.sizes(point.shard)
    return _Fsdp2(point, sizes) if ENGINES[point.engine].shards else _Replicated(point, sizes, groups)


class _Fsdp2:
    """[Note: what fully_shard holds]"""

    def __init__(self, point: Point, sizes: Sizes) -> None:
        compute = PRECISIONS[point.precision].compute_bytes
        self._point, self._sizes, self._compute = point, sizes, compute
        self._root = compute * sizes.root
        self._blocks = [compute * size for size in sizes.blocks]
        self._buffers = [size if point.shard > 1 else 0 for size in self._blocks]
        self._gathered = _prefix(self._blocks)
        self._sharded = _prefix(MASTER_BYTES * size // point.shard for size in sizes.block_gradients)
        self._head = compute * sizes.head_numel
        self._stays = bool(point.kept) and point.accumulation > 1
        self._carried = self._carried_gradients()

    def at(self, moment: Moment) -> dict[str, int]:
        rules = {
            "embedding forward": self._embedding_forward,
            "block forward": self._block_forward,
            "head and loss": self._head_forward,
            "loss backward": self._loss_backward,
            "head backward": self._head_backward,
            "block backward": self._block_backward,
            "gradient reduction": self._gradient_reduction,
            "embedding backward": self._embedding_backward,
            "root gradient reduction": self._root_reduction,
        }
        gathered, gradients, buffers = rules[moment.name](moment.block)
        return {"gathered_parameters": gathered, "gradients": gradients, "communication_buffers": buffers}

    def _carried_gradients(self) -> int:
        """Gradients of the earlier micro-batches of the step."""
        if self._point.accumulation == 1:
            return 0
        if self._point.gradients_wait:
            return MASTER_BYTES * (sum(self._sizes.block_numels) + self._sizes.root_numel)
        return self._sharded[-1] + MASTER_BYTES * self._sizes.root_gradients // self._point.shard

    def _alive(self, block: int) -> int:
        """Gradients when the backward of block `block` runs, without its own: those of the blocks after it and of the
        head in this micro-batch, and those of the earlier micro-batches."""
        after = self._carried or self._sharded[-1] - self._sharded[block + 1]
        return after + self._head

    def _input(self, block: int) -> int:
        """Input of the reduce-scatter of a block's gradients."""
        gradients = self._sizes.block_gradients
        return MASTER_BYTES * gradients[block] if block < len(gradients) else 0

    def _own(self, block: int) -> int:
        return self._compute * self._sizes.block_numels[block]

    def _embedding_forward(self, block: int) -> tuple[int, int, int]:
        buffer = self._root if self._point.shard > 1 else 0
        return self._root + buffer + (self._gathered[-1] if self._stays else 0), self._carried, 0

    def _block_forward(self, block: int) -> tuple[int, int, int]:
        if self._stays:
            blocks = self._gathered[-1]
        else:
            blocks = self._gathered[block + 1] if self._point.kept else self._blocks[block]
        return self._root + blocks + self._buffers[block], self._carried, 0

    def _head_forward(self, block: int) -> tuple[int, int, int]:
        buffer = self._buffers[-1] if self._buffers else 0
        return self._root + buffer + (self._gathered[-1] if self._point.kept else 0), self._carried, 0

    def _loss_backward(self, block: int) -> tuple[int, int, int]:
        prefetched = self._buffers[-1] if self._buffers and not self._point.kept else 0
        kept = self._gathered[-1] if self._point.kept else 0
        return self._root + prefetched + kept, self._carried, 0

    def _head_backward(self, block: int) -> tuple[int, int, int]:
        gathered, gradients, buffers = self._loss_backward(block)
        return gathered, gradients + self._head, buffers

    def _block_backward(self, block: int) -> tuple[int, int, int]:
        if self._point.kept:
            blocks = self._gathered[-1 if self._stays else block + 1]
        else:
            blocks = self._blocks[block] + (self._buffers[block - 1] if block else 0)
        return self._root + blocks, self._alive(block) + self._own(block), self._input(block + 1)

    def _gradient_reduction(self, block: int) -> tuple[int, int, int]:
        if self._point.kept:
            blocks = self._gathered[-1 if self._stays else block]
        else:
            blocks = self._buffers[block - 1] if block else 0
        whole = 0 if self._point.gradients_wait else self._own(block)
        reduced = self._input(block) // self._point.shard
        return self._root + blocks, self._alive(block) + whole, self._input(block) + reduced

    def _embedding_backward(self, block: int) -> tuple[int, int, int]:
        gradients = self._alive(-1) + self._compute * self._sizes.embedding_numel
        return self._root + (self._gathered[-1] if self._stays else 0), gradients, self._input(0)

    def _root_reduction(self, block: int) -> tuple[int, int, int]:
        whole = 0 if self._point.gradients_wait else self._compute * self._sizes.root_numel
        entering = MASTER_BYTES * self._sizes.root_gradients
        gathered = self._root + self._gathered[-1] if self._stays else 0
        return gathered, self._alive(-1) - self._head + whole, entering + entering // self._point.shard


class _Replicated:
    """`single`, and `ddp` ([Note: what DistributedDataParallel holds])."""

    def __init__(self, point: Point, sizes: Sizes, groups: Groups) -> None:
        self._blocks = _prefix(MASTER_BYTES * size for size in sizes.block_numels)
        self._head = MASTER_BYTES * sizes.head_numel
        self._everything = self._blocks[-1] + MASTER_BYTES * sizes.root_numel
        self._buckets = self._everything if point.world > 1 else 0
        self._carried = self._everything if point.accumulation > 1 else 0
        self._newest = MASTER_BYTES * groups.largest_parameter if self._buckets or self._carried else None

    def at(self, moment: Moment) -> dict[str, int] | None:
        if moment.name in ("gradient reduction", "root gradient reduction"):
            return None
        return {"gradients": self._carried + self._new(moment), "communication_buffers": self._buckets}

    def _new(self, moment: Moment) -> int:
        """Gradients made in this micro-batch: one at a time where an older one takes it in, else all so far."""
        if "backward" not in moment.name or moment.name == "loss backward":
            return 0
        if self._newest is not None:
            return self._newest
        if moment.name == "embedding backward":
            return self._everything
        return self._head + (self._blocks[-1] - self._blocks[moment.block] if moment.block >= 0 else 0)


def _prefix(sizes: Iterable[int]) -> list[int]:
    """Sums of the first 0, 1, 2, ... sizes."""
    return [0, *accumulate(sizes)]
