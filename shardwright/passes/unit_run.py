"""One unit, run alone at one micro-batch: forward and backward on fake tensors.

[Note: input and weight gradient]
The input gradient is the work that autograd does when only the gradients of the unit's inputs are asked for; the
weight gradient is what the whole backward does beyond that. A fused operator that computes both (a convolution's
backward) is split by the FLOPs of the two runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shardwright.passes.boundary import Layout, enter, layouts, leave
from shardwright.passes.held import Held, may_wait
from shardwright.passes.record import Event, Recorder, Recording, module_paths
from shardwright.passes.replay import Ended, Replay, Savings, replay
from shardwright.passes.untyped import Scalar, gradients
from shardwright.schemas.profile import KEPT_BY_SELECTIVE, Policy

REGION = "block"
Forward = Callable[..., Any]
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True, slots=True)
class Nest:
    """A nest of tuples, dictionaries and the like: the layouts of its tensors, and everything else."""

    layouts: tuple[Layout, ...]
    others: tuple[Any, ...]
    """All leaves, with None in place of tensors."""
    is_tensor: tuple[bool, ...]
    structure: Any

    @classmethod
    def of(cls, values: Any) -> tuple[Nest, list[torch.Tensor]]:
        """The nest, and its tensors."""
        leaves, structure = tree_flatten(values)
        is_tensor = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
        tensors = [leaf for leaf, held in zip(leaves, is_tensor, strict=True) if held]
        others = tuple(None if held else leaf for leaf, held in zip(leaves, is_tensor, strict=True))
        return cls(layouts(tensors), others, is_tensor, structure), tensors

    def key(self) -> tuple[Any, ...]:
        """Equal for arguments that cost the same: plain values by their text, other objects by identity."""
        others = tuple(repr(leaf) if isinstance(leaf, _PLAIN) else id(leaf) for leaf in self.others)
        return self.layouts, others, self.is_tensor, str(self.structure), torch.is_grad_enabled()

    def filled(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The nest again, with these tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if held else other for held, other in zip(self.is_tensor, self.others, strict=True)]
        return tree_unflatten(leaves, self.structure)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is alive between forward and backward."""

    inside: int
    """Bytes of what the unit made itself and does not return."""
    inputs: frozenset[int]
    """Storages of the inputs that are kept, by their index."""
    outputs: frozenset[int]
    """Storages of the outputs that are kept, by their index; never an input's."""


@dataclass(frozen=True, slots=True)
class UnitRun:
    """All that was measured of one unit at one micro-batch."""

    inputs: Nest
    output: Nest
    output_is_input: tuple[int | None, ...]
    """For each tensor of the output, the index of the input storage that it lies in, if it does."""
    kept: dict[Policy, Kept]
    forward: list[Event]
    backward: list[Event]
    input_only: list[Event] | None
    """The backward again, for the inputs' gradients alone, where it was asked for."""
    replay: Replay
    forward_rises: list[int]
    backward_rises: dict[Policy, list[int]]
    """Bytes alive beyond what was alive before backward, at every moment."""
    gradients: list[int]
    """Elements of parameter gradients that exist at every moment of backward when nothing is checkpointed."""
    held_by_weight: int
    """Bytes that wait for weight gradients ([Note: held by weight])."""


def cast_floating(dtype: torch.dtype | None, values: Any) -> Any:
    """Floating-point tensors in `dtype`, as FSDP2's `cast_forward_inputs` does; None leaves them alone."""
    if dtype is None:
        return values
    return tree_map(lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v, values)


