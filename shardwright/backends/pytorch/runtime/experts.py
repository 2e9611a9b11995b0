"""Expert parallelism: the experts of a layer lie on several processes, and tokens travel to them and back.

[Note: dispatch]
A layer of experts is called with tokens (T, h), the experts (T, k) that each goes to, and their weights (T, k). Its
parameters are stacks, one expert after another along dim 0, and each of n processes keeps every n-th part of them. A
pair of a token and an expert is a row. Rows are sorted by expert; the processes tell each other how many they send to
every expert, send exactly these rows and weights, and run the layer's own forward on what they have received, as if
each row were a token that goes to one expert here. The results travel back and are added up per token. No row is
dropped or padded, so it computes what one process with all experts does. (Lepikhin et al., "GShard", arXiv 2006.16668,
section 3.3, without its capacity limits, as in Gale et al., "MegaBlocks", arXiv 2211.15841.)

Every process makes the same collectives whatever the router chooses: one that receives no row computes a row of zeros,
so that its backward takes part in the exchanges, and its parameters have gradients of zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh

from .divided import divide_counts, narrow
from .wrappers import innermost, replace_innermost


@dataclass(frozen=True, slots=True)
class _Rows:
    """How the rows of one call travel: to `sent` of every process, from `received` of every one."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup

    def there(self, rows: Tensor) -> Tensor:
        """To the experts."""
        return self._exchange(rows, self.received, self.sent)

    def back(self, rows: Tensor) -> Tensor:
        """To the tokens."""
        return self._exchange(rows, self.sent, self.received)

    def _exchange(self, rows: Tensor, incoming: list[int], outgoing: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(incoming), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), incoming, outgoing, group=self.group)
        return arrived


