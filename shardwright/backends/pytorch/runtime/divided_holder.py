"""What this process holds of the whole tensors of a model that several processes share, for checkpoints and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .divided import Part, parts_by_parameter
from .held import STOCK, Held, HeldState, Holder
from .index import Stored
from .pieces import turn


class DividedHolder:
    """A holder of a model with divided parameters ([Note: divided parameters]).

    `inner` knows how the parts are sharded over the data processes. `tensor`: the mesh axis tp, where there is one.
    """

    def __init__(self, model: nn.Module, inner: Holder = STOCK, tensor: DeviceMesh | None = None) -> None:
        self._model, self._inner = model, inner
        self._tensor = (0, 1) if tensor is None else (tensor.get_local_rank(), tensor.size())
        self._parts = parts_by_parameter(model)
        self._world = dist.get_world_size() if dist.is_initialized() else 1

    def held(self, tensor: Tensor) -> Held:
        """In coordinates of the whole tensor."""
        return self._whole(self._inner.held(tensor), self._part(tensor))

    def states(self, optimizer: torch.optim.Optimizer) -> Iterator[HeldState]:
        """Those of the inner holder."""
        return map(self._state, self._inner.states(optimizer))

    @contextmanager
    def room(
        self, optimizer: torch.optim.Optimizer, stored: Mapping[nn.Parameter, Mapping[str, Stored]]
    ) -> Iterator[list[HeldState]]:
        """Of the inner holder, for states in the shapes of what lies here."""
        local = {
            parameter: {name: self._local(state, self._part(parameter)) for name, state in states.items()}
            for parameter, states in stored.items()
        }
        with self._inner.room(optimizer, local) as rooms:
            yield list(map(self._state, rooms))

    def filling(self) -> AbstractContextManager[None]:
        """As the inner holder."""
        return self._inner.filling()

    def _part(self, tensor: Tensor) -> Part | None:
        if tensor not in self._parts and isinstance(tensor, nn.Parameter):
            # Others may have taken the places of the parameters since.
            self._parts |= parts_by_parameter(self._model)
        return self._parts.get(tensor)

    def _state(self, state: HeldState) -> HeldState:
        return state._replace(held=self._whole(state.held, self._part(state.parameter)))

    @staticmethod
    def _local(state: Stored, part: Part | None) -> Stored:
        return state if part is None or state.shape != part.shape else state._replace(shape=part.local_shape)

    def _whole(self, held: Held, part: Part | None) -> Held:
        # A scalar state is of the parameter, however that is divided.
        if part is None or held.shape != part.local_shape:
            # A scalar state: of the processes that share experts, those with the first ones write it.
            first = part is None or "ep" not in part.axes or part.spans[0][0].start == 0
            everywhere = held.replica[1] == self._world
            return held._replace(replica=self._turn(held.replica), written=held.written and (first or everywhere))
        parts = tuple(
            (whole, memory[here.within(box)]) for box, memory in held.parts for whole, here in part.boxes(box)
        )
        return held._replace(shape=part.shape, parts=parts, replica=self._turn(held.replica, part))

    def _turn(self, inner: tuple[int, int], part: Part | None = None) -> tuple[int, int]:
        """(which, of how many) of all processes that hold the same, from those of the inner holder and of the part."""
        if inner[1] == self._world > 1:
            # A plain tensor, of which the inner holder takes all processes to have the same.
            if part is None:
                return inner
            apart = self._tensor[1] * (part.shape[0] // part.local_shape[0] if "ep" in part.axes else 1)
            inner = (inner[0] // apart, self._world // apart)
        turns = [inner, part.turn if part is not None else (0, 1)]
        if part is None or "tp" not in part.axes:
            turns.append(self._tensor)
        return turn((count, which) for which, count in turns)
