"""Counts every collective of a process, whoever calls it: DDP's reducer, FSDP, DTensor or the script.

[Note: where collectives are counted]
Calls reach the network by several ways: functions of `torch.distributed`, C++ code of DistributedDataParallel,
operators of functional collectives. Below all of them lies the process group, so a process group of our own is put
there: it counts and hands on to gloo. torch offers `Backend.register_backend` for groups written in Python, and its
PyProcessGroup.hpp leads C++ calls to their methods, but for a few; gloo's own sequence number, which grows by one with
each call, shows whether any call went past (`unseen`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ProcessGroupGloo

BACKEND = "counted_gloo"


class Call(NamedTuple):
    """One collective."""

    kind: str
    ranks: tuple[int, ...]
    """Global ranks of the group."""
    bytes: int
    """Of the whole tensor: what is gathered, what enters a reduction."""


class CollectiveLog:
    """The calls since it was last cleared."""

    def __init__(self) -> None:
        self.calls: Counter[Call] = Counter()
        self._counted = 0
        """Calls before sends are joined."""
        self._sent: list[Call] = []
        """Sends that are no part of a message yet."""
        self._groups: list[CountedGroup] = []
        self._sequence = 0

    def clear(self) -> None:
        """Start counting anew."""
        self.calls = Counter()
        self._counted = 0
        self._sent = []
        self._sequence = self._sequence_number()

    def add(self, call: Call) -> None:
        """Count a call."""
        self.calls[call] += 1
        self._counted += 1
        if call.kind == "send":
            self._sent.append(call)

    def join_sends(self) -> None:
        """What was sent since this was last called is one message: it counts as one call of as many bytes."""
        sent, self._sent = self._sent, []
        for call in sent:
            self.calls[call] -= 1
        for ranks in {call.ranks for call in sent}:
            self.calls[Call("send", ranks, sum(call.bytes for call in sent if call.ranks == ranks))] += 1
        self.calls = +self.calls

    @property
    def unseen(self) -> int:
        """Calls that gloo ran and that were not counted."""
        return self._sequence_number() - self._sequence - self._counted

    def _sequence_number(self) -> int:
        return sum(int(group.gloo._get_sequence_number_for_group()) for group in self._groups)

    def create(self, options: Any, _: Any = None) -> CountedGroup:
        """A counted group for the processes that torch names in its options."""
        group = CountedGroup(self, options)
        self._groups.append(group)
        return group


_KINDS: dict[str, tuple[str, int | None]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "allgather": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "gather": ("gather", 0),
    "scatter": ("scatter", 1),
    "alltoall": ("all_to_all", 0),
    "alltoall_base": ("all_to_all", 0),
    "all_to_all_single": ("all_to_all", 0),
    "send": ("send", 0),
    "recv": ("recv", 0),
    "recv_anysource": ("recv", 0),
    "barrier": ("barrier", None),
}
"""Methods of a process group: the collective, and which argument holds its whole tensor."""


class CountedGroup(ProcessGroup):
    """Gloo, with a log of its calls ([Note: where collectives are counted])."""

    def __init__(self, log: CollectiveLog, options: Any) -> None:
        # The constructor for groups written in Python, which torch's stubs leave out.
        super().__init__(options.group_rank, options.group_size)  # type: ignore[call-arg]
        self.log = log
        self.members = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
        self.gloo: Any = ProcessGroupGloo(
            options.store, options.group_rank, options.group_size, timeout=options.timeout
        )
        self.gloo._set_sequence_number_for_group()
        self.plain = ProcessGroup(options.store, options.group_rank, options.group_size)
        # Its own registration keeps the group's name and devices, which torch asks the group's backends for.
        for group in (self, self.plain):
            group._set_default_backend(ProcessGroup.BackendType.GLOO)
            group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, self.gloo)

    def getBackendName(self) -> str:
        """Torch asks for it."""
        return BACKEND


def _counted(method: str, kind: str, whole: int | None) -> Callable[..., Any]:
    def call(self: CountedGroup, *args: Any, **kwargs: Any) -> Any:
        size = 0 if whole is None else _bytes(args[whole])
        self.log.add(Call(kind, self.members, size))
        return getattr(self.plain, method)(*args, **kwargs)

    return call


for _method, (_kind, _whole) in _KINDS.items():
    if hasattr(ProcessGroup, _method):
        setattr(CountedGroup, _method, _counted(_method, _kind, _whole))


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else sum(map(_bytes, value))


def count_collectives() -> CollectiveLog:
    """From now on `init_process_group` starts gloo with a log, whatever backend it is asked for."""
    log = CollectiveLog()
    dist.Backend.register_backend(BACKEND, log.create, extended_api=True, devices=["cpu"])
    original = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        original(BACKEND, *args, **kwargs)

    dist.init_process_group = init_process_group
    return log
