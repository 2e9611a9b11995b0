"""The texts of a job file: where the schema allows them, and where a job has them."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """A text in a tree of plain values: its path, and whether it is the last key itself instead of the value there."""

    path: tuple[str | int, ...]
    is_key: bool = False

    @property
    def key(self) -> str:
        """Dotted, without positions in lists."""
        return ".".join(part for part in self.path if isinstance(part, str))

    def replaced(self, tree: Any, text: str) -> Any:
        """A copy of the tree with another text here."""
        tree = deepcopy(tree)
        parent = tree
        for part in self.path[:-1]:
            parent = parent[part]
        last = self.path[-1]
        if self.is_key:
            items = [(text if key == last else key, value) for key, value in parent.items()]
            parent.clear()
            parent.update(items)
        else:
            parent[last] = text
        return tree


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[Place]:
    """Every text in a tree of plain values, keys included."""
    if isinstance(value, str):
        yield Place(path)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(key, str):
            yield Place((*path, key), is_key=True)
        yield from places(item, (*path, key))


def schema_keys(schema: dict[str, Any]) -> set[str]:
    """Dotted keys at which a JSON Schema allows text; `*` for any key, also where it is the key that is free."""
    return set(_keys(schema, schema["$defs"], ()))


def matches(key: str, pattern: str) -> bool:
    """Whether a dotted key is one that `schema_keys` gave; below a free key anything may lie."""
    parts, wanted = key.split("."), pattern.split(".")
    if wanted[-1] == "*" and len(parts) > len(wanted):
        parts = parts[: len(wanted)]
    return len(parts) == len(wanted) and all(w in (p, "*") for p, w in zip(parts, wanted, strict=True))


def _keys(node: Any, definitions: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    if node is True:
        yield ".".join(path)
        return
    if not isinstance(node, dict):
        return
    if "$ref" in node:
        yield from _keys(definitions[node["$ref"].rsplit("/", 1)[1]], definitions, path)
    types = node.get("type")
    if "string" in (types if isinstance(types, list) else [types]) or any(
        isinstance(value, str) for value in (node.get("const"), *node.get("enum", ()))
    ):
        yield ".".join(path)
    for word in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for part in node.get(word, ()):
            yield from _keys(part, definitions, path)
    yield from _keys(node.get("items"), definitions, path)
    for name, part in node.get("properties", {}).items():
        yield from _keys(part, definitions, (*path, name))
    for part in (node.get("additionalProperties"), *node.get("patternProperties", {}).values()):
        yield from _keys(part, definitions, (*path, "*"))
