"""The graphs that `torch.compile` makes of one block, on fake tensors and without compiling anything.

[Note: traced for compile]
AOTAutograd traces the block's forward and backward as one graph, with inductor's decompositions; inductor's passes over
that joint graph and its partitioner (a minimum cut: `min_cut_rematerialization_partition` in
`torch/_functorch/partitioners.py`, torch 2.13) divide it, and so say what is kept from forward to backward and what is
computed twice. Dynamo is left out: it takes several times as long, and where it captures a block whole it hands
AOTAutograd the same operators. So graph breaks are not seen. Parameters and buffers are free to keep, as they are for
inductor (`torch._functorch.config.treat_parameters_as_free_to_save`). For CUDA, `layer_norm` keeps its statistics in
fp32, as there; PyTorch's decomposition would round them as on the CPU (`native_layer_norm` in `torch/_refs`).

[Note: one division]
The graph is divided at one micro-batch, and the others are given the shapes of their own trace. The partitioner rounds
its weights, so where keeping a tensor or the parts made of it costs the same it may choose either, and choose otherwise
for another micro-batch; costs would not be affine then.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput, PlainAOTOutput, TangentAOTInput
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import partition_fn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.traceback import annotate, preserve_node_meta

from shardwright.schemas.cluster import DeviceKind

MODULE = "module"
"""Key of the annotation that tells the module of a node."""
Value = tuple[str, int]
"""A tensor that is no view: the name of the node that makes it, and its place among the node's results."""
_T = TypeVar("_T")


class Values:
    """The fake results of a graph's nodes, by name, at one micro-batch."""

    def __init__(self, graph: fx.Graph) -> None:
        self._results = {node.name: node.meta.get("val") for node in graph.nodes}

    def of(self, name: str) -> Any:
        """All that a node returns."""
        return self._results[name]

    def tensors(self, name: str) -> list[torch.Tensor]:
        """The tensors that a node returns."""
        found = self._results[name]
        return [value for value in (found if isinstance(found, list | tuple) else [found]) if _is_tensor(value)]

    def tensor(self, value: Value) -> torch.Tensor:
        """One tensor."""
        found = self._results[value[0]]
        tensor: torch.Tensor = found[value[1]] if isinstance(found, list | tuple) else found
        return tensor

    def storage_bytes(self, value: Value) -> int:
        """Size of a tensor's storage."""
        return self.tensor(value).untyped_storage().nbytes()


@dataclass(frozen=True, slots=True)
class BlockGraphs:
    """What a block becomes under `torch.compile`."""

    forward: fx.Graph
    backward: fx.Graph | None
    """None if nothing in the block wants a gradient. Its placeholders have the names of nodes of forward."""
    inputs: Mapping[str, int]
    """The placeholders of forward that are inputs of the block, with their places among its tensors. The others are
    parameters and buffers."""
    tangents: frozenset[str]
    """The placeholders of backward that are gradients of the block's outputs."""
    outputs: tuple[Value | None, ...]
    """The tensors that the block returns."""
    input_gradients: tuple[fx.Node, ...]
    """What backward returns for inputs of the block, not for parameters."""
    saved: Mapping[str, Value]
    """The placeholders of backward that come from forward, with what they are views of there."""


