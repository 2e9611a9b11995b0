"""pydantic's errors as diagnostics: where each is in the file, in words, with the nearest valid choice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from shardwright.schemas.base import Spec
from shardwright.schemas.diagnostics import Diagnostic, WrongValueError, shown
from shardwright.schemas.expected import Schema, describe, literals, nearest, schema_at, summary
from shardwright.schemas.nodes import Key, Node, best_span, child, diagnostic, dotted, place, plain


@dataclass(frozen=True, slots=True)
class Form:
    """What is being validated: a model, its JSON Schema, and the key under which its tree lies in the whole."""

    model: type[Spec]
    schema: Schema
    prefix: Key = ()

    def at(self, key: Key) -> tuple[Schema, ...]:
        """What the schema says of a key of the whole tree."""
        return schema_at(self.schema, key[len(self.prefix) :])


@dataclass(frozen=True, slots=True)
class _Problem:
    """One error of pydantic, its location reduced to keys that the file has (or should have)."""

    key: Key
    kind: str
    cause: Exception | None
    of_name: bool
    """Whether the name of the entry is wrong, not its value."""


def explain(error: ValidationError, root: Node, form: Form) -> list[Diagnostic]:
    """One diagnostic for each thing that is wrong in `root`, however many branches of a union pydantic tried."""
    errors = error.errors(include_url=False, include_input=False)
    problems = _collapsed([_problem(each, root, form.prefix) for each in errors])
    misspelt = {
        (*problem.key[:-1], _key_meant(problem.key, form)) for problem in problems if problem.kind == "extra_forbidden"
    }
    problems = [problem for problem in problems if not (problem.kind == "missing" and problem.key in misspelt)]
    diagnostics = [_WORDS.get(problem.kind, _wrong_value)(problem, root, form) for problem in problems]
    # Rules between keys are checked on the tree: pydantic skips those of a mapping that holds a wrong value, and
    # cannot point at one of the keys.
    broken = list(_conflicts(form.model, form.prefix, root))
    said = {each.message for each in broken}
    return [*broken, *(each for each in diagnostics if each.message not in said)]


def arranged(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """In the order of the file, each once; those of `--set` arguments last."""
    distinct = {(each.key, each.message): each for each in diagnostics}
    return sorted(
        distinct.values(), key=lambda each: (each.file.startswith("--set "), each.file, each.line, each.column)
    )


def _problem(error: Any, root: Node, prefix: Key) -> _Problem:
    """Drops from pydantic's location what is no key of the file: branches of unions, marks of wrong names."""
    node: Node | None = place(root, prefix)[0]
    key = prefix
    parts: tuple[str | int, ...] = error["loc"]
    absent = error["type"] == "missing"
    for part in parts[:-1] if absent else parts:
        below = child(node, part) if node else None
        if below is None:
            continue
        node, key = below[0], (*key, part)
    if absent and isinstance(parts[-1], str):
        key = (*key, parts[-1])
    return _Problem(
        key=key,
        kind=error["type"] if not absent or isinstance(parts[-1], str) else "too_short",
        cause=error.get("ctx", {}).get("error"),
        of_name=parts[-1:] == ("[key]",),
    )


def _collapsed(problems: list[_Problem]) -> list[_Problem]:
    """One problem a key; what is wrong with a whole gives way to what is wrong inside it, which explains it."""
    keys = {problem.key for problem in problems}
    chosen: dict[Key, _Problem] = {}
    for problem in problems:
        deeper = any(key[: len(problem.key)] == problem.key and key != problem.key for key in keys)
        if problem.of_name or not deeper:
            chosen.setdefault(problem.key, problem)
    return list(chosen.values())


def _missing(problem: _Problem, root: Node, form: Form) -> Diagnostic:
    about = summary(form.at(problem.key))
    message = f"the key `{problem.key[-1]}` is missing"
    return _at(problem.key, root, message, f"{problem.key[-1]}: {about}" if about else "")


def _unknown(problem: _Problem, root: Node, form: Form) -> Diagnostic:
    name = str(problem.key[-1])
    known = _known_keys(problem.key[:-1], form)
    near = _key_meant(problem.key, form)
    elsewhere = [dotted(key) for key in _keys_named(name, form.schema)]
    if near:
        suggestion = f"did you mean `{near}`?"
    elif len(elsewhere) == 1:
        suggestion = f"it belongs to `{elsewhere[0].rpartition('.')[0]}`: {elsewhere[0]}"
    else:
        suggestion = _keys_known(known)
    _, span, _ = place(root, problem.key)
    return diagnostic(span, problem.key, f"unknown key `{name}`", suggestion)


