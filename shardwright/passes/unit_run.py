"""One unit, run alone at one micro-batch: forward and backward on fake tensors.

[Note: input and weight gradient]
The input gradient is the work that autograd does when only the gradients of the unit's inputs are asked for; the
weight gradient is what the whole backward does beyond that. A fused operator that computes both (a convolution's
backward) is split by the FLOPs of the two runs.

[Note: checkpointing]
Under full checkpointing (`torch.utils.checkpoint`, use_reentrant=False) a unit keeps its inputs, as its forward gets
them. In backward, when the first saved tensor is needed, the forward runs again until the last saved tensor is made,
and then backward goes on as if nothing had been dropped, except that the inputs stay until its end. So what
checkpointing costs follows from one plain forward and backward in which the savings are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shardwright.passes.boundary import Layout, enter, layouts, leave
from shardwright.passes.record import Event, Recorder, Recording, module_paths
from shardwright.passes.untyped import Scalar, gradients
from shardwright.schemas.profile import Policy

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
    recomputed: int
    """How many events of forward run again in backward under checkpointing."""
    forward_rises: list[int]
    backward_rises: dict[Policy, list[int]]


def cast_floating(dtype: torch.dtype | None, values: Any) -> Any:
    """Floating-point tensors in `dtype`, as FSDP2's `cast_forward_inputs` does; None leaves them alone."""
    if dtype is None:
        return values
    return tree_map(lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v, values)


class _Savings:
    """Where in forward the last tensor was saved, and where in backward the first was needed."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.any = False
        self.last_saved = (0, 0)
        self.first_needed: tuple[int, int] | None = None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.any, self.last_saved = True, self.recorder.position()
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.first_needed = self.first_needed or self.recorder.position()
        return tensor


def run_unit(
    module: nn.Module, forward: Forward, inputs: Nest, cast: torch.dtype | None, *, input_only: bool
) -> UnitRun:
    """Measures one unit whose `forward` is called with `inputs`, a nest of (args, kwargs), floating-point tensors cast
    to `cast` first."""
    recorder = Recorder(module.parameters(), REGION)
    storages = recorder.storages
    savings = _Savings(recorder)
    anchor = torch.zeros((), requires_grad=True)
    with recorder, module_paths(recorder, module, lambda _: False):
        tensors = enter(anchor, recorder, REGION, inputs.layouts)
        places = {storages.number(t): at.storage for t, at in zip(tensors, inputs.layouts, strict=True)}
        recorder.rebase(REGION)
        arguments = cast_floating(cast, inputs.filled(tensors))
        passed = {storages.number(tensor) for tensor in Nest.of(arguments)[1]}
        with saved_tensors_hooks(savings.pack, savings.unpack):
            output, returned = Nest.of(forward(*arguments[0], **arguments[1]))
        numbers = [storages.number(tensor) for tensor in returned]
        left = {number: at.storage for number, at in zip(numbers, output.layouts, strict=True)}
        end = leave(recorder, REGION, returned)
        recording = recorder.take(in_backward=True)
    del tensors, arguments, returned
    alive = set(storages.alive())
    kept = Kept(
        inside=sum(storages.size[number] for number in alive - places.keys() - left.keys()),
        inputs=frozenset(places[number] for number in alive & places.keys()),
        outputs=frozenset(left[number] for number in (alive & left.keys()) - places.keys()),
    )
    under_checkpoint = Kept(
        inside=sum(storages.size[number] for number in passed - places.keys() if number is not None),
        inputs=frozenset(places[number] for number in passed & places.keys()),
        outputs=frozenset(),
    )
    for_inputs = None
    backward = Recording([], [], {})
    if end is not None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if input_only:
            for_inputs = run_backward(recorder, [(end, end.dtype)], [anchor], [], retain=True).events
        savings.first_needed = None
        backward = run_backward(recorder, [(end, end.dtype)], [anchor], parameters, retain=False)
    return UnitRun(
        inputs=inputs,
        output=output,
        output_is_input=tuple(places.get(number) for number in numbers),
        kept={"none": kept, "full": under_checkpoint if savings.any else kept},
        forward=recording.events,
        backward=backward.events,
        input_only=for_inputs,
        recomputed=savings.last_saved[0],
        forward_rises=recording.rises(REGION),
        backward_rises={
            "none": backward.rises(REGION),
            "full": _rises_when_recomputed(recording, backward, savings, kept.inside - under_checkpoint.inside),
        },
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


def _rises_when_recomputed(forward: Recording, backward: Recording, savings: _Savings, dropped: int) -> list[int]:
    """Bytes alive in backward beyond what was alive before it, under checkpointing ([Note: checkpointing]). `dropped`
    are the bytes that are made again."""
    rises = backward.rises(REGION)
    if savings.first_needed is None:
        return rises
    start = savings.first_needed[1]
    before = rises[:start]
    again = [(before[-1] if before else 0) + rise for rise in forward.rises(REGION)[: savings.last_saved[1]]]
    inputs = [moment.inputs for moment in backward.moments]
    after = [dropped + rise + (inputs[0] - held) for rise, held in zip(rises[start:], inputs[start:], strict=True)]
    return before + again + after
