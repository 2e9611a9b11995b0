"""Initial weights one unit at a time: no process ever holds the whole model, and every plan starts from equal ones.

[Note: initialisation by units]
The model is built with its parameters on the meta device (`parameters_on_meta`). Then each block, and at the end what
lies outside the blocks, gets memory, is initialised from a seed of its own and is sharded before the next one is
touched. Within a unit, children come before their parents, each through `_init_weights` of the Hugging Face model that
it belongs to, or through its own `reset_parameters`. Parameters that several processes share ([Note: divided
parameters]) are initialised whole, on each of them, before it goes on with its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .divided import narrow_again, parts_here, whole_counts
from .session import seed_for


class InitializationError(Exception):
    """A parameter that nothing initialises, or that is initialised where it should not be."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built in here keep their parameters on the meta device; buffers are made as usual, on the CPU."""
    register = nn.Module.register_parameter
    placed: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            # The original is kept beside its stand-in: a tied one comes again, and its id must not be reused.
            stand_in = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            parameter = placed.setdefault(id(parameter), (parameter, stand_in))[1]
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def initialize(model: nn.Module, path: str, *, seed: int, device: torch.device, without: Iterable[str] = ()) -> None:
    """Give memory and initial values to the parameters under `path` that are on meta still; buffers follow them.

    `path` is a block's path, or empty for all that is left; then those in the blocks `without` stay on meta, because
    other processes have them. See [Note: initialisation by units]. Raises InitializationError for a parameter that no
    method fills, and for a method that changes another unit's parameters.
    """
    unit = model.get_submodule(path)
    done = [parameter for parameter in model.parameters() if not parameter.is_meta]
    versions = [parameter._version for parameter in done]
    created = _materialize(model, _on_meta(unit, model, without), device, whole=True)
    for module in unit.modules():
        _move_buffers(module, device)
    torch.manual_seed(seed_for(seed, "init", path))
    with torch.no_grad(), whole_counts(unit):
        for module, reset in _initializers(model, path):
            if any(id(parameter) in created for parameter in module.parameters()):
                reset()
    for name, parameter in unit.named_parameters():
        if id(parameter) in created and bool(parameter.isnan().any()):
            raise InitializationError(
                f"nothing initialises {path + '.' if path else ''}{name}: give its module a `reset_parameters`, "
                "or write `init: constructor` under `model` in the job"
            )
    if [parameter._version for parameter in done] != versions:
        raise InitializationError(
            f"initialising {path or 'the model'} changes parameters of blocks that are initialised already; "
            "write `init: constructor` under `model` in the job"
        )
    narrow_again(model, created)


def allocate(model: nn.Module, device: torch.device, without: Iterable[str] = ()) -> None:
    """Give memory to all parameters that are on meta still, sharded or not: what follows (`load_weights`, a checkpoint)
    fills them. Buffers move to the device. `without`: as of `initialize`.

    Raises InitializationError for a buffer that has no values, because it is computed from a parameter.
    """
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise InitializationError(
                f"the buffer {name} is computed from parameters when the model is built, before they have values; "
                "write `init: constructor` under `model` in the job"
            )
    _materialize(model, _on_meta(model, model, without), device)
    for module in model.modules():
        _move_buffers(module, device)


def _on_meta(unit: nn.Module, model: nn.Module, without: Iterable[str]) -> set[nn.Parameter]:
    """The parameters of a unit that have no memory, but for those in some blocks of the model."""
    left = {parameter for path in without for parameter in model.get_submodule(path).parameters()}
    return {parameter for parameter in unit.parameters() if parameter.is_meta and parameter not in left}


def _materialize(
    model: nn.Module, parameters: set[nn.Parameter], device: torch.device, *, whole: bool = False
) -> dict[int, nn.Parameter]:
    """Replace these parameters by NaN-filled ones wherever the model has them, so that tied ones stay tied; returns the
    new ones by id. `whole`: those that are divided in their whole shape."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter in parameters:
                if parameter not in new:
                    part = parts_here(module).get(name) if whole else None
                    like = parameter if part is None else torch.empty(part.shape, dtype=parameter.dtype, device="meta")
                    values = torch.full_like(like, torch.nan, device=device)
                    new[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                setattr(module, name, new[parameter])
    return {id(parameter): parameter for parameter in new.values()}


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)


def _initializers(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, Callable[[], object]]]:
    """Each module under `path` that has a way to initialise itself, children first."""
    ancestors = [model.get_submodule(".".join(path.split(".")[:depth])) for depth in range(len(path.split(".")))]
    hugging_face = [module for module in ancestors if hasattr(module, "_init_weights")]
    yield from _children_first(model.get_submodule(path), hugging_face[-1] if hugging_face else None)


def _children_first(
    module: nn.Module, hugging_face: nn.Module | None
) -> Iterator[tuple[nn.Module, Callable[[], object]]]:
    if hasattr(module, "_init_weights"):
        hugging_face = module
    for child in module.children():
        yield from _children_first(child, hugging_face)
    own: Callable[[], object] | None
    if hugging_face is not None:
        rule: Callable[[nn.Module], Tensor | None] = hugging_face._init_weights  # type: ignore[assignment]
        yield module, lambda: rule(module)
    elif callable(own := getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)):
        yield module, own
