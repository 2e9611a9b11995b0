"""Operators whose work is unknown ([Note: known operators]): refused where they take parameters, told of elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from torch import nn

from shardwright.passes.imports import NotTheUsers
from shardwright.schemas.diagnostics import Diagnostic

_WAYS_OUT = (
    "if it only moves data, name it in model.profile.moves_data: [{name}]; else write it with operators that PyTorch's "
    "FLOP counter knows (matrix products, convolutions, attention), or register a formula with "
    "torch.utils.flop_counter.register_flop_formula in the model's file"
)


class UnpricedOperator(NotTheUsers):
    """An operator with a parameter as input whose work is unknown."""

    def __init__(self, operator: str, module: str) -> None:
        self.operator = operator
        self.module = module
        super().__init__(f"operator {operator} in module {module or '(the model itself)'}")


@dataclass(slots=True)
class Ledger:
    """What is known of unpriced operators while one model is profiled."""

    moves_data: frozenset[str]
    """Names with namespace (`aten::sort`) that the job says only move data."""
    used: set[str] = field(default_factory=set)
    """Those of `moves_data` that ran."""
    met: dict[tuple[str, str], None] = field(default_factory=dict)
    """Operators without parameters and their modules, in the order met."""

    def warnings(self, model: nn.Module) -> tuple[str, ...]:
        """One line for each operator that was met, and for each name in `moves_data` that never ran."""
        modules: dict[str, list[str]] = {}
        for operator, module in self.met:
            modules.setdefault(operator, []).append(module)
        lines = [
            f"the work of {operator} is unknown and counted as that of moving its operands; it runs in "
            f"{describe_module(model, paths[0])}{f' and {len(paths) - 1} more modules' if len(paths) > 1 else ''}. "
            f"If it only moves data, say so: model.profile.moves_data: [{operator}]"
            for operator, paths in modules.items()
        ]
        lines += [
            f"model.profile.moves_data names {name!r}, which the model does not need{_did_you_mean(name, modules)}"
            for name in sorted(self.moves_data - self.used)
        ]
        return tuple(lines)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


_ledger: ContextVar[Ledger | None] = ContextVar("ledger", default=None)
_prefix: ContextVar[str] = ContextVar("prefix", default="")


@contextmanager
def ledger(moves_data: Iterable[str]) -> Iterator[Ledger]:
    """While open, unpriced operators are written down here."""
    opened = Ledger(frozenset(moves_data))
    token = _ledger.set(opened)
    try:
        yield opened
    finally:
        _ledger.reset(token)


@contextmanager
def inside(path: str) -> Iterator[None]:
    """While open, paths of modules are those below this one."""
    token = _prefix.set(path)
    try:
        yield
    finally:
        _prefix.reset(token)


def met_unpriced(operator: str, module: str, *, takes_parameters: bool) -> None:
    """Writes an operator down. Raises UnpricedOperator if it takes parameters and nobody said that it moves data."""
    book = _ledger.get()
    path = ".".join(part for part in (_prefix.get(), module) if part)
    if book is not None and operator in book.moves_data:
        book.used.add(operator)
    elif takes_parameters:
        raise UnpricedOperator(operator, path)
    elif book is not None:
        book.met[operator, path] = None


def refusal(error: UnpricedOperator, model: nn.Module, key: str) -> Diagnostic:
    """What the user is told of an operator that stops the profile."""
    where = describe_module(model, error.module)
    message = f"the work of operator {error.operator} in {where} is unknown, and it uses parameters"
    return Diagnostic(key=key, message=message, suggestion=_WAYS_OUT.format(name=error.operator))


def describe_module(model: nn.Module, path: str) -> str:
    """`module blocks.0.inner (LSTM, rnn.py:1023)`: path, class, and the line at which its forward begins. Work outside
    the model (`loss`) has only a name."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return f"module {path}"
    name = f"module {path}" if path else "the model itself"
    forward = inspect.unwrap(type(module).forward)
    try:
        line = f", {Path(inspect.getsourcefile(forward) or '').name}:{inspect.getsourcelines(forward)[1]}"
    except (OSError, TypeError):
        line = ""
    return f"{name} ({type(module).__name__}{line})"
