"""The whole model measured as it is: no block replaced, none shared, by other means than the passes use."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from shardwright.passes.build import build_model
from shardwright.passes.contract import make_contract
from shardwright.passes.fake import fake_mode, faked
from shardwright.passes.imports import user_code
from shardwright.passes.kernels import kernels_of
from shardwright.schemas.job import JobSpec

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * prod(q) * k[-2],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: (
        10 * prod(q) * k[-2]
    ),
}
"""What PyTorch's FLOP counter lacks: two products of queries with keys forward, five backward."""


class AliveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that somebody still holds. Tensors shaped like a parameter are
    taken for its gradient and left out in backward."""

    def __init__(self, parameters: list[torch.Tensor], others: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in (*parameters, *others)}
        shapes = [tuple(size for size in parameter.shape if size > 1) for parameter in parameters]
        self.of_gradients = {*shapes, *(shape[::-1] for shape in shapes)}
        self.in_backward = False
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in self.sizes:
                    gradient = tuple(size for size in tensor.shape if size > 1) in self.of_gradients
                    self.sizes[key] = 0 if self.in_backward and gradient else storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key)
        self.peak = max(self.peak, self.total)
        return result

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Whole:
    """What the whole model keeps for backward, the most it needs, and its FLOPs as PyTorch counts them."""

    saved: int
    forward_peak: int
    backward_peak: int
    forward_flops: int
    backward_flops: int


@contextmanager
def _changed_forwards(blocks: Sequence[torch.nn.Module], recomputed: int, dtype: torch.dtype | None) -> Iterator[None]:
    """Blocks that cast their inputs as FSDP2 does, the first ones checkpointed as an emitted script does it."""

    def cast(_: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(
            lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v, (args, kwargs)
        )

    handles = [block.register_forward_pre_hook(cast, with_kwargs=True) for block in blocks if dtype]
    for block in blocks[:recomputed]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            vars(block).pop("forward", None)


def measure_whole(
    job: JobSpec, folder: Path, block_paths: Sequence[str], recomputed: int, dtype: str, micro_batch: int
) -> Whole:
    """One micro-batch of the whole model on fake tensors, with the first blocks checkpointed."""
    cast, mode = DTYPES[dtype], fake_mode()
    with user_code(folder) as code:
        built = build_model(job.model, code)
        contract = make_contract(job, built, code)
        with faked(built.module, mode, cast, ()), mode, kernels_of(job.cluster.device.kind, code.modules()):
            batch = contract.batch(micro_batch)
            model = built.module
            parameters = list(model.parameters())
            alive = AliveBytes(parameters, [*model.buffers(), *batch.values()])
            flops: list[int] = []
            with _changed_forwards([model.get_submodule(path) for path in block_paths], recomputed, cast):
                args, kwargs = contract.arguments(batch)
                with alive:
                    loss = contract.loss(model(*args, **kwargs), batch)
                edge, one = get_gradient_edge(loss), torch.ones_like(loss)
                del loss
                saved, forward_peak = alive.total, alive.peak
                alive.in_backward, alive.peak = True, 0
                with alive:
                    torch.autograd.grad([edge], parameters, [one], allow_unused=True)
                with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                    loss = contract.loss(model(*args, **kwargs), batch)
                    flops.append(counter.get_total_flops())
                    torch.autograd.grad(loss, parameters, allow_unused=True)
                    flops.append(counter.get_total_flops() - flops[0])
    return Whole(saved, forward_peak, alive.peak, *flops)
