"""Trial runs: a forward and a loss on fake tensors with one block of each kind, before anything is measured.

They tell how often each block is called and in what order, whether blocks that look alike run alike ([Note: alike]),
and fill what modules cache on first use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from shardwright.passes.alike import Signature, numbers_read, run_signed
from shardwright.passes.blocks import Block
from shardwright.passes.boundary import results_of
from shardwright.passes.fake import Twins
from shardwright.passes.record import Recorder, module_paths
from shardwright.passes.step_run import Step, replaced_forwards
from shardwright.passes.unit_run import Nest, cast_floating
from shardwright.passes.untyped import DispatchMode

_Key = tuple[Any, ...]


@dataclass
class Trial:
    """One trial run. Blocks are given fake tensors by `twins`, and their inputs are cast to `cast`."""

    twins: Twins
    cast: torch.dtype | None
    compared: Collection[str] = ()
    """Paths of the blocks that are run although another one stands for them, to compare the two."""
    calls: Counter[str] = field(default_factory=Counter)
    """How often each block was called, in order of the first call."""
    unlike: dict[str, int] = field(default_factory=dict)
    """Blocks that ran otherwise than the one that stands for them, with a number for the way they ran."""
    operators: int = 0
    """Operators of the whole forward and loss."""
    _outputs: dict[_Key, Nest] = field(default_factory=dict)
    _ran: dict[_Key, Signature] = field(default_factory=dict)
    _numbered: set[_Key] = field(default_factory=set)
    _held: list[Nest] = field(default_factory=list)
    """Keys tell objects by identity, so they must not be freed meanwhile."""

    def run(self, step: Step, blocks: Sequence[Block]) -> Trial:
        """Runs forward and loss; each block only if no block with its fingerprint ran on the same inputs before."""
        with replaced_forwards(blocks, self._counted), _Checked() as outside:
            step.loss(step.forward())
        self.operators += outside.count
        return self

    def _counted(self, block: Block) -> Callable[..., Any]:
        forward = block.module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[block.path] += 1
            inputs, _ = Nest.of((args, kwargs))
            self._held.append(inputs)
            key = (block.fingerprint, inputs.key())
            args, kwargs = cast_floating(self.cast, (args, kwargs))
            if key not in self._outputs:
                return self._first(key, block, lambda: forward(*args, **kwargs))
            if block.path in self.compared or key in self._numbered:
                return self._compare(key, block, lambda: forward(*args, **kwargs))
            self.operators += len(self._ran[key])
            return self._outputs[key].filled(results_of(self._outputs[key].layouts))

        return call

    def _first(self, key: _Key, block: Block, call: Callable[[], Any]) -> Any:
        self.twins.put_in(block.module)
        with numbers_read(block.module) as reads:
            output, self._ran[key] = run_signed(call)
        if reads:
            self._numbered.add(key)
        self._outputs[key] = Nest.of(output)[0]
        return output

    def _compare(self, key: _Key, block: Block, call: Callable[[], Any]) -> Any:
        self.twins.put_in(block.module)
        output, ran = run_signed(call)
        if ran != self._ran[key] or Nest.of(output)[0].key() != self._outputs[key].key():
            self.unlike[block.path] = hash(ran)
        return output


class Ran(NamedTuple):
    """One call of an operator that does work."""

    module: str
    operator: str
    shapes: tuple[tuple[int, ...], ...]
    """Of its operands."""


@contextmanager
def operators_of(model: nn.Module) -> Iterator[list[Ran]]:
    """Fills in, while open, the operators that run, with the modules of the model that call them."""
    recorder = Recorder((), "")
    ran: list[Ran] = []
    with recorder, module_paths(recorder, model, lambda _: False):
        yield ran
        ran += [Ran(event.module, event.name, event.shapes) for event in recorder.take(in_backward=False).events]


_PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}
"""Where products take their two factors."""


class _Checked(DispatchMode):
    """Counts operators, and refuses products of two dtypes, which real tensors refuse and fake ones do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        factors = [args[at] for at in _PRODUCTS.get(func._schema.name, ())]
        if len({factor.dtype for factor in factors}) > 1:
            one, other = (str(factor.dtype).removeprefix("torch.") for factor in factors)
            raise RuntimeError(f"a matrix product needs two factors of the same dtype, got {one} and {other}")
        return func(*args, **(kwargs or {}))
