"""Peak memory of an emitted script of engine `amsp`, phase by phase, as PyTorch's memory tracker counts it.

As in oracle.py, the script runs as it was emitted, through the emitted runtime, as rank 0 on fake tensors and a fake
process group. It is tracked from when the first unit is handed over. The second of two steps is compared: in it the
optimizer's states exist, and the new values of the first are on their way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves

from shardwright.passes.fake import fake_mode
from shardwright.passes.kernels import kernels_of
from shardwright.schemas.plan import Plan
from support.oracle import Tracked, emitted_script, empty_batch, fake_process_group


class Kind(StrEnum):
    """What a storage holds. What moves gradients or new values counts as activations, as gradients do: the tracker
    cannot tell a gradient that autograd has made from any other temporary."""

    PARAMETERS = "parameters"
    GATHERED = "gathered_parameters"
    OPTIMIZER_STATES = "optimizer_states"
    ACTIVATIONS = "activations"
    INPUTS = "inputs"
    BUFFERS = "buffers"


STEPS = 2


def track_flat(plan: Plan, folder: Path) -> dict[str, Tracked]:
    """The phases of starting up and of the second step of the script that was emitted into `folder` from `plan`."""
    decision = plan.decision
    with ExitStack() as stack:
        script = stack.enter_context(emitted_script(folder))
        stack.enter_context(fake_process_group(decision.mesh.world_size))
        sizes = tuple(axis.size for axis in decision.mesh.axes)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple(axis.name for axis in decision.mesh.axes))
        stack.enter_context(kernels_of(plan.job.cluster.device.kind, []))
        tracker = FlatTracker()
        stack.enter_context(tracker.makers())
        stack.enter_context(fake_mode())
        stack.enter_context(tracker)
        levels = script.Levels(
            mesh,
            parameters=decision.states.parameters.degree,
            gradients=decision.states.gradients.degree,
            optimizer_states=decision.states.optimizer_states.degree,
            secondary=None if decision.states.secondary is None else decision.states.secondary.degree,
            int8_gathers=decision.communication.int8_gathers,
            int4_reductions=decision.communication.int4_reductions,
        )
        with tracker.making(Kind.PARAMETERS):
            model, states = script.build_model(torch.device("cpu"), levels)
        optimizer = script.make_optimizer(states)
        tracker.watch(model, states, [model.get_submodule(path) for path in plan.model.block_paths])
        initialise = tracker.phases["initialise"]
        batches = [empty_batch(plan) for _ in range(decision.accumulation)]
        tracker.mark([value for batch in batches for value in batch.values()], Kind.INPUTS)
        for _ in range(STEPS):
            tracker.phases = {}
            _step(script, plan, model, states, optimizer, batches, tracker)
    return {"initialise": initialise} | tracker.phases


def _step(
    script: ModuleType,
    plan: Plan,
    model: nn.Module,
    states: Any,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Tensor]],
    tracker: FlatTracker,
) -> None:
    """One step as templates/engines/amsp/train.py.j2 has it, without what needs values."""
    for micro, batch in enumerate(batches):
        tracker.enter("root gather")
        summed = script.summed_loss(model, batch)
        tracker.enter("loss backward")
        states.backward(summed * 0.5, last=micro == len(batches) - 1)
        del summed
    tracker.enter("optimizer step")
    norm = states.gradient_norm()
    if plan.job.train.optimizer.clip_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(states.parameters(), script.CLIP_GRAD_NORM, norm)
    optimizer.step()
    tracker.enter("publication")
    states.publish()


class FlatTracker(MemTracker):
    """The tracker, asked for the worst moment of each phase of the planner."""

    def __init__(self) -> None:
        super().__init__()
        self._ref_class = Kind  # type: ignore[assignment]
        self.phases: dict[str, Tracked] = {}
        self._now, self._block = "building", -1
        self._making: Kind | None = None
        self._total = 0
        self._blocks: list[nn.Module] = []

    def enter(self, phase: str, block: int = -1) -> None:
        """From here on, what is alive belongs to this phase."""
        self._now, self._block = phase, block

    def mark(self, tensors: list[Tensor], kind: Kind) -> None:
        """Counts these as such from now on."""
        for tensor in tensors:
            self._update_and_maybe_create_winfos(tensor, kind)  # type: ignore[arg-type]

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """What is made inside is of this kind, unless something further inside says otherwise."""
        before, self._making = self._making, kind
        try:
            yield
        finally:
            self._making = before

    @contextmanager
    def makers(self) -> Iterator[None]:
        """Has what the runtime's buckets make counted as what it is."""
        bucket = sys.modules["shardwright_runtime.buckets"].Bucket
        before = {
            name: getattr(bucket, name) for name in ("__init__", "gather", "wait", "release", "publish", "arrive")
        }
        kinds = dict.fromkeys(("gather", "wait", "release"), Kind.GATHERED)
        kinds |= dict.fromkeys(("publish", "arrive"), Kind.ACTIVATIONS)
        for name, kind in kinds.items():
            setattr(bucket, name, self._counting(kind, before[name]))
        bucket.__init__ = self._building(before["__init__"])
        try:
            yield
        finally:
            for name, method in before.items():
                setattr(bucket, name, method)

    def _counting(self, kind: Kind, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.making(kind):
                return method(*args, **kwargs)

        return call

    def _building(self, method: Callable[..., None]) -> Callable[..., None]:
        def build(bucket: Any, *args: Any, **kwargs: Any) -> None:
            self.enter("initialise")
            method(bucket, *args, **kwargs)
            if bucket.levels.parameters:
                self.mark([bucket.whole], Kind.GATHERED)
            if bucket.dtype != torch.float32:
                self.mark([bucket.master], Kind.OPTIMIZER_STATES)

        return build

    def watch(self, model: nn.Module, states: Any, blocks: list[nn.Module]) -> None:
        """Enters the phases as the model and its states go through them."""
        self._blocks = blocks
        self.mark(list(model.buffers()), Kind.BUFFERS)
        model.register_forward_pre_hook(lambda *_: self.enter("embedding forward"))
        model.register_forward_hook(lambda _, __, output: self._at_gradient(output, "head backward", -1))
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(
                lambda _, args, k, i=index: self._before_block(i, (args, k)), with_kwargs=True
            )
            block.register_forward_hook(lambda _, __, output, i=index: self._after_block(i, output))
        wait, release, reduce = states.wait, states.release, states.reduce
        root = len(blocks)

        def waiting(unit: int, *, again: bool = False) -> None:
            if unit != root:
                self.enter("backward gather" if again else "block gather", unit)
            wait(unit, again=again)

        def releasing(unit: int, *, secondary: bool = False) -> None:
            if secondary:
                self.enter("second copy", unit)
            release(unit, secondary=secondary)

        def reducing(unit: int, *, last: bool) -> None:
            self.enter("gradient reduction" if unit != root else "root gradient reduction", unit)
            reduce(unit, last=last)

        states.wait, states.release, states.reduce = waiting, releasing, reducing

    def _before_block(self, index: int, inputs: Any) -> None:
        self.enter("block forward", index)
        if index == 0:
            self._at_gradient(inputs, "embedding backward", -1)

    def _after_block(self, index: int, output: Any) -> None:
        self._at_gradient(output, "block backward", index)
        if index == len(self._blocks) - 1:
            self.enter("head and loss")

    def _at_gradient(self, values: Any, phase: str, block: int) -> None:
        """Enters a phase when the gradient of these is known."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: self.enter(phase, block))  # type: ignore[no-untyped-call]

    def _update_peak_stats(self, peak_state: Any) -> None:
        """Looks at the bytes alive after an operator. A phase begins with its first allocation."""
        snapshot = next(iter(self._curr_mem_snap.values()))
        total, before, self._total = snapshot["Total"], self._total, snapshot["Total"]
        found = self.phases.get(self._now)
        if total > before and (found is None or total > found.total):
            sizes = {kind.value: snapshot[kind] for kind in Kind}
            self.phases[self._now] = Tracked(self._now, self._block, sizes, 0)

    def _update_snap(self, *args: Any, **kwargs: Any) -> None:
        """What goes between two operators makes room that the next one may take."""
        super()._update_snap(*args, **kwargs)
        self._total = min(self._total, sum(snapshot["Total"] for snapshot in self._curr_mem_snap.values()))

    def _track(self, reftype: Any, t: Tensor) -> None:
        made = Kind.OPTIMIZER_STATES if reftype is _MemRefType.OPT else Kind.ACTIVATIONS
        super()._track(self._making or made, t)  # type: ignore[arg-type]

    def _update_and_maybe_create_winfos(self, t: Tensor, reftype: Any, update_existing: bool = False) -> Any:
        kind = Kind.OPTIMIZER_STATES if reftype is _MemRefType.OPT else reftype
        return super()._update_and_maybe_create_winfos(t, kind, update_existing)

    def _pre_fw_hook(self, *_: Any) -> None:
        """The tracker's own statistics of each module are not asked for."""

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook
