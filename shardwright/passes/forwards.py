"""Forwards that the job replaces while the model is measured: `model.profile.forwards`.

[Note: replaced forwards]
Fake tensors have no values, so a forward that decides by them (`if x.sum() > 0`, `.item()`, `nonzero`, indexing with a
mask) cannot be measured as it stands. The job may name a function `f(module, *args, **kwargs)` that is run in place of
the forward of one module (by its path) or of every module of a class (by its name), and that costs what the real one
costs in training: for a router that drops tokens, for example, one that keeps as many as its capacity. The emitted
script runs the real forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from shardwright.passes.imports import UserCode
from shardwright.schemas.diagnostics import Diagnostic, InputError

KEY = "model.profile.forwards"


@contextmanager
def replaced_by_job(model: nn.Module, forwards: Mapping[str, str], code: UserCode) -> Iterator[None]:
    """While open, modules run what the job names in place of their forward ([Note: replaced forwards]). `forwards` are
    paths of modules or names of classes, with import paths. Raises InputError for one that the model does not have, and
    for a function that cannot be found."""
    functions: dict[nn.Module, Callable[..., Any]] = {}
    for name, import_path in forwards.items():
        function = code.load(import_path, f"{KEY}.{name}")
        functions.update(dict.fromkeys(_modules(model, name), function))
    before = {module: vars(module).get("forward") for module in functions}
    try:
        for module, function in functions.items():
            vars(module)["forward"] = partial(function, module)
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward")
            if own is not None:
                vars(module)["forward"] = own


def _modules(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a path or the name of a class stands for."""
    paths = {path: module for path, module in model.named_modules() if path}
    if name in paths:
        return [paths[name]]
    of_class = [module for module in model.modules() if type(module).__name__ == name]
    if not of_class:
        classes = {type(module).__name__ for module in model.modules()}
        close = get_close_matches(name, [*classes, *paths], n=1)
        message = f"the model has no module at path {name!r} and none of that class"
        hint = f"did you mean {close[0]!r}?" if close else f"its classes: {', '.join(sorted(classes))}"
        raise InputError(Diagnostic(key=f"{KEY}.{name}", message=message, suggestion=hint))
    return of_class
