"""Attention in which keys and values travel around the processes that share a sequence (arXiv 2310.01889).

[Note: ring]
In step n a process attends to the keys of the n-th process before it, while those of the next step arrive. Under causal
attention ([Note: zigzag] in `positions.py`) it attends to its own keys causally; of earlier processes its queries need
the first chunk only; of later ones only the queries of its second chunk need keys, and all of them: each step is equal
work for all. In backward the keys travel again, and behind them, one step later, their gradients, which at last arrive
at home; they are summed in the precision of the normalisers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_pieces import Merged, Piece, attend, attend_backward
from .positions import Arriving, Peers


class RingAttention(torch.autograd.Function):
    """The attention of the own queries to the keys of all processes; see [Note: ring]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, peers: Peers, causal: bool, scale: float) -> Tensor:
        """The output for the own queries."""
        merged: Merged | None = None
        packed = torch.cat([k.flatten(), v.flatten()])
        for step in range(peers.size):
            arriving = peers.pass_on(packed) if step < peers.size - 1 else None
            keys, values = _unpacked(packed, k, v)
            rows, columns = _part(peers, step, q.shape[2], causal)
            operands = q[:, :, rows], keys[:, :, columns], values[:, :, columns]
            piece = attend(*operands, causal=causal and step == 0, scale=scale)
            if merged is None:
                merged = Merged(piece)
            else:
                merged.add(piece, rows)
            if arriving is not None:
                packed = arriving.wait()
        assert merged is not None
        whole = merged.piece(q.dtype)
        ctx.peers, ctx.causal, ctx.scale, ctx.rest = peers, causal, scale, whole.rest
        ctx.save_for_backward(q, k, v, whole.output, whole.normaliser)
        return whole.output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """The gradients of the own queries, keys and values."""
        q, k, v, output, normaliser = ctx.saved_tensors
        peers: Peers = ctx.peers
        packed = torch.cat([k.flatten(), v.flatten()])
        dq = q.new_zeros(q.shape, dtype=normaliser.dtype)
        own = k.new_zeros(packed.shape, dtype=normaliser.dtype)
        away = torch.zeros_like(own)
        returning: Arriving | None = None
        for step in range(peers.size):
            arriving = peers.pass_on(packed) if step < peers.size - 1 else None
            keys, values = _unpacked(packed, k, v)
            rows, columns = _part(peers, step, q.shape[2], ctx.causal)
            operands = gradient[:, :, rows], q[:, :, rows], keys[:, :, columns], values[:, :, columns]
            of = Piece(output[:, :, rows], normaliser[:, :, rows], ctx.rest)
            share, *shares = attend_backward(*operands, of, causal=ctx.causal and step == 0, scale=ctx.scale)
            dq[:, :, rows] += share
            if returning is not None:
                away = returning.wait()
            for whole, part in zip(_unpacked(away if step else own, k, v), shares, strict=True):
                whole[:, :, columns] += part
            returning = peers.pass_on(away) if step else None
            if arriving is not None:
                packed = arriving.wait()
        if returning is not None:
            own += returning.wait()
        dk, dv = _unpacked(own, k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _unpacked(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = torch.split(packed, [k.numel(), v.numel()])
    return keys.view(k.shape), values.view(v.shape)


def _part(peers: Peers, step: int, length: int, causal: bool) -> tuple[slice, slice]:
    """Which own queries attend to which keys of those that a step has ([Note: ring])."""
    everything, half = slice(0, length), length // 2
    if not causal or step == 0:
        return everything, everything
    if step <= peers.rank:  # they are of an earlier process
        return everything, slice(0, half)
    return slice(half, length), everything
