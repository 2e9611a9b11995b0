"""Which part of a parameter this process has where several share one copy of the model.

[Note: divided parameters]
Tensor parallelism and expert parallelism leave each process an ordinary parameter that is a part of a larger one. What
shards model states over data processes does not know: to it this is the whole parameter. Only what needs the values of
one process does: initialisation, checkpoints, weights and the norm of the gradient. The `Part` is kept by the module,
under the parameter's name, so it stays when another tensor takes the parameter's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .pieces import Box

Axis = Literal["tp", "ep"]
"""Of the mesh: tensor parallelism or expert parallelism."""

_PARTS, _COUNTS, _NARROWED = "_divided_parts", "_divided_counts", "_narrowed"


class Span(NamedTuple):
    """Indices [start, stop) of a dim of the whole tensor."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Part:
    """This process's part of a divided parameter; see [Note: divided parameters]."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    spans: tuple[tuple[Span, ...], ...]
    """Of every dim the stretches that lie here, one after another."""
    axes: tuple[Axis, ...] = ()
    """Along which it is divided."""
    turn: tuple[int, int] = (0, 1)
    """(which, of how many) processes of these axes that have the same elements."""

    @property
    def holders(self) -> int:
        """How many processes of its axes have the same elements."""
        return self.turn[1]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of what lies here."""
        return tuple(sum(span.stop - span.start for span in spans) for spans in self.spans)

    def of(self, whole: Tensor) -> Tensor:
        """The part of a tensor of the whole shape, in memory of its own."""
        for dim, spans in enumerate(self.spans):
            if spans != (Span(0, self.shape[dim]),):
                pieces = [whole.narrow(dim, start, stop - start) for start, stop in spans]
                whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        return whole.clone(memory_format=torch.contiguous_format)

    def boxes(self, local: Box) -> Iterator[tuple[Box, Box]]:
        """A box of what lies here, cut up into boxes that are one in the whole: (in the whole, here) of each."""
        dims = [_cut(spans, *ends) for spans, ends in zip(self.spans, zip(*local, strict=True), strict=True)]
        for pairs in product(*dims):
            yield _box([whole for whole, _ in pairs]), _box([here for _, here in pairs])


def _box(spans: Iterable[Span]) -> Box:
    spans = list(spans)
    return Box(tuple(span.start for span in spans), tuple(span.stop for span in spans))


def _cut(spans: Iterable[Span], low: int, high: int) -> list[tuple[Span, Span]]:
    """What of the indices [low, high) here lies in each span: (in the whole, here)."""
    found, origin = [], 0
    for span in spans:
        start, stop = max(low, origin), min(high, origin + span.stop - span.start)
        if start < stop:
            shift = span.start - origin
            found.append((Span(start + shift, stop + shift), Span(start, stop)))
        origin += span.stop - span.start
    return found