def _keys_known(names: list[str]) -> str:
    return f"keys here: {', '.join(names)}" if names else ""


def _known_keys(key: Key, form: Form) -> list[str]:
    return [name for schema in form.at(key) for name in schema.get("properties", {})]


def _key_meant(key: Key, form: Form) -> str:
    return nearest(str(key[-1]), _known_keys(key[:-1], form))


def _keys_named(name: str, schema: Schema, key: Key = ()) -> Iterator[Key]:
    """Every place in the schema, at most three mappings deep, that knows a key of that name."""
    for option in schema_at(schema, key):
        for below in option.get("properties", {}):
            if below == name:
                yield (*key, below)
            elif len(key) < 3:
                yield from _keys_named(name, schema, (*key, below))


def _refused(problem: _Problem, root: Node, form: Form) -> Diagnostic:
    """A value that one of our own parsers or rules refuses, in its own words."""
    suggestion = problem.cause.suggestion if isinstance(problem.cause, WrongValueError) else ""
    return _at(problem.key, root, str(problem.cause), suggestion)


def _wrong_value(problem: _Problem, root: Node, form: Form) -> Diagnostic:
    node, name, _ = place(root, problem.key)
    if problem.of_name:
        owners = form.at(problem.key[:-1])
        options = tuple(owner["propertyNames"] for owner in owners if "propertyNames" in owner)
        written: Any = problem.key[-1]
        expectation = describe(options) or "a name of letters, digits and `_`"
        message = f"`{written}` cannot be a key here: expected {expectation}"
        return diagnostic(name, problem.key, message, _way_out(written, options))
    options = form.at(problem.key)
    written = plain(node)
    expectation = describe(options) or "another kind of value"
    suggestion = _way_out(written, options)
    if not suggestion and not isinstance(written, dict):
        suggestion = _keys_known(_known_keys(problem.key, form))
    if written is None and not any(problem.key[-1] in owner.get("required", ()) for owner in form.at(problem.key[:-1])):
        suggestion = "give a value, or leave the key out"
    return _at(problem.key, root, f"expected {expectation}, found {shown(written)}", suggestion)


def _way_out(written: Any, options: tuple[Schema, ...]) -> str:
    """What was probably meant by a value of the wrong kind."""
    kinds = {kind for option in options for kind in _kinds(option)}
    if isinstance(written, str):
        near = nearest(written, literals(options))
        if near:
            return f"did you mean `{near}`?"
        if "boolean" in kinds and written.lower() in _BOOLEANS:
            return f"write {_BOOLEANS[written.lower()]}; in YAML 1.2 `{written}` is text"
        if kinds & {"integer", "number"}:
            return _number_meant(written.replace("_", "").replace(",", ""), kinds)
    if isinstance(written, float) and written.is_integer() and "integer" in kinds:
        return f"write {int(written)}"
    return ""


_BOOLEANS = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}


def _number_meant(text: str, kinds: set[str]) -> str:
    try:
        number = float(text)
    except ValueError:
        return ""
    whole = number.is_integer() and abs(number) < 1e15
    return f"write {int(number) if whole else text}" if whole or "number" in kinds else ""


def _kinds(option: Schema) -> tuple[str, ...]:
    kinds = option.get("type", ())
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def _at(key: Key, root: Node, message: str, suggestion: str) -> Diagnostic:
    return diagnostic(best_span(root, key), key, message, suggestion)


def _conflicts(model: type[Spec], key: Key, root: Node) -> Iterator[Diagnostic]:
    node, _, found = place(root, key)
    if found < len(key) or not isinstance(node.value, dict):
        return
    given = {name for name, entry in node.value.items() if model.holds(name, plain(entry.node))}
    for name, message in model.conflicts(given):
        broken = (*key, name) if name else key
        _, span, _ = place(root, broken)
        yield diagnostic(span, broken, message)
    for name, field in model.model_fields.items():
        below = child(node, name)
        items = below[0].value if below and isinstance(below[0].value, tuple) else ()
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Spec):
                yield from _conflicts(part, (*key, name), root)
                for index in range(len(items)):
                    yield from _conflicts(part, (*key, name, index), root)


_WORDS = {"missing": _missing, "extra_forbidden": _unknown, "value_error": _refused}
