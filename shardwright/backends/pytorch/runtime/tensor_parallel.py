"""Styles of tensor parallelism, for the table that a script hands to torch's `parallelize_module`.

[Note: styles]
A style divides the parameters of a module, registers their parts ([Note: divided parameters]), and wraps its forward so
that values enter and leave ([Note: entering and leaving]). All parameters stay ordinary tensors. With `sequence_dim`,
the sequence is divided outside of the columns and rows. `attributes`: integers of the module that count what is
divided, each divided by the number of processes, or by the number that a mapping gives.

A table may have patterns: `parallelize_module(model, mesh["tp"], matching(model, TABLE))`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from .divided import Part, divide_counts, narrow
from .tensor_exchange import Group, group_of
from .tensor_forwards import (
    ColumnForward,
    ExpertsForward,
    LocalForward,
    Product,
    RegionForward,
    RowForward,
    ScatterForward,
    SharedForward,
    VocabularyForward,
)
from .wrappers import replace_innermost

Attributes = Sequence[str] | Mapping[str, int]
Parts = Mapping[str, tuple[int, ...]] | tuple[int, ...]

_APPLIED = "_tensor_parallel_styles"


@dataclass(kw_only=True)
class _Style(ParallelStyle):
    """What every style may have, as a plan writes it; what a style has no use for is left at its default."""

    enters: bool = False
    sequence_dim: int | None = None
    attributes: Attributes = ()
    dims: Mapping[str, int] = field(default_factory=dict)
    """Of each divided parameter, along which dim; empty: as the module's class has it."""
    units: int = 0
    """Into how many pieces they can be divided at most (heads): where there are fewer than processes, neighbours have
    the same ones. 0: indices, the last processes perhaps fewer."""
    parts: Parts = ()
    """Sizes of the matrices that lie one after another in a parameter, by name, or of all."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # A module that the model has under several paths is divided once.
        applied: list[_Style] = vars(module).setdefault(_APPLIED, [])
        if self not in applied:
            applied.append(self)
            group = group_of(device_mesh)
            divide_counts(module, self.attributes, group.size)
            self._divide(module, group)
        return module

    def _divide(self, module: nn.Module, group: Group) -> None:
        """Divides parameters and wraps the forward."""
        raise NotImplementedError

    def dims_of(self, module: nn.Module) -> dict[str, int]:
        """Of each parameter of the module that the style divides, along which dim."""
        return {name: dim for name, dim in self.dims.items() if module._parameters.get(name) is not None}

    def parts_of(self, name: str) -> tuple[int, ...]:
        """Sizes of the matrices in a parameter; none where it is one."""
        return self.parts.get(name, ()) if isinstance(self.parts, Mapping) else self.parts

    def _narrow(self, module: nn.Module, group: Group) -> list[Part]:
        dims = self.dims_of(module)
        if not dims:
            raise ValueError(f"{type(self).__name__} finds nothing to divide in {type(module).__name__}")
        one = partial(narrow, module, rank=group.rank, size=group.size, units=self.units)
        return [one(name, dim, parts=self.parts_of(name)) for name, dim in dims.items()]


class Local(_Style):
    """A module with columns and rows, where values enter at the columns: a scope of draws, and `attributes`."""

    def _divide(self, module: nn.Module, group: Group) -> None:
        LocalForward(module)


class Region(_Style):
    """A module whose floating-point inputs that need a gradient enter: everything up to its rows is divided."""

    def _divide(self, module: nn.Module, group: Group) -> None:
        RegionForward(module, group, self.sequence_dim)


class Column(_Style):
    """A linear layer that makes its part of the outputs from whole inputs; `enters` where these enter at itself."""

    def _divide(self, module: nn.Module, group: Group) -> None:
        made = self._narrow(module, group)
        if _by_input(module):
            module.nf = made[0].local_shape[1]  # type: ignore[assignment]
        ColumnForward(module, group, self.enters, self.sequence_dim, made)

    def dims_of(self, module: nn.Module) -> dict[str, int]:
        """Outputs."""
        own = super().dims_of(module)
        if self.dims:
            return own
        bias = {"bias": 0} if module._parameters.get("bias") is not None else {}
        return {"weight": 1 if _by_input(module) else 0} | bias


class Row(_Style):
    """A linear layer that takes its part of the inputs and makes a part of the sum that is the output."""

    def _divide(self, module: nn.Module, group: Group) -> None:
        self._narrow(module, group)
        if _by_input(module):
            replace_innermost(module, Product(module))
        RowForward(module, group, self.sequence_dim)

    def dims_of(self, module: nn.Module) -> dict[str, int]:
        """Inputs."""
        return super().dims_of(module) or {"weight": 0 if _by_input(module) else 1}


class Vocabulary(_Style):
    """A table of which each process has some rows; the rows that are looked up are whole."""

    def _divide(self, module: nn.Module, group: Group) -> None:
        if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.scale_grad_by_freq:
            raise ValueError(f"{type(module).__name__} is no plain table: rows are not looked up alone")
        part = self._narrow(module, group)[0]
        VocabularyForward(module, group, self.sequence_dim, part.spans[0][0].start)

    def dims_of(self, module: nn.Module) -> dict[str, int]:
        """Rows."""
        return {"weight": 0}


class Scatter(_Style):
    """A whole table or layer, of whose results each process takes its own part of the last dim."""

    def _divide(self, module: nn.Module, group: Group) -> None:
        ScatterForward(module, group)


class Shared(_Style):
    """A module with whole parameters of whose gradient each process has a part; with `attributes` a `Local`, too."""

    def _divide(self, module: nn.Module, group: Group) -> None:
        SharedForward(module, group)
        if self.attributes:
            LocalForward(module)


class Tied(_Style):
    """A module that has a parameter of another one, which divides it; the module itself is not called."""

    def _divide(self, module: nn.Module, group: Group) -> None:
        self._narrow(module, group)


class TensorExperts(_Style):
    """A module with stacks of columns and rows, called with (tokens, indices, weights): a region and a row.

    What is not divided of its parameters is added to the results, as biases of the rows are.
    """

    def _divide(self, module: nn.Module, group: Group) -> None:
        self._narrow(module, group)
        ExpertsForward(module, group, self.sequence_dim)


def matching(model: nn.Module, table: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """A table of patterns as one of the paths in a model, where `*` stands for one part of a path.

    torch resolves patterns too, but warns where only some layers have a module. Modules without a style that have a
    parameter of one that is divided get `Tied`. Raises ValueError for a pattern that no module has, and where two match
    the same one.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, ParallelStyle] = {}
    for pattern, style in table.items():
        paths = [path for path in modules if _matches(path.split("."), pattern.split("."))]
        if not paths:
            raise ValueError(f"no module of {type(model).__name__} is at {pattern}")
        for path in paths:
            if found.setdefault(path, style) is not style:
                raise ValueError(f"two patterns of the table match {path}, the second is {pattern}")
    return found | _tied(modules, found)


def _tied(modules: Mapping[str, nn.Module], found: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """Styles of the modules that have divided parameters of others."""
    styled = {modules[path] for path in found}
    divided: dict[Tensor, tuple[_Style, str, int]] = {}
    for path, style in found.items():
        if isinstance(style, _Style):
            for name, dim in style.dims_of(modules[path]).items():
                divided[modules[path].get_parameter(name)] = (style, name, dim)
    made: dict[str, ParallelStyle] = {}
    for path, module in modules.items():
        for own, parameter in module._parameters.items() if module not in styled else ():
            if parameter is not None and parameter in divided:
                style, name, dim = divided[parameter]
                made[path] = Tied(dims={own: dim}, parts={own: style.parts_of(name)}, units=style.units)
    return made


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(path) == len(pattern) and all(map(fnmatchcase, path, pattern))


def _by_input(module: nn.Module) -> bool:
    """Whether a weight is (inputs, outputs), as that of a Conv1D of Hugging Face, not (outputs, inputs)."""
    return f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D"
