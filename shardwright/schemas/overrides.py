"""`--set key.path=value`: one value of a job or plan, changed on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shardwright.schemas.diagnostics import Diagnostic, InputError, shown
from shardwright.schemas.nodes import Entry, Node, Source, Span, child, dotted, plain, with_entry
from shardwright.schemas.yaml_source import parse_yaml


def apply_overrides(root: Node, overrides: Iterable[str]) -> Node:
    """The tree with each override set, in order: of two that set one key, the later wins.

    The value is read as YAML, so that numbers, lists (`[1, 2]`) and mappings (`{name: sgd}`) mean what they mean in a
    file. Mappings on the way that are absent are made. Raises InputError with every override that cannot be applied.
    """
    problems: list[Diagnostic] = []
    for override in overrides:
        try:
            root = _apply(root, override)
        except InputError as error:
            problems += error.diagnostics
    if problems:
        raise InputError(problems)
    return root


def _apply(root: Node, override: str) -> Node:
    label = "--set " + "".join(character if character.isprintable() else " " for character in override)
    path, equals, text = override.partition("=")
    parts = tuple(path.strip().split("."))
    if not equals or not all(parts):
        suggestion = "for example --set train.steps=10"
        raise InputError(Diagnostic(message="expected KEY.PATH=VALUE", suggestion=suggestion, file=label))
    try:
        value = parse_yaml(Source(label, text))
    except InputError as error:
        messages = "; ".join(each.message for each in error.diagnostics)
        raise InputError(Diagnostic(message=messages, key=dotted(parts), file=label)) from None
    return _with(root, parts, _relabel(value, Span(Source(label), 1, 1, 1)), parts)


def _with(node: Node, parts: tuple[str, ...], value: Node, full: tuple[str, ...]) -> Node:
    """The tree with `value` at `parts`; `full` is the whole path, for messages."""
    if not parts:
        return value
    span, done = value.span, full[: len(full) - len(parts)]
    if node.value is None:
        node = Node(span, {})
    if isinstance(node.value, dict):
        old = node.value.get(parts[0])
        below = _with(old.node if old else Node(span, None), parts[1:], value, full)
        # The name keeps its place in the file unless the override wrote it.
        return with_entry(node, parts[0], Entry(old.key if old and len(parts) > 1 else span, below))
    if isinstance(node.value, tuple):
        if child(node, parts[0]) is None:
            message = f"`{dotted(done)}` is a list of {len(node.value)}: expected an index below that, from 0"
            raise InputError(Diagnostic(message=message, key=dotted(full), file=span.source.label))
        index = int(parts[0])
        below = _with(node.value[index], parts[1:], value, full)
        items = (*node.value[:index], below, *node.value[index + 1 :])
        return replace(node, value=items, size=1 + sum(item.size for item in items))
    raise InputError(
        Diagnostic(
            message=f"`{dotted(done)}` is {shown(plain(node))}, which has no keys to set",
            key=dotted(full),
            suggestion=f"set the whole: --set '{dotted(done)}={{{parts[0]}: ...}}'" if done else "",
            file=span.source.label,
        )
    )


def _relabel(node: Node, span: Span) -> Node:
    """The tree with every place replaced by the argument as a whole, which is shown instead of a line."""
    if isinstance(node.value, dict):
        return replace(
            node,
            span=span,
            value={name: Entry(span, _relabel(entry.node, span)) for name, entry in node.value.items()},
        )
    if isinstance(node.value, tuple):
        return replace(node, span=span, value=tuple(_relabel(item, span) for item in node.value))
    return replace(node, span=span)
