"""How the weights of a model start, and whether its modules can start themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from shardwright.passes.build import Built
from shardwright.passes.imports import UserCode
from shardwright.passes.untyped import DispatchMode
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.job import ModelSpec

LARGE = 10**9
"""Parameters above which every process making the whole model costs too much host memory (4 GB of fp32)."""


def decide_init(spec: ModelSpec, built: Built, code: UserCode) -> Literal["constructor", "modules"]:
    """The way that `model.init` asks for; weights that are loaded need no initialiser, and no whole model before them.
    Raises InputError if the modules are to initialise themselves and a parameter is left out."""
    chosen, loads = spec.init, spec.weights != "random"
    if chosen == "auto":
        large = sum(parameter.numel() for parameter in built.module.parameters()) > LARGE
        chosen = "modules" if built.hugging_face or large or loads else "constructor"
    if chosen == "modules" and not built.hugging_face and not loads:
        _check_initialisers(built.module, code)
    return chosen


class _Written(DispatchMode):
    """The storages that operators write to."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], torch.Tensor):
            self.storages.add(args[0].untyped_storage()._cdata)
        return func(*args, **(kwargs or {}))


def _check_initialisers(model: nn.Module, code: UserCode) -> None:
    """Runs what an emitted script would run, on the meta device, and sees which parameters it writes to."""
    with _Written() as written, torch.no_grad():
        for path, initialise in _initialisers(model, "", None):
            with code.running("model.init", f"initialising module {path or '(the model itself)'}"):
                initialise()
    for name, parameter in model.named_parameters():
        if parameter.untyped_storage()._cdata not in written.storages:
            path, _, own = name.rpartition(".")
            raise InputError(
                Diagnostic(
                    key="model.init",
                    message=f"nothing initialises {own} of module {path or '(the model itself)'} "
                    f"({type(model.get_submodule(path)).__name__}) after a build on the meta device",
                    suggestion="give the module a reset_parameters() that fills it, or set `init: constructor` "
                    "(every process then builds the whole model in host memory)",
                )
            )


def _initialisers(
    module: nn.Module, path: str, rule: Callable[[nn.Module], Any] | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What initialises each module, children first: `_init_weights` of the module or of the nearest one around it that
    has it, else its own `reset_parameters`."""
    rule = getattr(module, "_init_weights", rule)
    for name, child in module.named_children():
        yield from _initialisers(child, f"{path}.{name}" if path else name, rule)
    own = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if rule is not None:
        yield path, lambda: rule(module)
    elif callable(own):
        yield path, own