def _layer_norm_of_cuda(
    input: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    computed = input.to(torch.promote_types(input.dtype, torch.float32))
    variance, mean = torch.var_mean(computed, tuple(range(-len(shape), 0)), correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + eps)
    output = (computed - mean) * inverse
    output = output if weight is None else output * weight
    output = output if bias is None else output + bias
    return output.to(input.dtype), mean, inverse


_DECOMPOSITIONS: Mapping[DeviceKind, dict[OpOverload, Callable[..., Any]]] = {
    "cuda": {torch.ops.aten.native_layer_norm.default: _layer_norm_of_cuda},
    "cpu": {},
}


class _TracedError(Exception):
    """Ends the trace once the graph is there."""


@dataclass(frozen=True)
class BlockTracer:
    """Traces one block whose tensors are fake ([Note: traced for compile]). Its methods raise whatever PyTorch or the
    block raise where it cannot be traced."""

    module: nn.Module
    arguments: Callable[[Sequence[torch.Tensor]], tuple[Any, Any]]
    """Makes the block's args and kwargs of its input tensors."""
    kind: DeviceKind
    mode: FakeTensorMode

    def values(self, inputs: Sequence[torch.Tensor]) -> Values:
        """What the nodes of the joint graph return for these inputs."""
        return self._trace(inputs, lambda joint, *_: Values(joint.graph))

    def graphs(self, inputs: Sequence[torch.Tensor]) -> tuple[BlockGraphs, Values]:
        """The divided graph ([Note: one division]), and what its nodes return."""
        return self._trace(inputs, _divide)

    def _trace(self, inputs: Sequence[torch.Tensor], use: Callable[[fx.GraphModule, Any, int, int], _T]) -> _T:
        """What `use` makes of the graph, its inputs, the number of forward's outputs (-1: there is no backward) and of
        parameters."""
        named = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        found: list[_T] = []

        def pure(tensors: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Any:
            args, kwargs = self.arguments(inputs)
            return functional_call(self.module, dict(zip(named, tensors, strict=True)), args, kwargs)

        def take(graph: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int = -1, **_: Any) -> Any:
            found.append(use(graph, joint_inputs, num_fwd_outputs, len(named)))
            raise _TracedError

        def improve(graph: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
            return partition_fn(graph, joint_inputs, partitioner_fn_override=take, **options)

        def take_forward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            return take(gm, example_inputs)

        decompositions = {**select_decomp_table(), **_DECOMPOSITIONS[self.kind]}
        traced = aot_function(pure, take_forward, partition_fn=improve, decompositions=decompositions)
        with preserve_node_meta(), V.set_fake_mode(self.mode), _annotated(self.module):
            try:
                traced(list(named.values()), list(inputs))
            except _TracedError:
                return found[0]
        raise RuntimeError("AOTAutograd made no graph")


@contextmanager
def _annotated(root: nn.Module) -> Iterator[None]:
    """Nodes traced inside tell which submodule of `root` ran, those of backward included."""
    entered: list[Any] = []

    def enter(path: str) -> None:
        entered.append(annotate({MODULE: path}))
        entered[-1].__enter__()

    def leave() -> None:
        entered.pop().__exit__(None, None, None)

    handles = []
    for path, module in root.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: enter(path)))
            handles.append(module.register_forward_hook(lambda *_: leave()))
    try:
        yield
    finally:
        while entered:
            leave()
        for handle in handles:
            handle.remove()


def _divide(
    joint: fx.GraphModule, joint_inputs: Any, num_outputs: int, num_parameters: int
) -> tuple[BlockGraphs, Values]:
    values = Values(joint.graph)
    places = _input_places(joint.graph, num_parameters)
    described = joint.graph.output_node().meta["desc"]
    if num_outputs < 0:
        outputs = _block_outputs(described, _returned(joint.graph))
        return BlockGraphs(joint.graph, None, places, frozenset(), outputs, (), {}), values
    tangents = [node for node in _placeholders(joint.graph) if isinstance(node.meta.get("desc"), TangentAOTInput)]
    divided = min_cut_rematerialization_partition(
        joint,
        joint_inputs,
        compiler="inductor",
        num_fwd_outputs=num_outputs,
        static_lifetime_input_indices=list(range(num_parameters)),
    )
    forward, backward = (part.graph for part in divided)
    nodes = {node.name: node for node in forward.nodes}
    saved = {node.name: base_of(nodes[node.name]) for node in _placeholders(backward) if node.name in nodes}
    gradients = zip(described[num_outputs:], _returned(backward), strict=True)
    graphs = BlockGraphs(
        forward=forward,
        backward=backward,
        inputs=places,
        tangents=frozenset(node.name for node in tangents),
        outputs=_block_outputs(described[:num_outputs], _returned(forward)[:num_outputs]),
        input_gradients=tuple(node for desc, node in gradients if node and _is_of_input(desc, num_parameters)),
        saved={name: base for name, base in saved.items() if base is not None},
    )
    return graphs, values


def _is_of_input(desc: object, num_parameters: int) -> bool:
    """Whether what is described is the gradient of an input of the block."""
    return (
        isinstance(desc, GradAOTOutput)
        and isinstance(desc.grad_of, PlainAOTInput)
        and desc.grad_of.idx >= num_parameters
    )


def _block_outputs(described: Sequence[object], returned: Sequence[fx.Node | None]) -> tuple[Value | None, ...]:
    """Without what the graph returns besides, for the buffers that the block writes."""
    pairs = zip(described, returned, strict=True)
    return tuple(
        base_of(node) if node is not None else None for desc, node in pairs if isinstance(desc, PlainAOTOutput)
    )


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _input_places(graph: fx.Graph, num_parameters: int) -> dict[str, int]:
    described = [(node.name, node.meta.get("desc")) for node in _placeholders(graph)]
    places = {name: desc.idx - num_parameters for name, desc in described if isinstance(desc, PlainAOTInput)}
    return {name: place for name, place in places.items() if place >= 0}


def _returned(graph: fx.Graph) -> list[fx.Node | None]:
    return [value if isinstance(value, fx.Node) else None for value in graph.output_node().args[0]]  # type: ignore[union-attr]


def is_view(node: fx.Node) -> bool:
    """Whether a node's results lie in the storage of its first operand."""
    target = node.target
    return isinstance(target, OpOverload) and (target.is_view or target is torch.ops.aten._unsafe_view.default)


def base_of(node: fx.Node) -> Value | None:
    """The tensor that a node's result is, or is a view of; None for what is no tensor."""
    place = 0
    while True:
        if node.target is operator.getitem:
            node, place = node.args[0], node.args[1]  # type: ignore[assignment]
        elif is_view(node):
            node, place = node.args[0], 0  # type: ignore[assignment]
        else:
            value = node.meta.get("val")
            value = value[place] if isinstance(value, list | tuple) else value
            return (node.name, place) if _is_tensor(value) else None


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