def run_unit(
    module: nn.Module,
    forward: Forward,
    inputs: Nest,
    cast: torch.dtype | None,
    *,
    input_only: bool,
    shared: Sequence[nn.Module],
) -> UnitRun:
    """Measures one unit whose `forward` is called with `inputs`, a nest of (args, kwargs), floating-point tensors cast
    to `cast` first. `shared` are linear layers outside of it, which it might use."""
    recorder = Recorder(module.parameters(), REGION)
    storages = recorder.storages
    savings = Savings(recorder, REGION)
    anchor = torch.zeros((), requires_grad=True)
    held = Held(recorder)
    layers = [*may_wait(module.modules()), *shared]
    with recorder, module_paths(recorder, module, lambda _: False), held.watching(layers):
        tensors = enter(anchor, recorder, REGION, inputs.layouts)
        places = {storages.number(t): at.storage for t, at in zip(tensors, inputs.layouts, strict=True)}
        recorder.rebase(REGION)
        arguments = cast_floating(cast, inputs.filled(tensors))
        passed = {storages.number(tensor) for tensor in Nest.of(arguments)[1]}
        start = recorder.position()
        with saved_tensors_hooks(savings.pack, savings.unpack):
            output, returned = Nest.of(forward(*arguments[0], **arguments[1]))
        numbers = [storages.number(tensor) for tensor in returned]
        left = {number: at.storage for number, at in zip(numbers, output.layouts, strict=True)}
        end = leave(recorder, REGION, returned)
        recording = recorder.take(in_backward=True)
    del tensors, arguments, returned
    alive = frozenset(storages.alive())
    for_inputs = None
    backward = Recording([], [], {})
    if end is not None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if input_only:
            for_inputs = run_backward(recorder, [(end, end.dtype)], [anchor], [], retain=True).events
        savings.first_needed = None
        held.forget()
        backward = run_backward(recorder, [(end, end.dtype)], [anchor], parameters, retain=False)
    state = Ended(start, alive, passed, places, left)
    again = replay(recording, backward, savings, state)
    chosen = [
        at for at, event in enumerate(recording.events) if event.kind in KEPT_BY_SELECTIVE and again.results[at].bytes
    ]
    results = {number for at in chosen for number in recording.events[at].made}
    # What something else than a saved tensor holds is not dropped; nothing is, where nothing is saved.
    stays = passed | (alive - savings.packed) if savings.packed else alive
    return UnitRun(
        inputs=inputs,
        output=output,
        output_is_input=tuple(places.get(number) for number in numbers),
        kept={
            "none": _kept(alive, state, storages.size),
            "selective": _kept(stays | results, state, storages.size),
            "full": _kept(stays, state, storages.size),
        },
        forward=recording.events,
        backward=backward.events,
        input_only=for_inputs,
        replay=again,
        forward_rises=recording.rises(REGION),
        backward_rises={
            "none": backward.rises(REGION),
            "selective": again.rises(chosen),
            "full": again.rises(()),
        },
        gradients=[moment.gradients for moment in backward.of(REGION)],
        held_by_weight=sum(held.bytes().values()),
    )


def _kept(numbers: Set[int | None], state: Ended, size: Sequence[int]) -> Kept:
    """Storages by what they are to the unit. One that does not count has no number."""
    made = {number for number in numbers if number is not None and number not in state.given}
    return Kept(
        inside=sum(size[number] for number in made if number not in state.outputs),
        inputs=frozenset(state.given[number] for number in numbers if number in state.given),
        outputs=frozenset(state.outputs[number] for number in made if number in state.outputs),
    )


def run_backward(
    recorder: Recorder,
    ends: Sequence[tuple[Scalar, torch.dtype]],
    anchors: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    *,
    retain: bool,
) -> Recording:
    """A backward from scalars, given with their dtypes, to the units' anchors and to parameters, whose gradients are
    not counted."""
    ones = [torch.ones((), dtype=dtype) for _, dtype in ends]
    with recorder:
        wanted = [*anchors, *parameters]
        found = gradients([end for end, _ in ends], wanted, ones, retain=retain)
        recording = recorder.take(in_backward=True)
    recorder.discount(recording, [gradient for gradient in found[len(anchors) :] if gradient is not None])
    return recording
