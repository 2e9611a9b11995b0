"""A profile as plain JSON values, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from shardwright.schemas.profile import Affine, ModelProfile


def profile_to_json(profile: ModelProfile) -> dict[str, Any]:
    """Dictionaries, lists, numbers and strings only; an affine quantity is [constant, slope]."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(profile)))
    return plain


def profile_from_json(values: Mapping[str, Any]) -> ModelProfile:
    """The inverse of `profile_to_json`. Raises KeyError or TypeError if the values are not a profile."""
    return _read(ModelProfile, values)  # type: ignore[no-any-return]


def digest(profile: ModelProfile) -> str:
    """sha256 over the canonical JSON of everything but the digest itself."""
    content = profile_to_json(profile)
    del content["digest"]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read(kind: Any, value: Any) -> Any:
    """Builds a value of an annotated type from plain JSON values."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _read(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    if kind is Affine:
        return Affine(*value)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        return tuple(_read(arguments[0], item) for item in value)
    if origin is dict:
        return {key: _read(arguments[1], item) for key, item in value.items()}
    if origin in (Literal, Union, types.UnionType) or isinstance(value, kind):
        return value
    raise TypeError(f"{value!r} is not {kind}")
