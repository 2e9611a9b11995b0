"""A profile as plain JSON values, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from shardwright.schemas.profile import ModelProfile


def profile_to_json(profile: ModelProfile) -> dict[str, Any]:
    """Dictionaries, lists, numbers and strings only; an affine quantity is [constant, slope]."""
    plain: dict[str, Any] = json.loads(json.dumps(profile, default=_fields))
    return plain


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass as a dictionary, one level deep: json asks again for what is inside."""
    return {field.name: _with_texts(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _with_texts(value: Any) -> Any:
    """A dictionary with the keys that JSON gives it, by which they are sorted."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


def profile_from_json(values: Mapping[str, Any]) -> ModelProfile:
    """The inverse of `profile_to_json`. Raises KeyError, TypeError or ValueError if the values are not a
    profile."""
    return _reader(ModelProfile)(values)  # type: ignore[no-any-return]


def digest(profile: ModelProfile) -> str:
    """sha256 over the canonical JSON of everything but the digest itself."""
    return digest_of(_fields(profile))


def digest_of(values: Mapping[str, Any]) -> str:
    """The digest of a profile given as plain values, whatever digest stands in them."""
    content = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(content: Any) -> str:
    return json.dumps(content, default=_fields, sort_keys=True, separators=(",", ":"))


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of an annotated type from plain JSON values; made once for each type, since annotations take
    longer to read than values. Raises TypeError for a value that is not of the type."""
    if dataclasses.is_dataclass(kind):
        return _of_fields(kind, {name: _reader(hint) for name, hint in get_type_hints(kind).items()})
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        readers = [_reader(hint) for hint in get_type_hints(kind).values()]
        return lambda value: kind(*(read(item) for read, item in zip(readers, value, strict=True)))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        read_item = _reader(arguments[0])
        return lambda value: tuple(map(read_item, value))
    if origin is dict:
        read_value = _reader(arguments[1])
        key_of = arguments[0] if arguments[0] is int else lambda key: key  # JSON has no other keys than strings
        return lambda value: {key_of(key): read_value(item) for key, item in value.items()}
    if origin in (Literal, Union, types.UnionType):
        return lambda value: value
    return _checked(kind)


def _of_fields(kind: Any, readers: Mapping[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def read(values: Any) -> Any:
        return kind(**{name: readers[name](item) for name, item in values.items()})

    return read


def _checked(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if isinstance(value, kind):
            return value
        raise TypeError(f"{value!r} is not {kind}")

    return read
