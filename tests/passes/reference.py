"""The whole model measured as it is: no block replaced, none shared, by other means than the passes use."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
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
from shardwright.passes.contract import Batch, Contract, make_contract
from shardwright.passes.fake import fake_mode, faked
from shardwright.passes.imports import user_code
from shardwright.passes.kernels import kernels_of
from shardwright.schemas.job import JobSpec

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
MORE_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * prod(q) * k[-2],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: (
        10 * prod(q) * k[-2]
    ),
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * prod(a) * b[-1],
    torch.ops.shardwright.recurrent: lambda x, _, weights, *__, **___: _of_steps(x, weights),
    torch.ops.shardwright.recurrent_backward_input: lambda _, x, __, ___, ____, weights, **_____: _of_steps(x, weights),
    torch.ops.shardwright.recurrent_backward_weight: lambda x, _, __, ___, weights, **____: _of_steps(x, weights),
}
"""What PyTorch's FLOP counter lacks: two products of queries with keys forward, five backward; of a grouped product,
each element of the rows with each output; of recurrent layers, each matrix in every time step."""
CAUSAL = {"forward": 2, "backward": 5}
"""FLOPs that a causal kernel leaves out for each pair of a query's number with a key: half of all."""


def _of_steps(x: Any, weights: Any) -> int:
    return 2 * prod(x[:2]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _masked(func: Any, args: Any, kwargs: Any) -> int:
    """FLOPs that a causal attention kernel leaves out, and that PyTorch's counter counts."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | (kwargs or {})
    if not given.get("is_causal"):
        return 0
    query, key = given["query"], given["key"]
    assert query.shape[-2] == key.shape[-2]
    return CAUSAL["backward" if "backward" in func.name() else "forward"] * query.numel() * key.shape[-2]


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
        self.masked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.masked += _masked(func, args, kwargs)
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
    forward_masked: int
    """Of these, FLOPs of the masked half of causal attention."""
    backward_masked: int


def _cast(dtype: torch.dtype | None, args: Any, kwargs: Any) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tree_map(cast, (args, kwargs)) if dtype else (args, kwargs)


def _checkpointed(forward: Any) -> Any:
    """As an emitted script does it."""
    return functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def changed_forwards(
    blocks: Sequence[torch.nn.Module], wraps: Sequence[Callable[[Any], Any]], dtype: torch.dtype | None
) -> Iterator[None]:
    """Blocks that cast their inputs as FSDP2 does, the first ones with the forwards that `wraps` makes of theirs."""

    def cast_inputs(_: Any, args: Any, kwargs: Any) -> Any:
        return _cast(dtype, args, kwargs)

    handles = [block.register_forward_pre_hook(cast_inputs, with_kwargs=True) for block in blocks if dtype]
    for block, wrap in zip(blocks, wraps, strict=False):
        block.forward = wrap(block.forward)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            vars(block).pop("forward", None)


def _loss(model: torch.nn.Module, contract: Contract, batch: Batch, cast: torch.dtype | None) -> torch.Tensor:
    def forward() -> Any:
        args, kwargs = _cast(cast, *contract.arguments(batch))
        return model(*args, **kwargs)

    return contract.loss(forward(), batch)


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
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            alive = AliveBytes(parameters, [*model.buffers(), *batch.values()])
            flops: list[int] = []
            blocks = [model.get_submodule(path) for path in block_paths]
            with changed_forwards(blocks, [_checkpointed] * recomputed, cast):
                with alive:
                    loss = _loss(model, contract, batch, cast)
                edge, one = get_gradient_edge(loss), torch.ones_like(loss)
                del loss
                saved, forward_peak, masked = alive.total, alive.peak, alive.masked
                alive.in_backward, alive.peak, alive.masked = True, 0, 0
                with alive:
                    torch.autograd.grad([edge], trained, [one], allow_unused=True)
                with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
                    loss = _loss(model, contract, batch, cast)
                    flops.append(counter.get_total_flops())
                    torch.autograd.grad(loss, trained, allow_unused=True)
                    flops.append(counter.get_total_flops() - flops[0])
    return Whole(saved, forward_peak, alive.peak, *flops, masked, alive.masked)