def _spread(tokens: Tensor, order: Tensor, chosen: int) -> Tensor:
    """The rows of tokens (T, h), sorted: row i is the token of the pair `order[i]`."""
    return tokens.index_select(0, order // chosen)


def _add_up(rows: Tensor, order: Tensor, chosen: int) -> Tensor:
    """The sums (T, h) of the sorted rows of each token; the inverse direction of `_spread`, and its derivative."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return rows.index_select(0, places).view(-1, chosen, *rows.shape[1:]).sum(1)


class _There(torch.autograd.Function):
    """Tokens (T, h) and weights (T, k) as rows, at the processes with their experts.

    One function for both, so that their gradients travel in the same order in all processes.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, order: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(order)
        ctx.rows, ctx.chosen = rows, weights.shape[1]
        sorted_weights = weights.flatten().index_select(0, order)
        return rows.there(_spread(tokens, order, ctx.chosen)), rows.there(sorted_weights)

    @staticmethod
    def backward(ctx: Any, of_tokens: Tensor, of_weights: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (order,) = ctx.saved_tensors
        tokens = weights = None
        if ctx.needs_input_grad[0]:
            tokens = _add_up(ctx.rows.back(of_tokens), order, ctx.chosen)
        if ctx.needs_input_grad[1]:
            weights = _add_up(ctx.rows.back(of_weights), order, 1).view(-1, ctx.chosen)
        return tokens, weights, None, None


class _Back(torch.autograd.Function):
    """The results of rows, added up per token where the tokens are."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, order: Tensor, rows: _Rows, chosen: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.rows, ctx.chosen = rows, chosen
        return _add_up(rows.back(results), order, chosen)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return ctx.rows.there(_spread(gradient, order, ctx.chosen)), None, None, None


class _Dispatched:
    """Stands for the forward of a layer whose experts lie on several processes; see [Note: dispatch]."""

    def __init__(self, forward: Callable[..., Tensor], experts: int, group: dist.ProcessGroup) -> None:
        self.forward, self.experts, self.group = forward, experts, group
        self.received = 0
        """Rows since the load was last asked for."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Dispatched:
        return _Dispatched(copy.deepcopy(self.forward, memo), self.experts, self.group)

    def __call__(self, tokens: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        here = self.experts // self.group.size()
        if tokens.is_meta or isinstance(tokens, FakeTensor):
            return self.forward(tokens, indices % here, weights)  # there is nothing to send, and the shapes are right
        chosen = indices.shape[1]
        experts = indices.flatten()
        order = experts.argsort(stable=True)
        counts = self._counts(experts)
        rows, arrived = self._rows(counts)
        inputs, of_inputs = _There.apply(tokens, weights, order, rows)  # type: ignore[no-untyped-call]
        total = inputs.shape[0]
        self.received += total
        local = torch.arange(here, device=tokens.device).repeat(self.group.size())
        local = local.repeat_interleave(arrived.flatten(), output_size=total)
        if not total:
            inputs, of_inputs, local = _with_zeros(inputs), _with_zeros(of_inputs), local.new_zeros(1)
        results = self.forward(inputs, local[:, None], of_inputs[:, None])
        summed: Tensor = _Back.apply(results[:total], order, rows, chosen)  # type: ignore[no-untyped-call]
        return summed

    def _counts(self, experts: Tensor) -> Tensor:
        counts = torch.bincount(experts, minlength=self.experts)
        if len(counts) > self.experts:
            raise ValueError(f"a token goes to expert {len(counts) - 1}, and there are {self.experts}, from 0 on")
        return counts.view(self.group.size(), -1)

    def _rows(self, counts: Tensor) -> tuple[_Rows, Tensor]:
        """`counts`: rows of this process by process and expert there. Also those that arrive, by process and expert
        here."""
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        sent, received = torch.stack([counts.sum(1), arriving.sum(1)]).tolist()
        return _Rows(sent, received, self.group), arriving


def _with_zeros(none: Tensor) -> Tensor:
    """A row of zeros behind none, in the same graph."""
    return torch.cat([none, none.new_zeros(1, *none.shape[1:])])


class Experts:
    """The layers whose experts several processes share."""

    def __init__(self, layers: Mapping[str, nn.Module], group: dist.ProcessGroup) -> None:
        self.layers, self._group = dict(layers), group
        """By path."""

    def inside(self, module: nn.Module) -> list[nn.Module]:
        """The layers within a module of the model."""
        own = set(self.layers.values())
        return [each for each in module.modules() if each in own]

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter of the model is one of the layers', as they are now."""
        return any(parameter is own for layer in self.layers.values() for own in layer.parameters())

    def load(self) -> float:
        """Rows of the fullest process as a multiple of the mean, over all that layers computed since the last call.

        Of each layer another process may be the fullest one, which the others wait for. Of a pipeline, those of this
        process's stages. All processes that share experts must call it; it takes one all-gather. Without rows it is 1.
        """
        here = [layer for layer in self.layers.values() if not next(layer.parameters()).is_meta]
        if not here:
            return 1.0
        runs = [_dispatched(layer) for layer in here]
        device = next(here[0].parameters()).device
        own = torch.tensor([run.received for run in runs], dtype=torch.int64, device=device)
        for run in runs:
            run.received = 0
        every = own.new_empty(self._group.size(), len(own))
        dist.all_gather_single(every.view(-1), own, group=self._group)
        total = int(every.sum())
        return float(every.amax(0).sum()) * self._group.size() / total if total else 1.0


def _dispatched(layer: nn.Module) -> _Dispatched:
    found = innermost(layer)
    assert isinstance(found, _Dispatched)
    return found


def divide_experts(model: nn.Module, patterns: Mapping[str, Sequence[str]], mesh: DeviceMesh) -> Experts:
    """Leaves each process of a mesh of one axis its part of the experts, and makes tokens travel; see [Note: dispatch].

    `patterns`: paths of the layers, where `*` stands for any one part of a path, and for each the integers of the
    module that count its experts. To be called once, before anything is initialised or sharded, and after
    `parallelize_module`: whatever tensor parallelism does at the entry and exit of a layer happens around the exchange,
    on tokens, and not on the rows, of which there are k times as many. Raises ValueError where a pattern finds nothing,
    or experts cannot be divided.
    """
    layers: dict[str, nn.Module] = {}
    for pattern, counts in patterns.items():
        found = dict(_matching(model, pattern))
        if not found:
            raise ValueError(f"no module of the model has a path like {pattern}")
        for path, layer in found.items():
            _divide(path, layer, counts, mesh)
        layers |= found
    return Experts(layers, mesh.get_group())


def _matching(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    wanted = pattern.split(".")
    for path, module in model.named_modules():
        own = path.split(".")
        if len(own) == len(wanted) and all(map(fnmatchcase, own, wanted)):
            yield path, module


def _divide(path: str, layer: nn.Module, counts: Sequence[str], mesh: DeviceMesh) -> None:
    size, names = mesh.size(), [name for name, _ in layer.named_parameters()]
    sizes = {layer.get_parameter(name).shape[:1] for name in names}
    if len(sizes) != 1 or not (experts := max(sizes).numel()) or any("." in name for name in names):
        raise ValueError(f"the parameters of {path} are no stacks of equally many experts")
    if experts % size:
        raise ValueError(f"the {experts} experts of {path} cannot be divided among {size} processes")
    for name in names:
        narrow(layer, name, 0, parts=(experts,), units=experts, rank=mesh.get_local_rank(), size=size, axis="ep")
    divide_counts(layer, counts, size)
    replace_innermost(layer, _Dispatched(innermost(layer), experts, mesh.get_group()))
