"""What a key expects, in words: read from the JSON Schema, so that messages, editors and docs say the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from shardwright.schemas.nodes import Key

Schema = Mapping[str, Any]


def schema_at(root: Schema, key: Key) -> tuple[Schema, ...]:
    """Every alternative that the schema has for the value at `key`; empty where anything goes."""
    found = _alternatives(root, root)
    for part in key:
        found = tuple(
            option for schema in found for below in _descend(schema, part) for option in _alternatives(root, below)
        )
    return found


def _alternatives(root: Schema, schema: Schema) -> tuple[Schema, ...]:
    """The schema with references followed and `anyOf` taken apart; a description goes to every part."""
    if "$ref" in schema:
        name = str(schema["$ref"]).removeprefix("#/$defs/")
        outer = {key: value for key, value in schema.items() if key != "$ref"}
        return _alternatives(root, {**root["$defs"][name], **outer})
    if "anyOf" in schema:
        note = {"description": schema["description"]} if "description" in schema else {}
        return tuple(option for part in schema["anyOf"] for option in _alternatives(root, {**part, **note}))
    return (schema,)


def _descend(schema: Schema, part: str | int) -> Iterator[Schema]:
    if isinstance(part, int):
        prefix = schema.get("prefixItems", ())
        below = prefix[part] if part < len(prefix) else schema.get("items")
    else:
        below = schema.get("properties", {}).get(part, schema.get("additionalProperties"))
        for pattern, value in schema.get("patternProperties", {}).items():
            below = value if re.search(pattern, part) else below
    if isinstance(below, Mapping):
        yield below


def describe(schemas: Sequence[Schema]) -> str:
    """What the alternatives accept: "`auto`, a whole number above 0, or a list of these"."""
    present = [schema for schema in schemas if schema.get("type") != "null"]
    lists = [schema for schema in present if schema.get("type") == "array" and len(present) > 1]
    choices = [f"`{choice}`" for choice in literals(present)]
    phrases = [_phrase(schema) for schema in present if schema not in lists and not literals([schema])]
    phrases += ["a list of these" for _ in lists[:1]]
    return join([*choices, *dict.fromkeys(phrases)], "or")


def literals(schemas: Sequence[Schema]) -> list[str]:
    """The fixed values among the alternatives, as text."""
    return list(dict.fromkeys(value for schema in schemas for value in _values(schema)))


def _values(schema: Schema) -> tuple[str, ...]:
    if schema.get("type") == "boolean":
        return ("true", "false")
    return tuple(map(str, schema.get("enum", (schema["const"],) if "const" in schema else ())))


def join(parts: Sequence[str], word: str) -> str:
    """`a`, `b` and `c` with commas as English has them."""
    if len(parts) < 3:
        return f" {word} ".join(parts)
    return f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def nearest(written: str, choices: Iterable[str]) -> str:
    """The choice that may have been meant, or an empty text. Case, `-` and `_` do not count."""
    plain = {_bare(choice): choice for choice in choices}
    close = get_close_matches(_bare(written), plain, n=1, cutoff=0.7)
    if not close and len(written) > 1:
        close = [bare for bare in plain if _bare(written) and bare.startswith(_bare(written))][:1]
    return plain[close[0]] if close else ""


def _bare(text: str) -> str:
    return text.lower().replace("_", "").replace("-", "")


def summary(schemas: Sequence[Schema]) -> str:
    """The first sentence of the description, with an example where there is one."""
    text = next((str(schema["description"]) for schema in schemas if schema.get("description")), "")
    sentence = re.split(r"(?<=[.:;])\s", " ".join(text.split()))[0].rstrip(".:;")
    examples = [example for schema in schemas for example in schema.get("examples", ())]
    return "; for example ".join(filter(None, [sentence, *map(str, examples[:1])]))


_BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


def _bounds(schema: Schema) -> str:
    parts = [f"{words} {schema[bound]}" for bound, words in _BOUNDS.items() if bound in schema]
    of = " of" if "minimum" in schema else ""
    return f"{of} {' and '.join(parts)}" if parts else ""


def _array(schema: Schema) -> str:
    items = schema.get("prefixItems") or [schema.get("items", {})]
    item = describe(_flat(items[0]))
    if schema.get("prefixItems"):
        return f"a list of {len(items)}, each {item}"
    least = f" of at least {schema['minItems']}" if "minItems" in schema else ""
    return f"a list{least}, each {item}" if item else f"a list{least}"


def _flat(schema: Schema) -> tuple[Schema, ...]:
    return tuple(schema.get("anyOf", (schema,)))


def _text(schema: Schema) -> str:
    examples = [f"`{example}`" for example in schema.get("examples", ()) if isinstance(example, str)]
    return f"text like {join(examples[:2], 'or')}" if examples else "text"


_PHRASES: dict[str, Callable[[Schema], str]] = {
    "integer": lambda schema: f"a whole number{_bounds(schema)}",
    "number": lambda schema: f"a number{_bounds(schema)}",
    "string": _text,
    "array": _array,
    "object": lambda schema: "a mapping that is not empty" if schema.get("minProperties") else "a mapping",
    "null": lambda schema: "nothing",
}


def _phrase(schema: Schema) -> str:
    if "$ref" in schema:
        return "a mapping"
    kinds = schema.get("type", "")
    return " or ".join(_PHRASES[kind](schema) for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind)
