"""A model whose blocks are checkpointed by PyTorch itself, measured as it runs, by other means than the passes use."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from passes.reference import DTYPES, changed_forwards
from shardwright.passes.build import build_model
from shardwright.passes.contract import make_contract
from shardwright.passes.fake import fake_mode, faked
from shardwright.passes.imports import user_code
from shardwright.passes.kernels import kernels_of
from shardwright.schemas.job import JobSpec

Names = Collection[tuple[str, str]]
"""Operators by name and by path of the module below the block."""


@dataclass(frozen=True)
class Measured:
    """What PyTorch does in one micro-batch."""

    saved: int
    """Bytes alive between forward and backward."""
    reached: list[tuple[int, int]]
    """Bytes alive as backward reaches each block, the last block first, and the most until it reaches the next; without
    gradients of parameters."""
    ran: Counter[str]
    """Operators that ran in backward, by name."""


class _Log(TorchDispatchMode):
    """When the storages that operators make come and go, so that gradients of parameters can be left out afterwards,
    when it is known which they are."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.numbers = {tensor.untyped_storage()._cdata: -1 for tensor in known}
        self.sizes: list[int] = []
        self.log: list[int] = []
        """Storages by number: n + 1 comes, -n - 1 goes, 0 is a mark."""
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ran[func._schema.name.split("::")[1]] += 1
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.numbers:
                    number = self.numbers[storage._cdata] = len(self.sizes)
                    self.sizes.append(storage.nbytes())
                    self.log.append(number + 1)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, key: int) -> None:
        self.log.append(-1 - self.numbers.pop(key))

    def mark(self) -> None:
        self.log.append(0)

    def spans(self, without: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        """Bytes alive at each mark, and the most until the next."""
        left_out = {self.numbers[tensor.untyped_storage()._cdata] for tensor in without}
        alive, spans = 0, [(0, 0)]
        for entry in self.log:
            if entry == 0:
                spans.append((alive, alive))
            elif (number := abs(entry) - 1) not in left_out:
                alive += self.sizes[number] if entry > 0 else -self.sizes[number]
                spans[-1] = (spans[-1][0], max(spans[-1][1], alive))
        return spans[1:]


class _Modules:
    """Which module below its block runs."""

    def __init__(self, blocks: Sequence[torch.nn.Module]) -> None:
        self.stack = [""]
        for block in blocks:
            for path, module in block.named_modules():
                if path:
                    module.register_forward_pre_hook(lambda *_, path=path: self.stack.append(path))
                    module.register_forward_hook(lambda *_: self.stack.pop() and None)

    def policy(self, keep: Names, _: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = (func._schema.name.split("::")[1], self.stack[-1]) in keep
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def measure(
    job: JobSpec, folder: Path, paths: Sequence[str], dtype: str, micro_batch: int, keep: Names | None
) -> Measured:
    """One micro-batch on fake tensors, every block checkpointed with the results of `keep` kept; None: no block is."""
    mode = fake_mode()
    with user_code(folder) as code:
        built = build_model(job.model, code)
        contract = make_contract(job, built, code)
        with faked(built.module, mode, DTYPES[dtype], ()), mode, kernels_of(job.cluster.device.kind, code.modules()):
            batch, model = contract.batch(micro_batch), built.module
            parameters = list(model.parameters())
            log = _Log([*parameters, *model.buffers(), *batch.values()])
            blocks = [model.get_submodule(path) for path in paths]
            modules = _Modules(blocks)

            def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    contexts = partial(create_selective_checkpoint_contexts, partial(modules.policy, keep or ()))
                    if keep is None:
                        output = forward(*args, **kwargs)
                    elif keep:
                        output = checkpoint(
                            forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs
                        )
                    else:
                        output = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
                    first = next(tensor for tensor in tree_iter(output) if tensor.requires_grad)
                    first.register_hook(lambda _: log.mark())
                    return output

                return call

            with changed_forwards(blocks, [wrap] * len(blocks), DTYPES[dtype]):
                args, kwargs = contract.arguments(batch)
                with log:
                    loss = contract.loss(model(*args, **kwargs), batch)
                edge, one = get_gradient_edge(loss), torch.ones_like(loss)
                del loss
                log.mark()
                log.ran.clear()
                with log:
                    gradients = torch.autograd.grad([edge], parameters, [one], allow_unused=True)
    (saved, _), *blocks_reached = log.spans([gradient for gradient in gradients if gradient is not None])
    return Measured(saved, blocks_reached, log.ran)
