"""What this process holds under `ShardedStates`, for checkpoints and weights.

[Note: parts of flat slices]
The fp32 values of a unit are a slice of its flat buffer, which cuts parameters anywhere: what this process has of one
is a stretch of its elements in row-major order, so up to 2 * dims - 1 boxes (`flat_boxes`). They are what a checkpoint
holds of the model, whatever dtype it computes in; what is loaded into them is published to the parameters. An optimizer
state lies as the values do, or is one scalar for all parameters of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .buckets import Bucket, Place, Run
from .held import STOCK, Held, HeldState, scalar_state
from .index import Stored
from .pieces import Box, flat_boxes, turn
from .states import ShardedStates
from .tensorfile import FormatError

_SCALAR = Box((), ())


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Elements [start, stop) of a parameter, in row-major order, of which this process has the values."""

    bucket: Bucket
    place: Place
    start: int
    stop: int
    offset: int
    """Of the first of them in the values of the run, or of the bucket."""

    def held(self, values: Tensor) -> Held:
        """The stretch in a tensor that lies as the values of the run, or of the bucket, do."""
        shape, parts, offset = tuple(self.place.shape), [], self.offset
        for box in flat_boxes(shape, self.start, self.stop):
            parts.append((box, values[offset : offset + box.numel].view(box.shape)))
            offset += box.numel
        return Held(shape, values.dtype, tuple(parts), _replica(self.bucket), written=not self.bucket.copy)

    def scalar(self, value: Tensor, *, held: bool = True) -> Held:
        """A state that the parameter has in common with the run."""
        parts = ((_SCALAR, value),) if held else ()
        return Held((), value.dtype, parts, _replica(self.bucket), written=not self.bucket.copy)


class FlatHolder:
    """The holder of all states that a `ShardedStates` has been given: `Checkpoints(..., holder=FlatHolder(states))`."""

    def __init__(self, states: ShardedStates) -> None:
        self._states = states
        self._buckets = [bucket for unit in states.units for bucket in unit]
        self._places: dict[Tensor, tuple[Bucket, Place]] = {
            place.parameter: (bucket, place) for bucket in self._buckets for place in bucket.places
        }

    def held(self, tensor: Tensor) -> Held:
        """The fp32 values of a parameter, none of one that only other stages of a pipeline have; of a buffer, all."""
        if tensor.is_meta:
            return Held(tuple(tensor.shape), torch.float32, ())
        if tensor in self._states.buffers:
            levels = self._states.levels
            turns = turn(zip(levels.sizes, levels.ranks, strict=True))
            return STOCK.held(tensor)._replace(replica=turns, written=self._states.buffers[tensor])
        if tensor not in self._places:
            return STOCK.held(tensor)
        bucket, place = self._places[tensor]
        return _stretch(bucket, place, 0, bucket.master.numel()).held(bucket.master)

    def states(self, optimizer: torch.optim.Optimizer) -> Iterator[HeldState]:
        """The states of the runs, cut up by parameter; a scalar is with whoever has the first element."""
        for run, stretches in self._runs():
            for state, value in optimizer.state.get(run.parameter, {}).items():
                for stretch in stretches if value is not None else ():
                    scalar = value.dim() == 0
                    held = stretch.scalar(value, held=stretch.start == 0) if scalar else stretch.held(value)
                    yield HeldState(stretch.place.parameter, state, held)

    @contextmanager
    def room(
        self, optimizer: torch.optim.Optimizer, stored: Mapping[nn.Parameter, Mapping[str, Stored]]
    ) -> Iterator[list[HeldState]]:
        """One tensor for a run, or a scalar that all its parameters must agree on.

        Raises FormatError where some parameters of a run have states and others have not or other ones, and for states
        of frozen parameters.
        """
        if any(not parameter.requires_grad for parameter in stored):
            raise FormatError("the checkpoint holds optimizer states of parameters that are not trained here")
        scalars = {
            state for parameter, states in stored.items() for state in states if states[state].shape != parameter.shape
        }
        rooms, alike = [], []
        for run, stretches in self._runs():
            states = stored.get(stretches[0].place.parameter, {})
            if any(stored.get(each.place.parameter, {}).keys() != states.keys() for each in stretches):
                raise FormatError(
                    "the checkpoint has optimizer states of some parameters only, and this layout steps all together: "
                    "freeze those without, which had no gradient so far, or go on with the layout that saved it"
                )
            for state, (dtype, _, _) in states.items():
                if state in scalars:
                    values = [scalar_state(optimizer, run.parameter, dtype) for _ in stretches]
                    held = [stretch.scalar(value) for stretch, value in zip(stretches, values, strict=True)]
                    alike.append((state, values))
                    optimizer.state[run.parameter][state] = values[0]
                else:
                    value = torch.zeros_like(run.parameter, dtype=dtype, requires_grad=False)
                    held = [stretch.held(value) for stretch in stretches]
                    optimizer.state[run.parameter][state] = value
                pairs = zip(stretches, held, strict=True)
                rooms += [HeldState(stretch.place.parameter, state, each) for stretch, each in pairs]
        yield rooms
        for state, values in alike:
            if any(not torch.equal(value, values[0]) for value in values):
                raise FormatError(
                    f"the parameters of the checkpoint differ in {state}, and this layout steps them together: "
                    "go on with the layout that saved it"
                )

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Waits for what is being sent of the values, and sends the new ones to where the parameters rest."""
        for bucket in self._buckets:
            bucket.arrive()
        yield
        for bucket in self._buckets:
            bucket.release()
            bucket.publish()
            bucket.arrive()

    def _runs(self) -> Iterator[tuple[Run, list[_Stretch]]]:
        for bucket in self._buckets:
            for run in bucket.runs:
                places = (_stretch(bucket, place, run.start, run.parameter.numel()) for place in bucket.places)
                yield run, [stretch for stretch in places if stretch.start < stretch.stop]


def _stretch(bucket: Bucket, place: Place, low: int, size: int) -> _Stretch:
    """What of a parameter lies in so many of the bucket's values from `low` on."""
    origin = bucket.levels.start(bucket.padded, bucket.levels.optimizer_states) + low
    start = max(0, origin - place.start)
    stop = min(place.shape.numel(), origin + size - place.start)
    return _Stretch(bucket, place, start, stop, place.start + start - origin)


def _replica(bucket: Bucket) -> tuple[int, int]:
    """(which, of how many) processes that have the same slice."""
    levels, outer = bucket.levels, slice(bucket.levels.optimizer_states, None)
    return turn(zip(levels.sizes[outer], levels.ranks[outer], strict=True))
