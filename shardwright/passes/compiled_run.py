"""One block under `torch.compile`, as a run of the unit: what it keeps, which kernels run, which bytes live meanwhile.

[Note: alive under compile]
A tensor lives from the kernel that makes it to the last that reads it; what is saved, returned or given in lives as the
compiled function holds it: until its last use in backward, since that function gives up its arguments. Buffers that
inductor writes in place of dead ones are left out, so the peaks are a little high.

[Note: checkpointing under compile]
The partitioner keeps of a checkpointed block the inputs that something for backward is made of (in eager mode: all of
them), and of the results that a policy keeps those that backward, or something computed again, is made of (in eager
mode: all of them). The kernels before the last that makes something for backward run again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from shardwright.passes import operators
from shardwright.passes.compiled_fusion import Kernel, kernels_of_graph
from shardwright.passes.compiled_graph import MODULE, BlockGraphs, Value, Values, base_of
from shardwright.passes.record import Event
from shardwright.passes.replay import Replay, Result
from shardwright.passes.unit_run import REGION, Kept, UnitRun
from shardwright.schemas.profile import KEPT_BY_SELECTIVE

_MAX_NAMES = 10
"""Operators that the name of a fused kernel tells, as inductor's own (`kernel_name_max_ops`)."""


@dataclass(frozen=True)
class Compiled:
    """The graphs of one block and their kernels, at every micro-batch."""

    graphs: BlockGraphs

    @cached_property
    def forward(self) -> list[Kernel]:
        """The kernels of forward."""
        return kernels_of_graph(self.graphs.forward)

    @cached_property
    def backward(self) -> list[Kernel]:
        """The kernels of backward."""
        return kernels_of_graph(self.graphs.backward) if self.graphs.backward is not None else []

    def run(self, eager: UnitRun, values: Values, storages: Sequence[int | None]) -> UnitRun:
        """The block's run at the micro-batch of `eager`. `storages` has the index of the storage of each of its input
        tensors, None for one that was made by casting."""
        saved = _saved(eager, self.graphs, values, storages)
        returned = {base_of(node) for node in self.graphs.forward.output_node().all_input_nodes}
        forward_rises = _alive(self.forward, values, returned)
        backward_rises, given_up = _backward_rises(self.graphs, self.backward, values, saved)
        making = [at for at, kernel in enumerate(self.forward) if not saved.made.keys().isdisjoint(kernel.writes)]
        stop = max(making, default=-1) + 1
        products = frozenset(name for kernel in self.forward if kernel.is_extern for name, _ in kernel.writes)
        kept = set(self.graphs.saved.values())
        sources = _sources(self.graphs.forward, kept, products)
        useful = {value for value in sources if value[0] in products} | saved.made.keys()
        again = Replay(
            results=[_result(kernel, useful, saved, values) for kernel in self.forward],
            first=0,
            stop=stop,
            before=[],
            again=[[alive] for alive in forward_rises[:stop]],
            after=[
                sum(saved.made.values()) + alive + more for alive, more in zip(backward_rises, given_up, strict=True)
            ],
        )
        events = [_event(kernel, values, -1) for kernel in self.forward]
        chosen = [at for at, event in enumerate(events) if event.kind in KEPT_BY_SELECTIVE and again.results[at].bytes]
        inputs = _inputs(self.graphs, values, storages, _sources(self.graphs.forward, kept, frozenset()))
        nearer = _inputs(self.graphs, values, storages, sources)
        for_inputs = _ancestors(self.graphs.input_gradients)
        return replace(
            eager,
            kept={
                "none": saved.kept,
                "selective": _under_policy(nearer, [again.results[at] for at in chosen]),
                "full": _under_policy(inputs, ()),
            },
            forward=events,
            backward=[_event(kernel, values, number) for number, kernel in enumerate(self.backward)],
            input_only=[
                _event(kernel, values, number, inputs_only=True)
                for number, kernel in enumerate(self.backward)
                if any(name in for_inputs for name, _ in kernel.writes)
            ],
            replay=again,
            forward_rises=forward_rises,
            backward_rises={"none": backward_rises, "selective": again.rises(chosen), "full": again.rises(())},
            held_by_weight=0,
        )


