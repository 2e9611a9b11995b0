"""Attention of sequences that several processes have parts of.

While a block of a divided model runs, `torch.nn.functional.scaled_dot_product_attention` is one of three methods:
`gather` ([Note: gathered keys]) and `ulysses` ([Note: whole heads]) here, `ring` in `context_ring.py`. torch has a ring
of its own (`torch.distributed.tensor.experimental.context_parallel`), which knows no CPU kernel, is driven by private
options that all of a process share, and wants DTensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_pieces import Merged, Piece, attend, attend_backward
from .context_ring import RingAttention
from .positions import Peers, Positions

METHODS = ("gather", "ulysses", "ring")
_torch_attention: Callable[..., Tensor] = F.scaled_dot_product_attention


class ContextAttention:
    """`scaled_dot_product_attention` for queries, keys and values of this process's positions."""

    def __init__(self, peers: Peers, method: str) -> None:
        self.peers, self.method = peers, method
        self.calls = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As torch's; raises ValueError for what a divided sequence cannot have."""
        self.calls += 1
        query, key, value = _autocast(query, key, value)
        self._check(query, key, value, attn_mask, dropout_p, is_causal)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise ValueError(f"{query.shape[1]} heads of queries, {key.shape[1]} of keys, and not enable_gqa")
        if self.method == "ulysses":
            return _whole_heads(self.peers, query, key, value, is_causal, scale)
        function = RingAttention if self.method == "ring" else _GatheredKeys
        output: Tensor = function.apply(query, key, value, self.peers, is_causal, scale)  # type: ignore[no-untyped-call]
        return output

    def _check(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> None:
        if mask is not None:
            raise ValueError("attention with a mask cannot attend to a sequence that processes share")
        if dropout:
            raise ValueError(f"attention with dropout ({dropout}) cannot attend to a sequence that processes share")
        if q.ndim != 4 or not q.shape[2] == k.shape[2] == v.shape[2]:
            shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            raise ValueError(f"a divided sequence has queries and keys (batch, heads, own length, size), not {shapes}")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"queries, keys and values are of {q.dtype}, {k.dtype} and {v.dtype}, not of one dtype")
        if causal and self.method != "ulysses" and not self.peers.positions.zigzag:
            raise ValueError("causal attention in a model whose sequences are divided as if it had none")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype in which torch's own attention would get them."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(each if each.dtype == torch.float64 else each.to(dtype) for each in tensors)


class _Running(threading.local):
    """What attends in place of torch's, in the thread that runs a block: recomputed blocks run in others."""

    attention: ContextAttention | None = None


_running = _Running()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """In place of `torch.nn.functional.scaled_dot_product_attention`, for as long as the process lives."""
    found = _running.attention
    return _torch_attention(*args, **kwargs) if found is None else found(*args, **kwargs)


@contextmanager
def attending(attention: ContextAttention) -> Iterator[None]:
    """Within, this thread's `scaled_dot_product_attention` is that of a divided sequence."""
    if F.scaled_dot_product_attention is not _attention:
        vars(F)["scaled_dot_product_attention"] = _attention
    before, _running.attention = _running.attention, attention
    try:
        yield
    finally:
        _running.attention = before


