"""The parameters and buffers of a model, and which FSDP group owns each parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from torch import nn

from shardwright.passes.build import Built
from shardwright.passes.flow import Flow
from shardwright.passes.tensor_parallel import Division
from shardwright.schemas.diagnostics import Diagnostic, InputError
from shardwright.schemas.profile import Parameter, Role, Unit

ROOT = -1


def collect_parameters(built: Built, units: Sequence[Unit]) -> tuple[Parameter, ...]:
    """Distinct parameters in order of registration. `fully_shard` on the blocks, then on the model, gives a block's
    parameters to the block and the rest to the root; torch 2.13 refuses a parameter that two groups would share
    ("is shared with a parameter already managed by another FSDP group"), and so do we."""
    names = _names(built.module)
    unit_of = {path: index for index, unit in enumerate(units) for path in unit.paths}
    parameters = []
    for parameter in built.module.parameters():
        own, *others = names[id(parameter)]
        owners = sorted({_block_of(name, unit_of) for name in (own, *others)}, key=lambda path: (path != "", path))
        if len(owners) > 1:
            places = " and ".join(f"block {path}" if path else "the rest of the model" for path in owners)
            raise InputError(
                Diagnostic(
                    key=built.key,
                    message=f"parameter {own} is also {', '.join(others)}: {places} share it, "
                    "but each is sharded on its own",
                    suggestion="tie parameters within one block, or outside of all blocks (as an embedding and a head)",
                )
            )
        unit = unit_of[owners[0]] if owners[0] else ROOT
        parameters.append(
            Parameter(
                name=own,
                shape=tuple(parameter.shape),
                trainable=parameter.requires_grad,
                unit=unit,
                also=tuple(others),
                dtype=str(parameter.dtype).removeprefix("torch."),
            )
        )
    return tuple(parameters)


def with_segments(parameters: Sequence[Parameter], flow: Flow) -> tuple[Parameter, ...]:
    """The parameters with the segments that use them, under whichever name."""
    result = []
    for parameter in parameters:
        used = {at for name in (parameter.name, *parameter.also) for at in flow.segments.get(name, ())}
        result.append(replace(parameter, segments=tuple(sorted(used))))
    return tuple(result)


def with_roles(
    parameters: Sequence[Parameter], flow: Flow, divided: Mapping[str, Division], reason: str
) -> tuple[Parameter, ...]:
    """The parameters with what they do and how tensor parallelism would divide them. A block has the roles of the first
    one that is equal to it. `reason` says why there is no division of a parameter that is used."""
    result = []
    for parameter in parameters:
        names = [_first_like(name, flow.like) for name in (parameter.name, *parameter.also)]
        role: Role = next((flow.roles[name] for name in names if name in flow.roles), "unused")
        missing = Division("unknown", reason=reason) if role != "unused" else Division()
        division = next((divided[name] for name in names if name in divided), missing)
        result.append(
            replace(
                parameter,
                role=role,
                tensor_parallel=division.role,
                tensor_parallel_dim=division.dim,
                tensor_parallel_units=division.units,
                tensor_parallel_parts=division.parts,
                tensor_parallel_reason=division.reason,
            )
        )
    return tuple(result)


def _first_like(name: str, like: Mapping[str, str]) -> str:
    """The parameter's name in the block that stands for its own."""
    block = _block_of(name, like)
    return like[block] + name.removeprefix(block) if block else name


def buffer_bytes(module: nn.Module) -> int:
    """Bytes of the distinct buffers: every process holds them all, in their own dtype."""
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


def _names(module: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return names


def _block_of(name: str, blocks: Container[str]) -> str:
    """Path of the block that a parameter lies in; empty outside all blocks."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in blocks), "")
