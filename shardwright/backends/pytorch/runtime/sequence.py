"""Divides the sequences that go through the blocks of a model.

[Note: divided sequences]
Outside of the blocks a model sees whole sequences. Where the first block begins, hidden states (batch, sequence, width)
are cut along the sequence: over the processes of context parallelism, which then attend to each other's keys, and what
each of those has over those of tensor parallelism, whose regions put it together again (arXiv 2205.05198, section
4.2.2). Where the last block ends, they are gathered. From the input of the head on, the processes of context
parallelism have their own positions again, whose targets `Sequences.local` takes; without a head, from the blocks on.
All between blocks and loss that is seen by them is thereby of whole sequences, or computed position by position.

What a block gets besides (rotary tables, positions) is cut over context parallelism alone: in regions it meets values
that tensor parallelism has put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import _get_current_function_mode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from .context_attention import METHODS, ContextAttention, attending
from .positions import GatherEqual, GatherSummed, Peers, ScatterEqual, TakeOwn, is_fake
from .tensor_exchange import group_of
from .tensor_random import own_draws
from .wrappers import Wrapper

SEQUENCE = 1
"""The dimension of hidden states and targets."""


class Sequences:
    """How the sequences of a model are divided; see [Note: divided sequences]."""

    def __init__(
        self,
        tensor: DeviceMesh | None,
        context: DeviceMesh | None,
        method: str,
        causal: bool,
    ) -> None:
        zigzag = causal and method in ("gather", "ring")
        self.tensor = Peers(tensor) if tensor is not None and tensor.size() > 1 else None
        self.context = Peers(context, zigzag=zigzag) if context is not None and context.size() > 1 else None
        self.attention = None if self.context is None else ContextAttention(self.context, method)
        self.draws = None if self.tensor is None or tensor is None else group_of(tensor)
        self.joins = True
        """Whether the processes of context parallelism gather hidden states where the last block ends."""
        self._cut = WeakTensorKeyDictionary()
        """Own parts of whole tensors without a gradient, which blocks share."""

    def __deepcopy__(self, memo: Any) -> Sequences:
        return self

    def local(self, whole: Tensor) -> Tensor:
        """Own positions of targets (b, s); (b, s / cp), or what came where nothing is divided over them."""
        return whole if self.context is None else self.context.positions.own(whole, SEQUENCE)

    def enter(self, first: bool, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a block; of the `first` one the hidden states are whole."""
        leaves, spec = tree_flatten((args, kwargs))
        at = _hidden_states(leaves)
        length = leaves[at].shape[SEQUENCE]
        if first:
            self._check(length)
            leaves[at] = self._scattered(leaves[at])
        elif self.context is not None:
            length *= self.context.size * (self.tensor.size if self.tensor is not None else 1)
        if self.context is not None:
            leaves = [leaf if number == at else self._part(leaf, length) for number, leaf in enumerate(leaves)]
        args, kwargs = tree_unflatten(leaves, spec)
        return args, kwargs

    def leave(self, output: Any) -> Any:
        """What the last block returns, with whole hidden states."""
        leaves, spec = tree_flatten(output)
        at = _hidden_states(leaves)
        if self.tensor is not None:
            leaves[at] = GatherEqual.apply(leaves[at], self.tensor, SEQUENCE)  # type: ignore[no-untyped-call]
        if self.context is not None and self.joins:
            leaves[at] = GatherSummed.apply(leaves[at], self.context, SEQUENCE)  # type: ignore[no-untyped-call]
        return tree_unflatten(leaves, spec)

    def take(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of the head."""
        leaves, spec = tree_flatten((args, kwargs))
        at = _hidden_states(leaves)
        leaves[at] = TakeOwn.apply(leaves[at], self.context, SEQUENCE)  # type: ignore[no-untyped-call]
        args, kwargs = tree_unflatten(leaves, spec)
        return args, kwargs

    @contextmanager
    def running(self, path: str, *, draws: bool) -> Iterator[None]:
        """What the forward of a block runs in; it `draws` if it has values. Raises RuntimeError for one without fused
        attention."""
        with nullcontext() if self.draws is None or not draws else own_draws(self.draws):
            if self.attention is None:
                yield
                return
            calls = self.attention.calls
            with attending(self.attention):
                yield
            if self.attention.calls == calls:
                message = f"{path} never called torch.nn.functional.scaled_dot_product_attention"
                raise RuntimeError(f"{message}: it cannot attend to positions that other processes have")

    def _check(self, length: int) -> None:
        over_context, over_tensor = 1, 1
        if self.context is not None:
            over_context = self.context.positions.chunks
            if length < 2 * self.context.size:
                raise ValueError(f"sequences of {length} positions are too short for {self.context.size} processes")
        if self.tensor is not None:
            over_tensor = self.tensor.size
        if length % over_context or length // (self.context.size if self.context else 1) % over_tensor:
            message = f"sequences of {length} positions cannot be cut into {over_context} equal chunks"
            raise ValueError(message + (f", and each process's into {over_tensor}" if over_tensor > 1 else ""))

    def _scattered(self, hidden: Tensor) -> Tensor:
        if self.context is not None:
            hidden = TakeOwn.apply(hidden, self.context, SEQUENCE)  # type: ignore[no-untyped-call]
        if self.tensor is not None:
            hidden = ScatterEqual.apply(hidden, self.tensor, SEQUENCE)  # type: ignore[no-untyped-call]
        return hidden

    def _part(self, leaf: Any, length: int) -> Any:
        """Own positions of an argument that has whole sequences of this length; else the argument."""
        dim = _sequence_dim(leaf, length) if isinstance(leaf, Tensor) else None
        if dim is None:
            return leaf
        assert self.context is not None
        if leaf.requires_grad:
            return TakeOwn.apply(leaf, self.context, dim)  # type: ignore[no-untyped-call]
        # Whoever watches calls takes what a block has made for its own.
        if _get_current_function_mode() is not None:  # type: ignore[no-untyped-call]
            return self.context.positions.own(leaf, dim)
        version, part = self._cut.get(leaf, (-1, None))  # type: ignore[no-untyped-call]
        if part is None or version != leaf._version:
            part = self.context.positions.own(leaf, dim)
            self._cut[leaf] = (leaf._version, part)
        return part


def _hidden_states(leaves: Sequence[Any]) -> int:
    """Which of some values is the hidden states. Raises ValueError where there are none."""
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim == 3:
            return number
    raise ValueError("no hidden states (batch, sequence, width) are among what goes into or out of a block or the head")


def _sequence_dim(tensor: Tensor, length: int) -> int | None:
    """The dimension of a block's argument that counts positions: the second; of tables (length, size) the first, of
    those (1, 1, length, size) the third."""
    shape = tensor.shape
    table = tensor.ndim == 1 or (tensor.ndim == 2 and (tensor.is_floating_point() or shape[1] != length))
    if table and shape[0] == length:
        return 0
    if tensor.ndim > 1 and shape[1] == length:
        return 1
    return 2 if tensor.ndim == 4 and shape[:3] == (1, 1, length) else None


class _Block(Wrapper):
    """Around a block."""

    def __init__(self, module: nn.Module, sequences: Sequences, path: str, first: bool, last: bool) -> None:
        super().__init__(module)
        self.sequences, self.path, self.first, self.last = sequences, path, first, last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward on own positions."""
        args, kwargs = self.sequences.enter(self.first, args, kwargs)
        values = not any(isinstance(leaf, Tensor) and is_fake(leaf) for leaf in tree_leaves((args, kwargs)))
        with self.sequences.running(self.path, draws=values):
            output = self.inner(*args, **kwargs)
        return self.sequences.leave(output) if self.last else output


class _Head(Wrapper):
    """Around the head."""

    def __init__(self, module: nn.Module, sequences: Sequences) -> None:
        super().__init__(module)
        self.sequences = sequences

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The head's forward on own positions."""
        args, kwargs = self.sequences.take(args, kwargs)
        return self.inner(*args, **kwargs)


def divide_sequence(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    tensor: DeviceMesh | None = None,
    context: DeviceMesh | None = None,
    head: str = "",
    method: str = "none",
    causal: bool = True,
) -> Sequences:
    """Divides the sequences of a model, in place, before anything else wraps its blocks; see [Note: divided sequences].

    `blocks`: their paths, in the order in which they run. `tensor`, `context`: meshes of one dimension, along which
    sequences are divided; None where they are not. `head`: path of the module that makes the logits; empty where all
    that follows the blocks works position by position. `method`, `causal`: of attention, for context parallelism.
    Raises ValueError for a method that there is not; a forward raises it for a length that does not divide and for
    attention with a mask or dropout, and RuntimeError for a block without fused attention.
    """
    if context is not None and context.size() > 1 and method not in METHODS:
        raise ValueError(f"no method of context parallelism is called {method!r}")
    sequences = Sequences(tensor, context, method, causal)
    if sequences.tensor is None and sequences.context is None:
        return sequences
    for number, path in enumerate(blocks):
        _Block(model.get_submodule(path), sequences, path, number == 0, number == len(blocks) - 1)
    sequences.joins = bool(head)
    if head and sequences.context is not None:
        _Head(model.get_submodule(head), sequences)
    return sequences
