"""The lanes of a step: compute beside communication, in the fixed order in which the engines issue them.

[Note: lanes]
Three lanes run side by side: compute; collectives over `dp_shard` (gathers and reduce-scatters share a communicator and
run in the order in which they are issued); all-reduces over `dp_replicate`. Where both axes span the same slowest
level they share its links, and so a lane. The order of each lane is fixed, so that more bandwidth or less work never
makes a step slower. In forward a block's gather is issued when the block before it
starts; in backward likewise, one ahead, and before the reduction of the block that runs. The input of a reduce-scatter
is reused, so a block's reduction waits for the one before it. The optimizer waits for every lane (torch 2.13,
_fsdp_param_group.py). DistributedDataParallel reduces gradients as soon as a bucket of them is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """Seconds of one parameter group, a block's or the root's, on each lane."""

    forward: float
    backward: float
    """With the recomputed forward of a checkpointed block."""
    gather: float
    again: float
    """The gather of backward."""
    copy: float
    """On the compute lane, for each gather: copying the gathered group out of the buffer."""
    hand_over: float
    """On the compute lane, for each backward: copying gradients into the reduction, or adding them up."""
    reduce: float
    """On the lane of `dp_shard`."""
    all_reduce: float
    """On the lane of `dp_replicate`, once per step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """What one step puts on the lanes."""

    blocks: Sequence[Load]
    root: Load
    """Its forward and backward are those of `embedding` and `head`."""
    embedding: tuple[float, float]
    """Forward and backward."""
    head: tuple[float, float]
    micro_batches: int
    kept: bool
    """Whether blocks stay gathered through the step."""
    waits: bool
    """Whether gradients are reduced on the last micro-batch only."""
    shared: bool = False
    """Whether `dp_replicate` shares the links, and so the lane, of `dp_shard`."""


@dataclass(slots=True)
class Lanes:
    """When each lane is free, how long compute stood still for what, and what the copies took of it."""

    compute: float = 0.0
    shard: float = 0.0
    replicate: float = 0.0
    gather_stall: float = 0.0
    reduce_stall: float = 0.0
    copies: float = 0.0

    def run(self, seconds: float) -> None:
        """Compute."""
        self.compute += seconds

    def copy(self, seconds: float) -> None:
        """Copy parameters or gradients, on the compute lane."""
        self.compute += seconds
        self.copies += seconds

    def wait_gather(self, until: float) -> None:
        """Compute stands still until a gather has ended."""
        if until > self.compute:
            self.gather_stall += until - self.compute
            self.compute = until

    def wait_reduce(self, until: float) -> None:
        """Compute stands still until a reduction has ended."""
        if until > self.compute:
            self.reduce_stall += until - self.compute
            self.compute = until

    def on_shard(self, seconds: float) -> float:
        """Issue a collective over `dp_shard` now; when it ends."""
        self.shard = max(self.shard, self.compute) + seconds if seconds else self.shard
        return self.shard

    def on_replicate(self, seconds: float, after: float, shared: bool) -> None:
        """Issue an all-reduce over `dp_replicate` of what is there at `after`."""
        if seconds and shared:
            self.shard = max(self.shard, after) + seconds
        elif seconds:
            self.replicate = max(self.replicate, after) + seconds

    def skip(self, since: Lanes, times: int) -> None:
        """Go on `times` times as from `since` to now."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + times * (getattr(self, name) - getattr(since, name)))

    def snapshot(self) -> Lanes:
        """A copy of this moment."""
        return Lanes(*(getattr(self, name) for name in self.__slots__))


_SIMULATED = 5
"""Micro-batches of a step that are simulated; the others repeat the last but one."""


def run_lanes(step: StepLoad) -> Lanes:
    """Forward and backward of all micro-batches of one step ([Note: lanes])."""
    lanes = Lanes()
    simulated = min(step.micro_batches, _SIMULATED)
    since = lanes.snapshot()
    for index in range(simulated - 1):
        since = lanes.snapshot()
        _micro_batch(lanes, step, first=index == 0, last=False)
    lanes.skip(since, times=step.micro_batches - simulated)
    _micro_batch(lanes, step, first=step.micro_batches == 1, last=True)
    lanes.wait_reduce(max(lanes.shard, lanes.replicate))
    return lanes


def least_lane_seconds(step: StepLoad) -> float:
    """What `run_lanes` is never below: the root is gathered before all compute and reduced after it, and each lane
    carries what is sent over it."""
    root, blocks = step.root, step.blocks
    forwards = 1 if step.kept else step.micro_batches
    backwards = 0 if step.kept else step.micro_batches
    reductions = 1 if step.waits else step.micro_batches
    shard = sum(forwards * group.gather + reductions * group.reduce for group in (*blocks, root))
    shard += backwards * sum(block.again for block in blocks)
    passes = sum(block.forward + block.backward for block in blocks) + sum(step.embedding) + sum(step.head)
    copies = forwards * root.copy + (forwards + backwards) * sum(block.copy for block in blocks)
    copies += step.micro_batches * sum(group.hand_over for group in (*blocks, root))
    path = forwards * root.gather + step.micro_batches * passes + copies + root.reduce + root.all_reduce
    replicate = sum(group.all_reduce for group in (*blocks, root))
    return max(path, shard + replicate if step.shared else max(shard, replicate))


def _micro_batch(lanes: Lanes, step: StepLoad, *, first: bool, last: bool) -> None:
    _forward(lanes, step, gathers=first or not step.kept)
    _backward(lanes, step, gathers=not step.kept, reduces=last or not step.waits, all_reduces=last)


def _forward(lanes: Lanes, step: StepLoad, *, gathers: bool) -> None:
    if gathers:
        lanes.wait_gather(lanes.on_shard(step.root.gather))
        lanes.copy(step.root.copy)
    ready = lanes.on_shard(step.blocks[0].gather) if gathers and step.blocks else 0.0
    lanes.run(step.embedding[0])
    for index, block in enumerate(step.blocks):
        if gathers:
            lanes.wait_gather(ready)
            ready = lanes.on_shard(step.blocks[index + 1].gather) if index + 1 < len(step.blocks) else 0.0
            lanes.copy(block.copy)
        lanes.run(block.forward)
    lanes.run(step.head[0])


def _backward(lanes: Lanes, step: StepLoad, *, gathers: bool, reduces: bool, all_reduces: bool) -> None:
    ready = lanes.on_shard(step.blocks[-1].again) if gathers and step.blocks else 0.0
    lanes.run(step.head[1])
    reduced = 0.0
    for index in range(len(step.blocks) - 1, -1, -1):
        block = step.blocks[index]
        if gathers:
            lanes.wait_gather(ready)
            ready = lanes.on_shard(step.blocks[index - 1].again) if index else 0.0
            lanes.copy(block.copy)
        lanes.run(block.backward)
        reduced = _hand_over(lanes, block, reduced, reduces, all_reduces, step.shared)
    lanes.run(step.embedding[1])
    _hand_over(lanes, step.root, reduced, reduces, all_reduces, step.shared)


def _hand_over(lanes: Lanes, group: Load, reduced: float, reduces: bool, all_reduces: bool, shared: bool) -> float:
    """Add a group's gradients up or issue their reduction, once the one before has ended at `reduced`; its end."""
    if not reduces:
        lanes.copy(group.hand_over)
        return reduced
    lanes.wait_reduce(reduced)
    lanes.copy(group.hand_over)
    ended = lanes.on_shard(group.reduce) if group.reduce else lanes.compute
    if all_reduces:
        lanes.on_replicate(group.all_reduce, ended, shared)
    return ended