class _GatheredKeys(torch.autograd.Function):
    """[Note: gathered keys]
    Keys and values of all positions are all-gathered, as one tensor, and their gradients reduce-scattered (arXiv
    2407.21783, section 3.3.2). Under causal attention, process i with the chunks i and j = 2c - 1 - i of 2c attends
    with all its queries to its own keys, causally, and to the chunks before i, and with those of chunk j to the chunks
    between i and j: no two of these share a key, so that each gradient of a key is written once.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, peers: Peers, causal: bool, scale: float) -> Tensor:
        """The attention of the own queries."""
        parts = peers.gather(torch.cat([k.flatten(), v.flatten()]))
        keys, values = (peers.positions.whole(each, 2) for each in _unpacked(parts, k, v))
        del parts
        first = (
            attend(q, k, v, causal=True, scale=scale) if causal else attend(q, keys, values, causal=False, scale=scale)
        )
        merged = Merged(first)
        for rows, columns in _spans(peers.positions, q, causal):
            piece = attend(q[:, :, rows], keys[:, :, columns], values[:, :, columns], causal=False, scale=scale)
            merged.add(piece, rows)
        whole = merged.piece(q.dtype)
        ctx.peers, ctx.causal, ctx.scale, ctx.rest = peers, causal, scale, whole.rest
        ctx.save_for_backward(q, k, v, keys, values, whole.output, whole.normaliser)
        return whole.output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """The gradients of the own queries, keys and values."""
        q, k, v, keys, values, output, normaliser = ctx.saved_tensors
        peers: Peers = ctx.peers
        parts = k.new_zeros((peers.size, k.numel() + v.numel()))
        of_keys, of_values = _unpacked(parts, k, v)
        dq = q.new_zeros(q.shape, dtype=normaliser.dtype)
        whole = Piece(output, normaliser, ctx.rest)
        if ctx.causal:
            first, dk, dv = attend_backward(gradient, q, k, v, whole, causal=True, scale=ctx.scale)
            of_keys[peers.rank].copy_(dk)
            of_values[peers.rank].copy_(dv)
        else:
            first, dk, dv = attend_backward(gradient, q, keys, values, whole, causal=False, scale=ctx.scale)
            peers.positions.put(of_keys, 2, dk)
            peers.positions.put(of_values, 2, dv)
        dq += first
        length = keys.shape[2] // peers.positions.chunks
        for rows, columns in _spans(peers.positions, q, ctx.causal):
            operands = gradient[:, :, rows], q[:, :, rows], keys[:, :, columns], values[:, :, columns]
            of = Piece(output[:, :, rows], normaliser[:, :, rows], ctx.rest)
            share, dk, dv = attend_backward(*operands, of, causal=False, scale=ctx.scale)
            dq[:, :, rows] += share
            peers.positions.put(of_keys, 2, dk, columns.start // length)
            peers.positions.put(of_values, 2, dv, columns.start // length)
        own = peers.reduce_scatter(parts)
        dk, dv = torch.split(own, [k.numel(), v.numel()])
        return dq.to(q.dtype), dk.view(k.shape), dv.view(v.shape), None, None, None


def _unpacked(parts: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (processes, ...) in parts that have both, one behind the other."""
    keys, values = torch.split(parts, [k.numel(), v.numel()], 1)
    return torch.unflatten(keys, 1, k.shape), torch.unflatten(values, 1, v.shape)


def _spans(positions: Positions, q: Tensor, causal: bool) -> list[tuple[slice, slice]]:
    """Which own queries attend to which keys, besides the own ones, in causal attention ([Note: gathered keys])."""
    if not causal:
        return []
    rows, rank = q.shape[2], positions.rank
    length = rows // 2
    last = 2 * positions.size - 1 - rank
    found = [
        (slice(0, rows), slice(0, rank * length)),
        (slice(length, rows), slice((rank + 1) * length, last * length)),
    ]
    return [each for each in found if each[1].start < each[1].stop]


def _whole_heads(peers: Peers, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """[Note: whole heads]
    An all-to-all gives each process whole sequences of its share of the heads, and another one takes the results back
    (arXiv 2309.14509). Heads of keys that are too few are repeated, no more than necessary.
    """
    heads, kept = q.shape[1], k.shape[1]
    if heads % peers.size:
        raise ValueError(
            f"{heads} heads of queries on a process cannot go to {peers.size} processes that share sequences"
        )
    group = heads // kept
    times = next(times for times in range(1, group + 1) if group % times == 0 and kept * times % peers.size == 0)
    if times > 1:
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    q, k, v = _Exchange.apply(peers, True, q, k, v)  # type: ignore[no-untyped-call]
    grouped = q.shape[1] != k.shape[1]
    mixed = _torch_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    (output,) = _Exchange.apply(peers, False, mixed)  # type: ignore[no-untyped-call]
    return output  # type: ignore[no-any-return]


class _Exchange(torch.autograd.Function):
    """From own positions of all heads to all positions of some heads (`forth`), or back."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, forth: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """One all-to-all of all tensors."""
        ctx.peers, ctx.forth = peers, forth
        return _exchanged(peers, forth, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """The other way."""
        return None, None, *_exchanged(ctx.peers, not ctx.forth, gradients)


def _exchanged(peers: Peers, forth: bool, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    divided, joined = (1, 2) if forth else (2, 1)
    parts = [torch.unflatten(each, divided, (peers.size, -1)).movedim(divided, 0) for each in tensors]
    shapes = [part.shape[1:] for part in parts]
    received = peers.exchange(torch.cat([part.flatten(1) for part in parts], 1))
    found = torch.split(received, [shape.numel() for shape in shapes], 1)
    pairs = zip(found, shapes, strict=True)
    return tuple(
        torch.unflatten(each, 1, shape).movedim(0, joined).flatten(joined, joined + 1) for each, shape in pairs
    )