@dataclass(frozen=True)
class _Saved:
    """What is kept from forward to backward, by what it is to the block."""

    inside: Mapping[Value, int]
    """Tensors that the block made and does not return, with their bytes; inputs cast for it among them."""
    inputs: Mapping[Value, int]
    """Inputs, with the index of their storage."""
    outputs: Mapping[Value, int]
    """Results, with the index of their storage."""
    made: Mapping[Value, int]
    """Bytes of what the block made: `inside` without cast inputs, and `outputs`."""

    @property
    def kept(self) -> Kept:
        """The same, as of a run in eager mode."""
        return Kept(sum(self.inside.values()), frozenset(self.inputs.values()), frozenset(self.outputs.values()))


def _saved(eager: UnitRun, graphs: BlockGraphs, values: Values, storages: Sequence[int | None]) -> _Saved:
    made_here = {node.name for node in graphs.forward.nodes if node.op == "call_function"}
    returned = {value: at for value, at in zip(graphs.outputs, eager.output.layouts, strict=True) if value is not None}
    kept = list(dict.fromkeys(graphs.saved.values()))
    made = {value: values.storage_bytes(value) for value in kept if value[0] in made_here}
    cast, inputs = _inputs(graphs, values, storages, kept)
    return _Saved(
        inside={**{value: size for value, size in made.items() if value not in returned}, **cast},
        inputs=inputs,
        outputs={value: returned[value].storage for value in made if value in returned},
        made=made,
    )


def _sources(graph: fx.Graph, saved: Iterable[Value], stops: Set[str]) -> frozenset[Value]:
    """The saved tensors and everything that they are made of; what the nodes in `stops` are made of is left out."""
    nodes = {node.name: node for node in graph.nodes}
    found = set(saved)
    todo = [name for name, _ in found]
    seen = set(todo)
    while todo:
        name = todo.pop()
        for operand in nodes[name].all_input_nodes if name not in stops else ():
            base = base_of(operand)
            if base is not None:
                found.add(base)
                if base[0] not in seen:
                    seen.add(base[0])
                    todo.append(base[0])
    return frozenset(found)


def _inputs(
    graphs: BlockGraphs, values: Values, storages: Sequence[int | None], found: Iterable[Value]
) -> tuple[dict[Value, int], dict[Value, int]]:
    """The block's inputs among these tensors: those that casting made, with their bytes, and the others, with the index
    of their storage."""
    cast, others = {}, {}
    for value in found:
        if value[0] in graphs.inputs:
            storage = storages[graphs.inputs[value[0]]]
            if storage is None:
                cast[value] = values.storage_bytes(value)
            else:
                others[value] = storage
    return cast, others


def _result(kernel: Kernel, useful: Set[Value], saved: _Saved, values: Values) -> Result:
    made = [value for value in kernel.writes if value in useful]
    return Result(
        bytes=sum(map(values.storage_bytes, made)),
        needed=sum(values.storage_bytes(value) for value in made if value in saved.made),
        outputs=tuple(sorted(saved.outputs[value] for value in made if value in saved.outputs)),
    )


def _under_policy(inputs: tuple[dict[Value, int], dict[Value, int]], results: Iterable[Result]) -> Kept:
    """What is kept of the inputs, and these results."""
    cast, others = inputs
    inside = sum(cast.values()) + sum(one.bytes for one in results if not one.outputs)
    outputs = frozenset(storage for one in results for storage in one.outputs)
    return Kept(inside, frozenset(others.values()), outputs)


def _alive(kernels: Sequence[Kernel], values: Values, kept: Collection[Value | None]) -> list[int]:
    """Bytes alive after each kernel, of what the kernels make ([Note: alive under compile])."""
    last = _last_reads(kernels)
    made: set[Value] = set()
    alive, rises = 0, []
    for at, kernel in enumerate(kernels):
        made.update(kernel.writes)
        alive += sum(map(values.storage_bytes, kernel.writes))
        rises.append(alive)
        dead = [value for value in {*kernel.reads, *kernel.writes} if last.get(value, at) == at and value not in kept]
        alive -= sum(values.storage_bytes(value) for value in dead if value in made)
    return rises


def _last_reads(kernels: Sequence[Kernel]) -> dict[Value, int]:
    return {value: at for at, kernel in enumerate(kernels) for value in kernel.reads}


