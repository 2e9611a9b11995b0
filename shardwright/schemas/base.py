"""What every value that crosses a file has in common."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from shardwright.schemas.diagnostics import ConflictError

_EMPTY: tuple[Any, ...] = ((), [], {})


class Spec(BaseModel):
    """Frozen, and closed: an unknown key is an error, so that a misspelt one is never silently ignored."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def conflicts(cls, given: AbstractSet[str]) -> Iterator[tuple[str, str]]:
        """Rules between keys: `(key to point at or "" for the whole, what is wrong)` for each one that is broken.

        They see only which keys hold something (`holds`), so they can be checked beside wrong values and
        every error is reported at once.
        """
        return iter(())

    @classmethod
    def holds(cls, name: str, value: Any) -> bool:
        """Whether `value` under the key `name` counts as given: not null, and not empty where that is the default."""
        field = cls.model_fields.get(name)
        return value is not None and field is not None and not (value in _EMPTY and field.default in _EMPTY)

    @model_validator(mode="after")
    def _has_no_conflicts(self) -> Self:
        given = {name for name in type(self).model_fields if self.holds(name, getattr(self, name))}
        for _, message in self.conflicts(given):
            raise ConflictError(message)
        return self


def exactly_one(given: AbstractSet[str], choices: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A conflict unless exactly one of the keys of `choices` is given; the values explain each key."""
    found = [name for name in choices if name in given]
    if len(found) != 1:
        *most, last = [f"`{name}` ({what})" if what else f"`{name}`" for name, what in choices.items()]
        there = " and ".join(f"`{name}`" for name in found) or "none of them"
        yield found[-1] if found else "", f"expected exactly one of {', '.join(most)} or {last}; found {there}"


@dataclass(frozen=True, slots=True)
class SingleOrList:
    """For the JSON Schema: where a list is accepted, one of its items may stand alone."""

    least: int = 0
    """Fewest items of a list, where the type itself does not say so."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Adds the schema of the items beside that of every list."""
        schema = handler(core_schema)
        branches: list[JsonSchemaValue] = schema.pop("anyOf", None) or [schema]
        lists = [
            branch | ({"minItems": self.least} if self.least else {})
            for branch in branches
            if branch.get("type") == "array"
        ]
        items = [item for branch in lists for item in branch["items"].get("anyOf", [branch["items"]])]
        return {"anyOf": [branch for branch in branches if branch.get("type") != "array"] + items + lists}


def one_or_many(value: Any) -> Any:
    """`a` to `("a",)`, `[a, b]` to `("a", "b")`; null stays null."""
    return value if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def _permitted(value: Any) -> Any:
    """`4` and `[1, 4]` both mean a set of permitted values; `auto` leaves the decision to the planner."""
    if value == "auto" or value is None:
        return "auto"
    values = one_or_many(value)
    if not values:
        raise ValueError("an empty list permits nothing; write `auto`, or the values that are permitted")
    return values


T = TypeVar("T")

Choice = Annotated[Literal["auto"] | tuple[T, ...], BeforeValidator(_permitted), SingleOrList(least=1)]
"""One decision of a plan as the job restricts it: `auto`, or the tuple of values that the planner may choose from."""


def permits(choice: Literal["auto"] | tuple[T, ...], value: T) -> bool:
    """Whether a decision may take `value`."""
    return choice == "auto" or value in choice
