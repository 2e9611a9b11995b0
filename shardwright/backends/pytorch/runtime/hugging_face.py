"""The names that Hugging Face models are stored under, as the installed transformers maps them to its modules.

[Note: conversion on load]
transformers renames stored tensors when it loads them (`LayerNorm.gamma`, a base model's prefix), and for some models
merges or splits them (a mixture's experts, stored one by one). What is asked for here are its own tables
(`transformers.conversion_mapping`), so what they say is what `from_pretrained` does; of the conversions themselves
those are done that only move whole boxes of numbers. Any other is refused, by name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from .index import check_cover
from .parts import Part, Shape, as_it_is, original_class
from .pieces import Box
from .tensorfile import FormatError

Conversion = Callable[[Any, str, Mapping[str, Sequence[str]], Mapping[str, Shape]], dict[str, list[Part]]]
"""(converter, name in the model, stored names by the converter's patterns, their shapes) to parts."""


def hugging_face_names(model: nn.Module, stored: Mapping[str, Shape]) -> dict[str, list[Part]]:
    """The `Naming` of Hugging Face models; see [Note: conversion on load].

    Stored tensors that transformers knows to be superfluous are left out. Raises FormatError for a conversion that is
    none of CONVERSIONS, and where two stored tensors have the same place.
    """
    plain = _unsharded(model)
    names = plain.state_dict().keys()
    transforms = get_model_conversion_mapping(plain)
    parts: dict[str, list[Part]] = {}
    gathered: dict[tuple[str, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(stored, key=_natural):
        target, converter, pattern = _target(name, transforms, names, plain.base_model_prefix)
        if converter is not None and target in names:
            gathered[target, transforms.index(converter)][pattern].append(name)
        elif not (target not in names and _is_superfluous(target, plain)):
            _add(parts, target if target in names else name, [as_it_is(name, stored[name])])
    for (target, number), sources in gathered.items():
        converter = transforms[number]
        operations = tuple(type(each).__name__ for each in converter.operations)
        if operations not in CONVERSIONS:
            example = next(iter(sources.values()))[0]
            raise FormatError(
                f"models of type {plain.config.model_type} store {example} for {target} in a form that takes "
                f"{' and '.join(operations)} to convert, which is not done here: load and save them with "
                "from_pretrained(FOLDER) and save_pretrained(NEW_FOLDER, save_original_format=False) of transformers"
            )
        for filled, made in CONVERSIONS[operations](converter, target, sources, stored).items():
            _add(parts, filled, made)
    return parts


def stored_form(model: nn.Module) -> dict[str, list[Part]]:
    """The inverse: how `save_pretrained` would store a model (on meta): for each of its tensors, by its name in the
    model, the parts that lie in stored ones. Tied tensors come once.

    Raises FormatError where the names would not lead back to every number of the model.
    """
    own = _without_ties(model)
    published = revert_weight_conversion(model, dict(own))
    for form in (published, own):
        shapes = {name: tuple(tensor.shape) for name, tensor in form.items()}
        try:
            parts = hugging_face_names(model, shapes)
            if parts.keys() == own.keys():
                for name, tensor in own.items():
                    check_cover(name, tuple(tensor.shape), [part.box for part in parts[name]])
                return parts
        except FormatError:
            continue
    raise FormatError(f"{type(model).__name__} has no stored form from which it could be loaded again")


def _without_ties(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under the names that are stored: of tied ones, the one they are tied to."""
    tied: Mapping[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    ignored: Iterable[str] = model._keys_to_ignore_on_save or ()  # type: ignore[assignment]
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ignored and (id(tensor) not in names or names[id(tensor)] in tied):
            names[id(tensor)] = name
    kept = set(names.values())
    return {name: tensor for name, tensor in model.state_dict().items() if name in kept}


def _unsharded(model: nn.Module) -> Any:
    """The model before it was sharded, on meta: transformers' tables go by the names of classes."""
    original: Any = original_class(model)
    if original is type(model):
        return model
    with torch.device("meta"):
        return original(model.config)


def _target(name: str, transforms: Sequence[Any], names: Iterable[str], prefix: str) -> tuple[str, Any | None, str]:
    """The name in the model, the converter and the one of its patterns that applies, by the rules of transformers
    (`transformers.core_model_loading.rename_source_key`): renamings in turn, one converter, the base model's prefix."""
    renamed = name
    for transform in transforms:
        if not hasattr(transform, "operations"):
            renamed = transform.rename_source_key(renamed)[0]
    converter, pattern = None, ""
    for transform in transforms:
        if hasattr(transform, "operations"):
            renamed, matched = transform.rename_source_key(renamed)
            if matched is not None:
                converter, pattern = transform, matched
                break
    renamed = _with_prefix(renamed, names, prefix)
    if renamed not in names and name in names:
        return _with_prefix(name, names, prefix), None, ""
    return renamed, converter, pattern


def _with_prefix(name: str, names: Iterable[str], prefix: str) -> str:
    """The name with or without the base model's prefix, whichever the model has."""
    without = name.removeprefix(f"{prefix}.")
    if without != name and without in names:
        return without
    return f"{prefix}.{name}" if f"{prefix}.{name}" in names else name


def _is_superfluous(name: str, model: Any) -> bool:
    """Whether transformers would not mention a stored tensor that the model has no place for."""
    buffers = [each for each, _ in model.named_buffers()]
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    # Once stored, now computed when the model is built.
    patterns += [rf"(^|\.){each}$" for each in _COMPUTED if any(buffer.endswith(each) for buffer in buffers)]
    return any(re.search(pattern, name) for pattern in patterns)


_COMPUTED = (r"rotary_emb.inv_freq", "position_ids")


def _merged(
    converter: Any, target: str, sources: Mapping[str, Sequence[str]], stored: Mapping[str, Shape]
) -> dict[str, list[Part]]:
    """Tensors stacked along a new first dim, pattern by pattern; the stacks concatenated along another dim."""
    dims = [operation.dim for operation in converter.operations]
    if dims[0] != 0 or (len(dims) > 1 and dims[1] == 0):
        raise FormatError(f"{target}: a merge along dims {dims} is not known here")
    parts = []
    offset = 0
    for pattern in converter.source_patterns:
        found = sources.get(pattern, ())
        _check_numbering(target, found)
        for number, name in enumerate(found):
            shape = stored[name]
            start, stop = [number, *(0 for _ in shape)], [number + 1, *shape]
            if len(dims) > 1:
                start[dims[1]], stop[dims[1]] = offset, offset + shape[dims[1] - 1]
            parts.append(Part(name, Box(tuple(start), tuple(stop)), (0,) * len(shape), stacked=True))
        if len(dims) > 1 and found:
            offset += stored[found[0]][dims[1] - 1]
    return {target: parts}


def _concatenated(
    converter: Any, target: str, sources: Mapping[str, Sequence[str]], stored: Mapping[str, Shape]
) -> dict[str, list[Part]]:
    """One tensor a pattern, one after the other along a dim."""
    dim, offset, parts = converter.operations[0].dim, 0, []
    for pattern in converter.source_patterns:
        for name in sources.get(pattern, ()):
            shape = stored[name]
            start, stop = [0] * len(shape), list(shape)
            start[dim], stop[dim] = offset, offset + shape[dim]
            offset += shape[dim]
            parts.append(Part(name, Box(tuple(start), tuple(stop)), (0,) * len(shape)))
    return {target: parts}


def _chunked(
    converter: Any, target: str, sources: Mapping[str, Sequence[str]], stored: Mapping[str, Shape]
) -> dict[str, list[Part]]:
    """One tensor cut into equal ones along a dim."""
    dim, patterns = converter.operations[0].dim, converter.target_patterns
    (name,) = next(iter(sources.values()))
    shape, count = stored[name], len(patterns)
    if converter.operations[0].num_shards_attribute is not None or shape[dim] % count:
        raise FormatError(f"{name}: {shape} cannot be cut into {count} equal parts along dim {dim}")
    size = shape[dim] // count
    sizes = (*shape[:dim], size, *shape[dim + 1 :])
    return {
        target.replace(patterns[0], pattern, 1): [
            Part(name, Box((0,) * len(shape), sizes), tuple(number * size * (at == dim) for at in range(len(shape))))
        ]
        for number, pattern in enumerate(patterns)
    }


CONVERSIONS: Mapping[tuple[str, ...], Conversion] = {
    ("MergeModulelist",): _merged,
    ("MergeModulelist", "Concatenate"): _merged,
    ("Concatenate",): _concatenated,
    ("Chunk",): _chunked,
}
"""By the classes of transformers' operations (`transformers.core_model_loading`)."""


def _check_numbering(target: str, names: Sequence[str]) -> None:
    """Raises FormatError unless the names count up from 0 at one place: transformers would stack any."""
    if not names:
        return
    places = [match.span(1) for match in re.finditer(r"\.(0)\.", names[0])]
    for start, stop in places:
        if all(name == f"{names[0][:start]}{number}{names[0][stop:]}" for number, name in enumerate(names)):
            return
    raise FormatError(f"{target}: {names[0]} and the {len(names) - 1} that go with it do not count up from 0")


def _add(parts: dict[str, list[Part]], name: str, made: list[Part]) -> None:
    if name in parts:
        raise FormatError(f"{parts[name][0].stored} and {made[0].stored} are both stored for {name}")
    parts[name] = made


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