def narrow(
    module: nn.Module,
    name: str,
    dim: int,
    *,
    rank: int,
    size: int,
    parts: tuple[int, ...] = (),
    units: int = 0,
    axis: Axis = "tp",
) -> Part:
    """Leaves of a module's parameter the part of one of `size` processes along a dim, and registers it.

    `parts`: sizes of several matrices that lie one after another along the dim, each divided on its own. `units`: what
    there is to divide (heads), of which every process has equally many, or shares one with its neighbours; 0: indices,
    as `torch.chunk` deals them out, so that the last processes may have fewer. A parameter may be on the meta
    device; one that several modules have stays one where all of them divide it alike. Raises ValueError where the parts
    cannot be made.
    """
    parameter = module.get_parameter(name)
    before = parts_here(module).get(name) or _undivided(tuple(parameter.shape))
    dim %= len(before.shape)
    if axis in before.axes or before.spans[dim] != (Span(0, before.shape[dim]),):
        raise ValueError(f"{name} of {type(module).__name__} is divided along {axis} or dim {dim} already")
    parts = parts or (before.shape[dim],)
    if axis == "tp" and all(length == units for length in parts):
        units = 0  # each index is one
    pieces = min(units, size) if units else size
    spans = tuple(_spans(parts, before.shape[dim], rank * pieces // size, pieces, units))
    if size % pieces or units % pieces:
        raise ValueError(f"{units} units of {name} cannot be divided among {size} processes")
    copies = size // pieces
    part = Part(
        before.shape,
        (*before.spans[:dim], spans, *before.spans[dim + 1 :]),
        (*before.axes, axis),
        (before.turn[0] * copies + rank % copies, before.turn[1] * copies),
    )
    along = Part(
        tuple(parameter.shape), (*map(_all, parameter.shape[:dim]), spans, *map(_all, parameter.shape[dim + 1 :]))
    )
    setattr(module, name, _narrowed(parameter, along))
    vars(module).setdefault(_PARTS, {})[name] = part
    return part


def _all(size: int) -> tuple[Span, ...]:
    return (Span(0, size),)


def _undivided(shape: tuple[int, ...]) -> Part:
    return Part(shape, tuple(map(_all, shape)))


def _spans(parts: tuple[int, ...], extent: int, piece: int, pieces: int, units: int) -> Iterator[Span]:
    if sum(parts) != extent:
        raise ValueError(f"parts of {' + '.join(map(str, parts))} are not a dim of {extent}")
    begin = 0
    for length in parts:
        if units and length % pieces:
            raise ValueError(f"{length} cannot be divided into {pieces} equal pieces")
        chunk = -(-length // pieces)
        if (pieces - 1) * chunk >= length:
            raise ValueError(f"of {length} indices some of {pieces} processes would have none")
        start = min(length, piece * chunk)
        yield Span(begin + start, begin + min(length, start + chunk))
        begin += length


def _narrowed(parameter: nn.Parameter, part: Part) -> nn.Parameter:
    """The same for all modules that have the parameter and divide it alike."""
    made: dict[Part, nn.Parameter] = vars(parameter).setdefault(_NARROWED, {})
    if part not in made:
        made[part] = nn.Parameter(part.of(parameter.detach()), requires_grad=parameter.requires_grad)
    return made[part]


def parts_here(module: nn.Module) -> Mapping[str, Part]:
    """The parts of a module's own parameters, by name, those that are divided."""
    found: dict[str, Part] = vars(module).get(_PARTS, {})
    return found


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The parts of all parameters of a model, by path, those that are divided; tied ones under all their names."""
    return {
        f"{path}.{name}" if path else name: part
        for path, module in model.named_modules(remove_duplicate=False)
        for name, part in parts_here(module).items()
    }


def parts_by_parameter(model: nn.Module) -> dict[Tensor, Part]:
    """The same by the parameters that the model has now."""
    return {
        module._parameters[name]: part  # type: ignore[misc]
        for module in model.modules()
        for name, part in parts_here(module).items()
    }


def holders(part: Part | None, tensor_size: int) -> int:
    """How many processes that share one copy of the model have the same elements of a parameter, which is divided so;
    `tensor_size`: of the mesh axis tp. Its squares count so many times in a sum over all processes."""
    if part is None:
        return tensor_size
    return part.holders * (1 if "tp" in part.axes else tensor_size)


def divide_counts(module: nn.Module, counts: Iterable[str] | Mapping[str, int], size: int) -> None:
    """Divides integers of a module that count what is divided: by `size`, or each by its own number.

    One that is smaller becomes 1: its one unit is shared with neighbours. Raises ValueError for what does not divide.
    """
    divisors = counts if isinstance(counts, Mapping) else dict.fromkeys(counts, size)
    registered: dict[str, tuple[int, int]] = vars(module).setdefault(_COUNTS, {})
    for name, divisor in divisors.items():
        whole = getattr(module, name)
        if not isinstance(whole, int) or (whole > divisor and whole % divisor):
            raise ValueError(f"{name} of {type(module).__name__} is {whole!r}, which is no multiple of {divisor}")
        registered[name] = (registered.get(name, (whole, 0))[0], max(1, whole // divisor))
        setattr(module, name, registered[name][1])


@contextmanager
def whole_counts(unit: nn.Module) -> Iterator[None]:
    """The integers are those of the undivided model inside."""
    modules = [module for module in unit.modules() if _COUNTS in vars(module)]
    for module in modules:
        for name, (whole, _) in vars(module)[_COUNTS].items():
            setattr(module, name, whole)
    try:
        yield
    finally:
        for module in modules:
            for name, (_, local) in vars(module)[_COUNTS].items():
                setattr(module, name, local)


def narrow_again(model: nn.Module, whole: Mapping[int, nn.Parameter]) -> None:
    """Leaves of parameters that were made whole, given by id, the parts that are registered for them."""
    made: dict[tuple[int, Part], nn.Parameter] = {}
    for module in model.modules():
        for name, part in parts_here(module).items():
            parameter = module.get_parameter(name)
            if id(parameter) in whole:
                key = (id(parameter), part)
                if key not in made:
                    made[key] = nn.Parameter(part.of(parameter.detach()), requires_grad=parameter.requires_grad)
                setattr(module, name, made[key])
