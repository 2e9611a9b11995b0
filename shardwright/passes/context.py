"""How context parallelism runs a model: whether only fused attention mixes positions, and where the logits are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from shardwright.passes.dataflow import Dataflow, operator_name_of
from shardwright.passes.graph import Exported, logits_of
from shardwright.passes.kernels import AttentionCall
from shardwright.passes.positions import mixing
from shardwright.schemas.profile import ContextParallelism


def find_context(
    exported: Exported,
    flow: Dataflow,
    calls: Sequence[AttentionCall],
    *,
    length: int,
    chain: str,
    loss: str,
    runs_on_part: Callable[[], bool],
) -> ContextParallelism:
    """What the planner and the script need to know. `calls` are those of fused attention, `length` is that of a
    sequence, `chain` says why the blocks are no chain, `runs_on_part` whether what comes after the blocks runs on a
    part of the positions."""
    reason = chain or _no_loss(loss) or _no_attention(calls) or _mixing(exported, flow, length)
    head, reason = ("", reason) if reason else _head(exported, flow, length, runs_on_part)
    if reason:
        return ContextParallelism(refused=reason)
    return ContextParallelism(
        head=head,
        causal=calls[0].causal,
        heads=min(call.query[-3] for call in calls),
        kv_heads=min(call.key[-3] for call in calls),
    )


def _no_loss(loss: str) -> str:
    if loss == "next_token":
        return ""
    return f"the loss is {loss}, and only that of next_token is known to be a sum over positions"


def _no_attention(calls: Sequence[AttentionCall]) -> str:
    if not calls:
        return "the model calls no fused attention (F.scaled_dot_product_attention)"
    for call in calls:
        if call.masked:
            return "its attention has a mask (of a sliding window, or positions that it computes itself)"
        if call.dropout:
            return f"its attention drops out {call.dropout:g} of the scores"
        if len(call.query) < 4 or call.query[-2] != call.key[-2]:
            return "its attention is not that of a sequence to itself, of shape (batch, heads, length, features)"
    if len({call.causal for call in calls}) > 1:
        return "some of its attention is causal, some is not"
    return ""


def _mixing(exported: Exported, flow: Dataflow, length: int) -> str:
    inside = [node for node in flow.nodes if _in_block(exported, flow, node) and not _of_experts(exported, flow, node)]
    found = mixing(flow, inside, length, exported.path, attention=True)
    return f"beside attention {found} may mix positions" if found else ""


def _in_block(exported: Exported, flow: Dataflow, node: fx.Node) -> bool:
    return any(path in exported.blocks for path in flow.stack(node))


def _of_experts(exported: Exported, flow: Dataflow, node: fx.Node) -> bool:
    """Whether a module calls the node that multiplies tokens, sorted by experts, with stacks of matrices."""
    grouped = {flow.module(each) for each in flow.nodes if "grouped_mm" in operator_name_of(each)}
    return any(path in grouped for path in flow.stack(node))


def _head(exported: Exported, flow: Dataflow, length: int, runs_on_part: Callable[[], bool]) -> tuple[str, str]:
    """The module from which on each process has its part of the sequence, and why there is none. No module is needed
    where everything after the blocks works on each position by itself, and does not state how many there are (as a
    view to the shape of the token ids does, which the graph does not tell from one to a shape of the activations)."""
    inside = [at for at, node in enumerate(flow.nodes) if _in_block(exported, flow, node)]
    after = flow.nodes[inside[-1] + 1 :]
    if not mixing(flow, after, length, exported.path) and runs_on_part():
        return "", ""
    products = {product.node for product in flow.analysis.found.products}
    for node in logits_of(exported.program):
        while node not in products and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        path = flow.module(node)
        own = [at for at, each in enumerate(flow.nodes) if flow.inside(each, path)]
        if node in products and path and own and not mixing(flow, flow.nodes[own[0] :], length, exported.path):
            return exported.path(path), ""
    return "", "no module of its own makes the logits"
