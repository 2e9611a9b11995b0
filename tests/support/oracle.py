"""Peak memory of an emitted script, phase by phase, as PyTorch's own FSDP memory tracker counts it.

The script's `build_model`, `make_optimizer` and `summed_loss` run as they were emitted, through the emitted runtime, on
fake tensors and a fake process group: rank 0 of any world, without memory and without a network. Only three things are
not the script's: `initialize` gives parameters memory without values (the real one looks for NaN, and a fake tensor has
no values), the batch is empty, and the optimizer has taken one step before the one that is tracked, so that its states
exist. CUDA's kernels are stated, not chosen, as they are for the profile (`shardwright.passes.kernels`).

`torch.distributed._tools.fsdp2_mem_tracker.FSDPMemTracker` follows every storage from the operator that makes it until
nobody holds it. DTensor's sharding propagation computes layouts on fake tensors of the whole shape; it borrows the
active fake mode for that, and the tracker would count them as memory, so it gets a mode of its own here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardwright.backends.pytorch.engines import micro_batch_flags
from shardwright.passes.fake import fake_mode
from shardwright.passes.kernels import kernels_of
from shardwright.schemas.plan import Plan

VERIFIED = "2.13"
"""The version of torch on which the private names below were read and run."""

try:
    import torch.distributed.fsdp._fully_shard._fully_shard as fully_sharding
    import torch.distributed.tensor._sharding_prop as sharding_propagation
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
    from torch.distributed.fsdp import FSDPModule
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _dtensor_fake_mode = sharding_propagation.detect_fake_mode
    _second_mesh = fully_sharding._get_post_forward_mesh_info
    for _name in (
        "_fsdp_state_pre_forward",
        "_fsdp_state_post_forward",
        "_fsdp_param_group_pre_backward",
        "_fsdp_param_group_post_backward",
        "_instrument_fsdp_module",
        "_track",
        "_update_peak_stats",
        "_update_and_maybe_create_winfos",
    ):
        getattr(FSDPMemTracker, _name)
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"the memory oracle uses private names of torch, read on {VERIFIED}; torch {torch.__version__} lacks one of "
        f"them: {error}. Find their successors in torch/distributed/_tools and torch/distributed/tensor"
    ) from error

CATEGORIES = {
    "Sharded Param": "parameters",
    "Unsharded Param": "gathered_parameters",
    "All Gather": "gathered_parameters",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Reduce Scatter": "communication_buffers",
    "OptState": "optimizer_states",
    "Activation": "activations",
    "Temp": "activations",
    "Inputs": "inputs",
    "Buffer": "buffers",
}
"""The tracker's categories as ours. What it calls temporary in backward are gradients of activations, and parameter
gradients until autograd has handed them to the parameter."""


@dataclass(frozen=True)
class Tracked:
    """Bytes alive at the worst moment of one phase of a step, by category."""

    name: str
    block: int
    """Index of the block that runs; -1 elsewhere."""
    bytes: dict[str, int]
    time: int
    """Storages made before it."""

    @property
    def total(self) -> int:
        """All categories together."""
        return sum(self.bytes.values())


def track(plan: Plan, folder: Path) -> dict[str, Tracked]:
    """The phases of one step of the script that was emitted into `folder` from `plan`, an fsdp2 one, on rank 0."""
    decision = plan.decision
    mode = fake_mode()
    with ExitStack() as stack:
        script = stack.enter_context(emitted_script(folder))
        stack.enter_context(fake_process_group(decision.mesh.world_size))
        stack.enter_context(_dtensor_fakes_apart())
        stack.enter_context(_meshes_apart())
        sizes = tuple(axis.size for axis in decision.mesh.axes)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple(axis.name for axis in decision.mesh.axes))
        stack.enter_context(kernels_of(plan.job.cluster.device.kind, []))
        stack.enter_context(mode)
        device = torch.device("cpu")
        model = script.build_model(device, mesh) if plan.model.init == "modules" else script.build_model(mesh)
        optimizer = script.make_optimizer(model)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        batches = [empty_batch(plan) for _ in range(decision.accumulation)]
        tracker = PhaseTracker(model, optimizer, plan.model.block_paths, second=decision.states.secondary is not None)
        tracker.track_inputs(tuple(batches))
        with tracker:
            _step(script, plan, model, optimizer, batches, tracker)
    return tracker.phases


def empty_batch(plan: Plan) -> dict[str, Tensor]:
    shape = (plan.decision.micro_batch, plan.job.train.sequence_length)
    return {name: torch.empty(shape, dtype=torch.int64) for name in ("input_ids", "targets")}


def _step(
    script: ModuleType,
    plan: Plan,
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Tensor]],
    tracker: PhaseTracker,
) -> None:
    """One step as templates/engines/fsdp2/train.py.j2 has it, without what needs values."""
    gradients = sys.modules["shardwright_runtime.gradients"]
    for micro, batch in enumerate(batches):
        for flag in micro_batch_flags(plan.decision):
            getattr(model, flag.call)(micro == len(batches) - 1)
        tracker.enter("embedding forward")
        summed = script.summed_loss(model, batch)
        tracker.enter("loss backward")
        torch.autograd.backward(summed * 0.5)
        del summed
        tracker.reset_mod_stats()
    tracker.enter("optimizer step")
    norm = gradients.gradient_norm(model.parameters())
    if plan.job.train.optimizer.clip_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), script.CLIP_GRAD_NORM, norm)
    optimizer.step()
    optimizer.zero_grad()


class PhaseTracker(FSDPMemTracker):
    """The tracker, asked for the worst moment of each phase of the planner instead of one for each module."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, block_paths: tuple[str, ...], *, second: bool
    ) -> None:
        super().__init__(model, optimizer)
        self._second = second
        self.phases: dict[str, Tracked] = {}
        self._now, self._block = "embedding forward", -1
        self._model = model
        self._blocks = [model.get_submodule(path) for path in block_paths]
        self._marked: set[int] = set()
        self._made_by_fsdp: _FSDPRefType | None = None
        self._time = self._total = 0
        self._born: dict[int, int] = {}

    def enter(self, phase: str, block: int = -1) -> None:
        """From here on, what is alive belongs to this phase."""
        self._now, self._block = phase, block

    def _update_peak_stats(self, peak_state: Any) -> None:
        """Looks at the bytes alive after an operator. A phase begins with its first allocation."""
        snapshot = next(iter(self._curr_mem_snap.values()))
        total, before, self._total = snapshot["Total"], self._total, snapshot["Total"]
        found = self.phases.get(self._now)
        if total > before and (found is None or total > found.total):
            sums = dict.fromkeys(CATEGORIES.values(), 0)
            for kind in _FSDPRefType:
                sums[CATEGORIES[kind.value]] += snapshot[kind]
            self.phases[self._now] = Tracked(self._now, self._block, sums, self._time)

    def _track(self, reftype: Any, t: Tensor) -> None:
        new = t.untyped_storage() not in self._WINFO
        super()._track(self._made_by_fsdp or reftype, t)
        if new:
            self._time += 1
            self._born[id(self._WINFO[t.untyped_storage()][0])] = self._time

    def _counting_as(self, kind: _FSDPRefType, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, what it makes counted as this kind from the beginning."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self._made_by_fsdp = self._made_by_fsdp, kind
            try:
                return function(*args, **kwargs)
            finally:
                self._made_by_fsdp = before

        return call

    def _instrument_fsdp_module(self) -> None:
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                group = module._get_fsdp_state()._fsdp_param_group
                for name in ("unshard", "wait_for_unshard", "reshard"):
                    setattr(group, name, self._counting_as(_FSDPRefType.UNSHARDED_PARAM, getattr(group, name)))
                group.post_backward = self._counting_as(_FSDPRefType.REDUCE_SCATTER, group.post_backward)
        super()._instrument_fsdp_module()

    def _fsdp_state_pre_forward(self, fsdp_mod: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        hook = super()._fsdp_state_pre_forward(fsdp_mod, original)
        block = self._index(fsdp_mod)

        def pre_forward(*args: Any, **kwargs: Any) -> Any:
            if block >= 0 and not self._mod_tracker.is_bw:
                self.enter("block gather", block)
            result = hook(*args, **kwargs)
            if block >= 0 and not self._mod_tracker.is_bw:
                self.enter("block forward", block)
            self._mark_gradients(fsdp_mod)
            return result

        return pre_forward

    def _fsdp_state_post_forward(self, fsdp_mod: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        hook = super()._fsdp_state_post_forward(fsdp_mod, original)
        last = len(self._blocks) - 1

        def post_forward(*args: Any, **kwargs: Any) -> Any:
            if self._second and self._index(fsdp_mod) >= 0 and not self._mod_tracker.is_bw:
                self.enter("second copy", self._index(fsdp_mod))
            result = hook(*args, **kwargs)
            if self._index(fsdp_mod) == last and not self._mod_tracker.is_bw:
                self.enter("head and loss")
            return result

        return post_forward

    def _fsdp_param_group_pre_backward(self, fsdp_mod: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        hook = super()._fsdp_param_group_pre_backward(fsdp_mod, original)
        block = self._index(fsdp_mod)

        def pre_backward(*args: Any, **kwargs: Any) -> None:
            self.enter("backward gather" if block >= 0 else "head backward", block)
            hook(*args, **kwargs)
            if block >= 0:
                self.enter("block backward", block)

        return pre_backward

    def _fsdp_param_group_post_backward(self, fsdp_mod: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        """Not the tracker's own wrapper: a variable of that one keeps the group's last gradient alive meanwhile."""
        block = self._index(fsdp_mod)

        def post_backward(*args: Any, **kwargs: Any) -> None:
            self.enter("gradient reduction" if block >= 0 else "root gradient reduction", block)
            original(*args, **kwargs)
            self._mark_handed_over(fsdp_mod)
            if block == 0:
                self.enter("embedding backward")

        return post_backward

    def _index(self, module: nn.Module) -> int:
        return next((index for index, block in enumerate(self._blocks) if block is module), -1)

    def _mark_gradients(self, module: nn.Module) -> None:
        """Has the gradients of a group, gathered for the first time, counted as such as soon as they are there."""
        for held in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
            parameter = held.unsharded_param
            if parameter.requires_grad and id(parameter) not in self._marked:
                self._marked.add(id(parameter))
                parameter.register_post_accumulate_grad_hook(self._mark)

    def _mark(self, parameter: Tensor) -> None:
        """Counts a gradient that a parameter has received, from the moment when it was made."""
        (info,) = self._update_and_maybe_create_winfos(parameter.grad, _FSDPRefType.UNSHARDED_GRAD)
        found = self.phases.get(self._now)
        if found is not None and self._born[id(info)] <= found.time:
            found.bytes["activations"] -= info.mem_consumed
            found.bytes["gradients"] += info.mem_consumed

    def _mark_handed_over(self, module: nn.Module) -> None:
        """Counts what a reduction has made, or what waits for a later micro-batch, as gradients."""
        group = module._get_fsdp_state()._fsdp_param_group
        kinds = [(held.sharded_param.grad, _FSDPRefType.SHARDED_GRAD) for held in group.fsdp_params]
        kinds += [(held.unsharded_accumulated_grad, _FSDPRefType.UNSHARDED_GRAD) for held in group.fsdp_params]
        for gradient, kind in [*kinds, (group._partial_reduce_output, _FSDPRefType.SHARDED_GRAD)]:
            if gradient is not None:
                self._update_and_maybe_create_winfos(gradient, kind)


@contextmanager
def fake_process_group(world: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _dtensor_fakes_apart() -> Iterator[None]:
    sharding_propagation.detect_fake_mode = lambda *_: None
    try:
        yield
    finally:
        sharding_propagation.detect_fake_mode = _dtensor_fake_mode


@contextmanager
def _meshes_apart() -> Iterator[None]:
    """The mesh of a second copy, which fully_shard makes itself, is read as numbers."""

    def second_mesh(*args: Any) -> Any:
        with unset_fake_temporarily():
            return _second_mesh(*args)

    fully_sharding._get_post_forward_mesh_info = second_mesh
    try:
        yield
    finally:
        fully_sharding._get_post_forward_mesh_info = _second_mesh


@contextmanager
def emitted_script(folder: Path) -> Iterator[ModuleType]:
    """The emitted train.py as a module, its runtime importable, `initialize` without values."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("tracked_train", folder / "train.py")
        assert spec is not None
        assert spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        if hasattr(script, "initialize"):
            script.initialize = _materialize  # type: ignore[attr-defined]
        yield script
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "shardwright_runtime" or not _installed(name):
                del sys.modules[name]


def _installed(name: str) -> bool:
    """Whether a module is not one of the folder's own."""
    return "site-packages" in (getattr(sys.modules[name], "__file__", None) or "site-packages")


def _materialize(model: nn.Module, path: str, *, seed: int, device: torch.device) -> None:
    """`initialize` of the emitted runtime, without values."""
    runtime = sys.modules["shardwright_runtime.initialize"]
    unit = model.get_submodule(path)
    runtime._materialize(model, {parameter for parameter in unit.parameters() if parameter.is_meta}, device)
    for module in unit.modules():
        runtime._move_buffers(module, device)