def _backward_rises(
    graphs: BlockGraphs, kernels: Sequence[Kernel], values: Values, saved: _Saved
) -> tuple[list[int], list[int]]:
    """Bytes alive after each kernel of backward beyond what was alive before it, without parameter gradients; and the
    bytes of the block's inputs that were given up until then."""
    if graphs.backward is None:
        return [], []
    returned = {base_of(node) for node in graphs.backward.output_node().all_input_nodes}
    gradients = returned - {base_of(node) for node in graphs.input_gradients}
    activations = [
        replace(kernel, writes=tuple(value for value in kernel.writes if value not in gradients)) for kernel in kernels
    ]
    rises, given_up = _alive(activations, values, returned), [0] * len(kernels)
    last = _last_reads(kernels)
    for names, size, is_input in _given(graphs, values, saved):
        if all((name, 0) not in returned for name in names):
            for at in range(max(last.get((name, 0), -1) for name in names) + 1, len(kernels)):
                rises[at] -= size
                given_up[at] += size * is_input
    return rises, given_up


def _given(graphs: BlockGraphs, values: Values, saved: _Saved) -> list[tuple[set[str], int, bool]]:
    """What backward gets and gives up after its last use: the placeholders that share a storage, its bytes, and whether
    it is an input of the block. Parameters live on."""
    names: dict[object, set[str]] = {}
    size: dict[object, int] = {}
    for name, value in graphs.saved.items():
        if value in saved.inputs or value in saved.made or value in saved.inside:
            key = saved.inputs.get(value, value)
            names.setdefault(key, set()).add(name)
            size[key] = values.storage_bytes(value)
    tangents = [({name}, values.storage_bytes((name, 0)), False) for name in sorted(graphs.tangents)]
    return [*((names[key], size[key], isinstance(key, int)) for key in names), *tangents]


def _ancestors(nodes: Iterable[fx.Node]) -> frozenset[str]:
    """Names of everything that these are made of, themselves included."""
    todo, seen = list(nodes), set()
    while todo:
        node = todo.pop()
        if node.name not in seen:
            seen.add(node.name)
            todo += node.all_input_nodes
    return frozenset(seen)


def _event(kernel: Kernel, values: Values, number: int, *, inputs_only: bool = False) -> Event:
    """A kernel as an event of a run. `inputs_only` leaves out what a convolution's backward does for its weight."""
    names = sorted({_operator_name(node) for node in kernel.nodes})
    fused = Event(
        name="_".join(["fused", *names[:_MAX_NAMES]]),
        kind="elementwise",
        module=_module_around(kernel.nodes),
        region=REGION,
        flops=0,
        bytes=kernel.bytes(values),
        shapes=operators.shapes_of([values.tensor(value) for value in kernel.writes]),
        strides=(),
        dtype=operators.operand_dtype([values.tensor(value) for value in kernel.writes], []),
        node=number,
    )
    if not kernel.is_extern:
        return fused
    (node,) = kernel.nodes
    if not isinstance(node.target, OpOverload):
        return replace(fused, name=names[0])
    call = operators.operation(node.target)
    inputs = [tensor for operand in node.all_input_nodes for tensor in values.tensors(operand.name)]
    return replace(
        fused,
        name=call.name,
        kind=call.kind,
        flops=_flops(call, node, values, inputs_only=inputs_only),
        bytes=operators.bytes_moved(call, inputs, values.tensors(node.name)),
        shapes=operators.shapes_of(inputs),
        dtype=operators.operand_dtype(inputs, values.tensors(node.name)),
    )


def _module_around(nodes: Iterable[fx.Node]) -> str:
    """Path of the innermost module that all of the nodes belong to."""
    paths = [str(node.meta.get("custom", {}).get(MODULE, "")).split(".") for node in nodes]
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False)))


def _operator_name(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[1] if isinstance(node.target, OpOverload) else str(node.target)


def _flops(call: operators.Operation, node: fx.Node, values: Values, *, inputs_only: bool) -> int:
    filled: Any = map_arg((node.args, dict(node.kwargs)), lambda operand: values.of(operand.name))
    args, kwargs = filled
    if inputs_only and call.name == "convolution_backward":
        args = (*args[:-1], (args[-1][0], False, False))
    return operators.flops(call, args, kwargs, values.of(node.name))
