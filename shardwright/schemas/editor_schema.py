"""JSON Schemas (draft 2020-12) of the job file as a person writes it, and of `plan.json`.

Editors check against the committed copies, `job.schema.json` and `plan.schema.json` beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from shardwright.schemas.cluster_forms import CountedCluster, LevelledCluster
from shardwright.schemas.job import JobSpec
from shardwright.schemas.plan import Plan
from shardwright.schemas.units import Amount

DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _Generator(GenerateJsonSchema):
    """Defaults as a person would write them; no titles, which only repeat the keys."""

    def encode_default(self, dft: Any) -> Any:
        if isinstance(dft, Amount):
            return str(dft)
        return super().encode_default(dft)

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        written = super().model_schema(schema)
        written.pop("title", None)
        return written


@cache
def job_schema() -> dict[str, Any]:
    """The schema of a job file: as `JobSpec`, with `cluster` in the forms that a person writes."""
    schema = _schema(JobSpec)
    forms = [_schema(CountedCluster), _schema(LevelledCluster)]
    definitions: dict[str, Any] = schema["$defs"]
    for form, name in zip(forms, ("CountedCluster", "LevelledCluster"), strict=True):
        definitions |= form.pop("$defs", {})
        definitions[name] = form
    named = {
        "type": "string",
        "description": "A machine of the catalogue, several of them, or a file that holds one of the other forms.",
        "examples": ["dgx-h100", "4 x dgx-h100", "cluster.yaml"],
    }
    schema["properties"]["cluster"] = {
        "anyOf": [named, {"$ref": "#/$defs/CountedCluster"}, {"$ref": "#/$defs/LevelledCluster"}],
        "description": "What to train on: `{devices: COUNT x DEVICE}`, a device and levels, a machine, or a file.",
    }
    return {"$schema": DIALECT, "title": "shardwright job", **_used_only(schema)}


@cache
def plan_schema() -> dict[str, Any]:
    """The schema of `plan.json`."""
    return {"$schema": DIALECT, "title": "shardwright plan", **_schema(Plan)}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(schema_generator=_Generator)


def _used_only(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without definitions that nothing refers to."""
    definitions = schema["$defs"]
    used: set[str] = set()
    waiting = set(_references({key: value for key, value in schema.items() if key != "$defs"}))
    while waiting:
        name = waiting.pop()
        used.add(name)
        waiting |= set(_references(definitions[name])) - used
    return schema | {"$defs": {name: definitions[name] for name in sorted(used)}}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].removeprefix("#/$defs/")
        for below in value.values():
            yield from _references(below)
    elif isinstance(value, list):
        for below in value:
            yield from _references(below)
